"""How evenly a model serves participants: views of one metric, each participant counting once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import fairness as fairness_module
from aggregator.fairness import VIEWS, fairness, viewed, views_of
from aggregator.ledger import MOST_METRICS, weighted_means
from broker.head import HeadRecord
from broker.messages import Metrics
from fluffle.results import fairness_of, shown
from fluffle.text import fairness_text

VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=45)


def reported(values: list[float], metric: str = "accuracy") -> dict[str, tuple[int, Metrics]]:
    return {f"p{i:02}": (i + 1, {metric: value, "other": 1.0}) for i, value in enumerate(values)}


def expected(values: list[float], metric: str) -> list[float]:
    """With numpy, and a worst tenth that is counted out."""
    tenth = math.ceil(len(values) / 10)
    worst = sorted(values, reverse=metric == "loss")[:tenth]
    return [np.mean(values), np.mean(worst), np.std(values), min(values), max(values)]


def check(values: list[float], metric: str) -> None:
    found = fairness_module.fairness(reported(values, metric), metric)
    assert list(found) == list(views_of(metric))
    assert list(found.values()) == pytest.approx(expected(values, metric), abs=1e-12)


@given(values=VALUES, metric=st.sampled_from(["accuracy", "loss"]))
def test_the_views_are_those_of_numpy(values: list[float], metric: str) -> None:
    check(values, metric)


def test_the_worst_tenth_of_losses_are_the_largest() -> None:
    losses = [float(loss) for loss in range(1, 21)]
    assert fairness(reported(losses, "loss"), "loss")["loss_worst_10"] == 19.5
    assert fairness(reported(losses), "accuracy")["accuracy_worst_10"] == 1.5


def test_always_the_smallest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness_module, "lower_is_better", lambda _: False)
    with pytest.raises(AssertionError):
        check([0.1, 0.2], "loss")


def test_the_sample_deviation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness_module, "_std", lambda values: float(np.std(values, ddof=1)))
    with pytest.raises(AssertionError):
        check([0.1, 0.2, 0.4], "accuracy")


def test_a_view_may_judge_and_a_name_may_look_like_one() -> None:
    found = fairness(reported([0.2, 0.4]), "accuracy_worst_10")
    assert found["accuracy_mean"] == pytest.approx(0.3)
    assert fairness(reported([0.2, 0.4], "dice_mean"), "dice_mean").keys() == set(views_of("dice_mean"))
    assert fairness(reported([0.2]), "never_heard_of") == {}
    assert fairness({}, "accuracy") == {}
    assert [viewed(name) for name in ("loss_std", "loss", "macro_f1_worst_10")] == ["loss", "loss", "macro_f1"]


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=12))
def test_nothing_that_is_reported_spoils_the_record(values: list[float]) -> None:
    invented = {f"{i:02}": 1.0 for i in range(MOST_METRICS)}
    reports = {who: (weight, {**told, **invented}) for who, (weight, told) in reported(values).items()}
    found = fairness(reports, "accuracy")
    means, train = weighted_means(reports, ""), weighted_means(reports, "train_")
    assert HeadRecord(metrics={**train, **means, **found}).metrics.keys() >= found.keys()
    assert fairness(reported(values, "x" * 60), "x" * 60).keys() <= {
        f"{'x' * 60}_{view}" for view in ("std", "min", "max")
    }


def test_people_see_it_in_one_line() -> None:
    metrics = {"accuracy": 0.5, "recall_0": 1.0, "loss": 1.0, **dict.fromkeys(views_of("accuracy"), 0.25)}
    assert fairness_of(metrics) == {"metric": "accuracy", **dict.fromkeys(VIEWS, 0.25)}
    assert shown(metrics).keys() == {"accuracy", "loss", "accuracy_worst_10"}
    text = fairness_text({"fairness": fairness_of(metrics)})
    assert text == "  accuracy over participants: mean 0.25, worst 10% 0.25, std 0.25, min 0.25, max 0.25\n"
    assert (fairness_of({"accuracy": 1.0}), fairness_text({})) == ({}, "")
