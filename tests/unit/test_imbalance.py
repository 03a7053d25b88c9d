"""Remedies for unequal classes: weights against closed forms, and who is seen how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator
from sklearn.utils.class_weight import compute_class_weight

from broker.errors import ConfigError
from workers import imbalance
from workers.imbalance import SAMPLINGS, class_weights, resampled
from workers.recipe import recipe

LABELS = np.repeat([0, 2, 3], [12, 3, 5])  # nobody has class 1
SOME = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


def check_weights() -> None:
    balanced = imbalance.class_weights(LABELS, "balanced")
    np.testing.assert_allclose(balanced, [20 / 36, 0, 20 / 9, 20 / 15], rtol=1e-6)
    counts = np.array([12, 3, 5])
    effective = (1 - 0.9) / (1 - 0.9**counts)  # Cui et al. 2019, equation 2 and below, but for the factor
    found = imbalance.class_weights(LABELS, "effective:0.9")
    np.testing.assert_allclose(found[[0, 2, 3]] / found[0], effective / effective[0], rtol=1e-6)
    assert found[LABELS].mean() == pytest.approx(1)


def test_weights_are_those_of_the_papers() -> None:
    check_weights()


@given(labels=SOME)
def test_balanced_is_that_of_scikit_learn_and_all_weigh_one_in_the_mean(labels: np.ndarray) -> None:
    there = np.unique(labels)
    theirs = compute_class_weight("balanced", classes=there, y=labels)
    np.testing.assert_allclose(class_weights(labels, "balanced")[there], theirs, rtol=1e-6)
    for form in ("balanced", "effective:0.5", "effective:0.9999"):
        weights = class_weights(labels, form)
        assert weights.dtype == np.float32
        assert weights[labels].mean() == pytest.approx(1, rel=1e-5)
    nearly_plain = class_weights(labels, "effective:0.000001")
    np.testing.assert_allclose(nearly_plain[there], 1, rtol=1e-4)


def by_frequency(labels: np.ndarray, _: str) -> np.ndarray:
    return np.bincount(labels) / len(labels)


def summing_to_classes(labels: np.ndarray, form: str) -> np.ndarray:
    """As Cui et al. scale them: the step size would depend on how unequal the classes are."""
    weights = class_weights(labels, form)
    return weights * 3 / weights.sum()


@pytest.mark.parametrize("mistake", [by_frequency, summing_to_classes])
def test_a_mistake_in_the_weights_is_caught(mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imbalance, "class_weights", mistake)
    with pytest.raises(AssertionError):
        check_weights()


def drawn(labels: np.ndarray, how: str, seed: int = 0) -> np.ndarray:
    return imbalance.resampled(labels, how, np.random.default_rng(seed))


def check_sampling(labels: np.ndarray, seed: int) -> None:
    sizes = Counter(labels.tolist())
    over, under, balanced = (drawn(labels, how, seed) for how in SAMPLINGS)
    assert Counter(labels[over].tolist()) == dict.fromkeys(sizes, max(sizes.values()))
    assert Counter(labels[under].tolist()) == dict.fromkeys(sizes, min(sizes.values()))
    assert set(over.tolist()) == set(range(len(labels)))  # nothing is lost
    assert max(Counter(under.tolist()).values()) == 1  # nothing comes twice
    for order in (over, balanced):  # within a class all come equally often, give or take once
        times = Counter(order.tolist())
        for label in sizes:
            often = [times[row] for row in np.flatnonzero(labels == label).tolist()]
            assert max(often) - min(often) <= 1
    assert len(balanced) == len(labels)
    for first in range(0, len(labels) - len(sizes) + 1, len(sizes)):
        assert set(labels[balanced[first : first + len(sizes)]].tolist()) == set(sizes)


@given(labels=SOME, seed=st.integers(0, 99))
def test_every_class_is_seen_equally_often(labels: np.ndarray, seed: int) -> None:
    check_sampling(labels, seed)


def test_each_epoch_is_another_draw_and_the_same_for_the_same_seed() -> None:
    for how in SAMPLINGS:
        rng = np.random.default_rng(1)
        first, second = resampled(LABELS, how, rng), resampled(LABELS, how, rng)
        assert not np.array_equal(first, second)
        assert np.array_equal(first, drawn(LABELS, how, 1))


def with_replacement(rows: np.ndarray, wanted: int, rng: Generator) -> np.ndarray:
    return rng.choice(rows, wanted)


def always_the_first(rows: np.ndarray, wanted: int, rng: Generator) -> np.ndarray:
    return np.resize(rows[: max(1, len(rows) // 2)], wanted)


@pytest.mark.parametrize("mistake", [with_replacement, always_the_first])
def test_a_mistake_in_sampling_is_caught(
    mistake: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imbalance, "_drawn", mistake)
    with pytest.raises(AssertionError):
        check_sampling(LABELS, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": "inverse"}, r"train\.class_weights = 'inverse' must be balanced, or effective:BETA"),
        ({"class_weights": "effective:1.0"}, "BETA in "),
        ({"class_weights": "effective:0.0"}, "BETA in "),
        ({"class_weights": 1.0}, "is not a word"),
        ({"sampling": "smote"}, r"train\.sampling = 'smote' must be one of: over, under, balanced"),
        ({"focal_gamma": -1.0}, r"train\.focal_gamma = -1\.0 must be 0 \(off\) to 20"),
        ({"mixup": float("inf")}, r"train\.mixup = inf must be 0 \(off\) to 100"),
        ({"augment": "flip:1"}, r"train\.augment = 'flip:1' must be some of shift:PIXELS"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, str | float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(settings)


def test_remedies_are_off_by_default_and_known_by_name() -> None:
    assert recipe({}).remedies == ()
    assert recipe({"sampling": "over", "mixup": 1}).remedies == ("sampling", "mixup")
