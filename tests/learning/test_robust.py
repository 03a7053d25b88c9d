"""Robust strategies: each against an independent computation, and against the mistakes that others made.

A mistake is a deliberately broken copy of one piece, put in its place; the check that should catch it must fail.
"""

from __future__ import annotations

import errno
import math
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregator import stack
from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies import Strategy, make_strategy
from aggregator.strategies import geometric_median as rfa
from aggregator.strategies.buffers import parameters
from aggregator.strategies.bulyan import Bulyan, mean_around_median
from aggregator.strategies.collected import Collected
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.krum import scores, squared_distances
from broker.errors import BadMessage, ConfigError, StateError
from broker.messages import Scalar
from broker.tensors import Arrays, encode
from fluffle import simulate

Vectors = np.ndarray[Any, np.dtype[np.float64]]
RULES = {
    "median": 2,
    "trimmed-mean": 2,
    "geometric-median": 2,
    "krum": 2,
    "multi-krum": 2,
    "bulyan": 4,
}  # least / f
LEAST = {"krum": 3, "multi-krum": 3, "bulyan": 3}  # and this many more; 1 for the others


def least(name: str, byzantine: int) -> int:
    return RULES[name] * byzantine + LEAST.get(name, 1)


def strategy(name: str, n: int, byzantine: int = 1, **more: Any) -> Strategy:
    return make_strategy(
        StrategySettings(name=name, byzantine=byzantine, **more), RoundSettings(participants=n, quorum=n)
    )


def combined(made: Strategy, updates: Sequence[Arrays], model: Arrays | None = None) -> Arrays:
    """What becomes of a model, of zeros unless one is given, by updates of p00, p01, ... of unequal weight."""
    model = model or {name: np.zeros_like(values) for name, values in updates[0].items()}
    made.start(model, {})
    for i, update in enumerate(updates):
        made.add(update, Contribution(1 + 100 * i, f"p{i:02d}"))
    return made.finish()


def by_rule(name: str, vectors: Vectors, byzantine: int = 1, **more: Any) -> Vectors:
    """Each vector is an update of two tensors."""
    updates = [{"a": vector[:2].copy(), "b": vector[2:].copy()} for vector in vectors]
    found = combined(strategy(name, len(vectors), byzantine, **more), updates)
    return np.concatenate([found["a"], found["b"]])


def crowd(seed: int, n: int = 11, size: int = 5, bad: int = 2) -> Vectors:
    """Updates around one point, but for the first few, which are far off."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(1.0, 1.0, (n, size))
    vectors[:bad] *= -20
    return vectors


# -- independent computations -------------------------------------------------------------------------------------


def median_by_hand(vectors: Vectors) -> list[float]:
    found = []
    for column in vectors.T.tolist():
        ordered, half = sorted(column), len(column) // 2
        found.append(ordered[half] if len(column) % 2 else (ordered[half - 1] + ordered[half]) / 2)
    return found


def trimmed_by_hand(vectors: Vectors, b: int) -> list[float]:
    return [math.fsum(sorted(column)[b : len(column) - b]) / (len(column) - 2 * b) for column in vectors.T.tolist()]


def krum_scores_by_hand(vectors: Vectors, neighbours: int) -> list[float]:
    found = []
    for i, one in enumerate(vectors):
        others = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        found.append(math.fsum(others[:neighbours]))
    return found


def multi_krum_by_hand(vectors: Vectors, f: int, m: int) -> Vectors:
    found = krum_scores_by_hand(vectors, len(vectors) - f - 2)
    best = sorted(range(len(vectors)), key=lambda i: (found[i], i))[:m]
    return vectors[best].mean(axis=0)


def bulyan_by_hand(vectors: Vectors, f: int) -> list[float]:
    left, chosen = list(range(len(vectors))), []
    for _ in range(len(vectors) - 2 * f):
        found = krum_scores_by_hand(vectors[left], max(1, len(left) - f - 2))
        chosen.append(left.pop(found.index(min(found))))
    middle, result = median_by_hand(vectors[chosen]), []
    for centre, column in zip(middle, vectors[chosen].T.tolist(), strict=True):
        near = sorted(column, key=lambda value: (abs(value - centre), value))[: len(chosen) - 2 * f]
        result.append(math.fsum(near) / len(near))
    return result


def geometric_median_by_hand(vectors: Vectors, nu: float = 1e-6) -> Vectors:
    """Weiszfeld on the vectors themselves."""
    z = vectors.mean(axis=0)
    for _ in range(1000):
        nearness = 1 / np.maximum(nu, np.sqrt(((vectors - z) ** 2).sum(axis=1)))
        z = nearness @ vectors / nearness.sum()
    return z


# -- checks: each can fail, as the mistakes below show ------------------------------------------------------------


def check_median(seed: int = 0) -> None:
    for n in (3, 4, 7, 10):
        vectors = crowd(seed, n, bad=1)
        assert by_rule("median", vectors) == pytest.approx(median_by_hand(vectors), abs=1e-12)


def check_trimmed_mean(seed: int = 0) -> None:
    for n, f in ((3, 1), (6, 1), (11, 4)):
        vectors = crowd(seed, n, bad=f)
        assert by_rule("trimmed-mean", vectors, f) == pytest.approx(trimmed_by_hand(vectors, f), abs=1e-12)


def check_krum(seed: int = 0) -> None:
    for n, f in ((5, 1), (7, 2), (12, 3)):
        vectors = crowd(seed, n, bad=f)
        assert by_rule("krum", vectors, f) == pytest.approx(multi_krum_by_hand(vectors, f, 1), abs=1e-12)


def check_multi_krum(seed: int = 0) -> None:
    for n, f, m in ((5, 1, 0), (7, 2, 3), (12, 3, 9), (12, 3, 5)):
        vectors = crowd(seed, n, bad=f)
        expected = multi_krum_by_hand(vectors, f, m or n - f)
        assert by_rule("multi-krum", vectors, f, keep=m) == pytest.approx(expected, abs=1e-12)


def check_krum_close(seed: int = 0) -> None:
    """Where squares and lengths disagree: 0 is near to many, -3 is nowhere far."""
    line = np.array([[0, 0], [0.1, 0], [6, 0], [-3, 0], [3.2, 0.0]])
    vectors = np.concatenate([line, np.zeros((5, 3))], axis=1)
    assert by_rule("krum", vectors) == pytest.approx(multi_krum_by_hand(vectors, 1, 1))
    for more in range(200):
        vectors = np.random.default_rng(seed + more).normal(size=(7, 5))
        assert by_rule("krum", vectors) == pytest.approx(multi_krum_by_hand(vectors, 1, 1))


def check_bulyan(seed: int = 0) -> None:
    for n, f in ((7, 1), (8, 1), (11, 2), (16, 3)):
        vectors = crowd(seed, n, bad=f)
        assert by_rule("bulyan", vectors, f) == pytest.approx(bulyan_by_hand(vectors, f), abs=1e-12)


def check_geometric_median(seed: int = 0) -> None:
    for n, scale in ((5, 1.0), (10, 3.0), (7, 1e-3)):
        vectors = scale * crowd(seed, n)
        expected = geometric_median_by_hand(vectors)
        assert by_rule("geometric-median", vectors) == pytest.approx(expected, abs=2e-6 * scale)
        away = np.random.default_rng(seed).normal(size=(20, 5)) * 1e-2 * scale
        least_sum = np.linalg.norm(vectors - expected, axis=1).sum()
        assert all(np.linalg.norm(vectors - expected - step, axis=1).sum() >= least_sum for step in away)


def check_a_hit_point() -> None:
    """The mean, where passes begin, is one of the updates."""
    vectors = np.array([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]])
    assert by_rule("geometric-median", vectors) == pytest.approx([0, 0, 0], abs=1e-9)


def check_sizes() -> None:
    """Both sides of the fewest participants that each rule needs."""
    for name in RULES:
        for f in (1, 2, 5):
            enough = least(name, f)
            strategy(name, enough, f)
            with raises_config(f"needs at least {enough} updates"):
                strategy(name, enough - 1, f)


def raises_config(words: str) -> Any:
    return pytest.raises(ConfigError, match=words)


def check_other_scales() -> None:
    """Counters and running statistics, on a scale of thousands, decide nothing; they are combined by the median."""
    rng = np.random.default_rng(5)
    vectors = crowd(3, 7, bad=1)
    counters, means = rng.integers(0, 16000, (7, 1)), rng.normal(0, 300, (7, 2))
    updates = [
        {"w": w, "bn.num_batches_tracked": c, "bn.running_mean": m}
        for w, c, m in zip(vectors, counters, means, strict=True)
    ]
    model = {"w": np.zeros(5), "bn.num_batches_tracked": np.array([1000]), "bn.running_mean": np.full(2, 100.0)}
    for name in RULES:
        found = combined(strategy(name, 7), updates, model)
        assert found["w"] == pytest.approx(by_rule(name, vectors), abs=1e-12)
        assert found["bn.num_batches_tracked"] == 1000 + np.median(counters)
        assert found["bn.running_mean"] == pytest.approx(100 + np.median(means, axis=0))


def check_integers() -> None:
    """Rounded to the nearest, in their dtype."""
    updates = [{"w": np.zeros(1), "n": np.array([step, -step], np.int32)} for step in (0, 2, 3, 9)]
    found = combined(strategy("median", 4), updates, {"w": np.zeros(1), "n": np.array([7, 7], np.int32)})
    assert found["n"].dtype == np.int32
    assert found["n"].tolist() == [10, 4]  # 2.5 lies in the middle, and half goes to the even
    odd = combined(strategy("trimmed-mean", 3), updates[1:], {"w": np.zeros(1), "n": np.array([7, 7], np.int32)})
    assert odd["n"].tolist() == [10, 4]
    half = [{"w": np.zeros(1), "n": np.array([step])} for step in (0, 1, 2, 3, 3, 3)]
    assert combined(make_strategy(StrategySettings(name="median", server_lr=0.3), ROUND6), half)["n"] == 1  # 0.75


ROUND6 = RoundSettings(participants=6, quorum=6)


def check_order() -> None:
    """Whatever the order of arrival, the bits are the same."""
    rng = np.random.default_rng(1)
    model = {"w": np.zeros(40)}
    updates = {f"p{i}": {"w": rng.normal(size=40) * 10.0 ** rng.integers(-6, 3)} for i in range(7)}
    for name in RULES:
        made, digests = strategy(name, 7), set()
        for order in list(permutations(updates))[::631]:
            made.start(model, {})
            for participant in order:
                made.add(updates[participant], Contribution(1, participant))
            digests.add(encode(made.finish()))
        assert len(digests) == 1, name


def check_one_each() -> None:
    """Who delivers late and then again has one update, the newer; a refused one leaves the older in its place."""
    made = strategy("median", 3)
    made.start({"w": np.zeros(1)}, {})
    for participant, value in (("b", -900.0), ("a", 1.0), ("c", 2.0), ("b", 3.0)):
        made.add({"w": np.array([value])}, Contribution(1, participant))
    with pytest.raises(BadMessage):
        made.add({"w": np.array([math.nan])}, Contribution(1, "b"))
    assert made.finish()["w"].tolist() == [2.0]


def check_not_finite() -> None:
    """What a strategy that sums refuses is refused here, too, and leaves no trace."""
    for name in RULES:
        vectors = crowd(2, 7, bad=1)
        made = strategy(name, 7)
        made.start({"a": np.zeros(2), "b": np.zeros(3)}, {})
        for i, vector in enumerate(vectors):
            made.add({"a": vector[:2], "b": vector[2:]}, Contribution(1, f"p{i:02d}"))
        for value in (math.nan, math.inf, -1025.0):
            with pytest.raises(BadMessage, match="tensor 'b' has values that are not finite or beyond ±1024"):
                made.add({"a": vectors[0][:2], "b": np.array([0, 0, value])}, Contribution(1, "p99"))
        found = made.finish()
        assert np.concatenate([found["a"], found["b"]]) == pytest.approx(by_rule(name, vectors))


MOST_MB = 20


def check_memory(*names: str, size: int = 1 << 20) -> None:
    """20 updates of 4 MB: all of them in float64 would be 160 MB, all pairs of them 3.2 GB."""
    model = {"w": np.zeros(size, np.float32)}
    updates = [{"w": np.full(size, i, np.float32)} for i in range(20)]
    for name in names or RULES:
        made = strategy(name, 20, 4)
        tracemalloc.start()
        made.start(model, {})
        for i, update in enumerate(updates):
            made.add(update, Contribution(1, f"p{i:02d}"))
        made.finish({"w": np.zeros_like(model["w"])})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MB << 20, f"{name}: {peak / 1e6:.1f} MB"


def check_clipping() -> None:
    """Delta * min(1, C / ||Delta||) with the norm of the whole update, then the mean by examples."""
    long = {"a": np.array([3.0, 0.0]), "b": np.array([4.0]), "n": np.array([8])}
    short = {"a": np.array([0.0, 0.6]), "b": np.array([0.8]), "n": np.array([2])}
    made = strategy("fedavg", 2, clip_norm=2.0)
    made.start({name: np.zeros_like(values) for name, values in long.items()}, {})
    made.add(long, Contribution(10, "a"))
    made.add(short, Contribution(30, "b"))
    found = made.finish()
    assert found["a"] == pytest.approx([0.25 * 1.2, 0.75 * 0.6], abs=1e-6)
    assert found["b"] == pytest.approx([0.25 * 1.6 + 0.75 * 0.8], abs=1e-6)
    assert found["n"].tolist() == [4]  # 0.25 * 8 + 0.75 * 2 = 3.5


CHECKS = [
    check_median, check_trimmed_mean, check_krum, check_multi_krum, check_krum_close, check_bulyan,
    check_geometric_median, check_a_hit_point, check_sizes, check_other_scales, check_integers, check_order,
    check_one_each, check_not_finite, check_memory, check_clipping,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_is_as_the_paper_has_it(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    [check_median, check_trimmed_mean, check_krum, check_multi_krum, check_bulyan, check_geometric_median],
    ids=lambda check: check.__name__,
)
@given(seed=st.integers(1, 1 << 20))
@settings(max_examples=8, deadline=None)
def test_it_is_so_for_any_updates(check: Callable[[int], None], seed: int) -> None:
    check(seed)


# -- mistakes -----------------------------------------------------------------------------------------------------


def _self_counted(gram: Vectors) -> Vectors:
    squares = squared_distances(gram)
    np.fill_diagonal(squares, 0.0)
    return squares


def _not_squared(gram: Vectors) -> Vectors:
    return np.sqrt(squared_distances(gram))


def _one_neighbour_more(squares: Vectors, neighbours: int) -> Vectors:
    return scores(squares, neighbours + 1)


def _believes_weights(self: Collected, arrays: Arrays, by: Contribution) -> None:
    self._stack.put(
        by.participant, {name: (values * by.weight).astype(values.dtype) for name, values in arrays.items()}
    )


def _on_weights(self: Collected, arrays: Arrays, by: Contribution) -> None:
    self._stack.put(by.participant, {name: values + self._model[name] for name, values in arrays.items()})


def _all_pairs(self: stack.Stack, names: Sequence[str]) -> Vectors:
    x = np.concatenate([np.concatenate([rows for _, rows in self.blocks(name)], axis=1) for name in names], axis=1)
    return ((x[:, None] - x[None]) ** 2).sum(axis=2)


def _per_layer(self: Collected, out: Arrays | None = None) -> Arrays:
    found = {}
    for name, values in self._model.items():
        combine = self._rule.combination(lambda name=name: self._stack.inner_products([name]))
        parts = [combine(rows) for _, rows in self._stack.blocks(name)]
        found[name] = values + np.concatenate(parts)
    return found


def _absolute_tolerance(gram: Vectors) -> Vectors:
    weights, before = np.full(len(gram), 1 / len(gram)), math.inf
    while True:
        squares = weights @ gram @ weights - 2 * gram @ weights + gram.diagonal()
        lengths = np.sqrt(np.maximum(squares, 0))
        if before - lengths.sum() < 1e-2:
            return weights
        before, nearness = lengths.sum(), 1 / np.maximum(1e-6, lengths)
        weights = nearness / nearness.sum()


def _from_squares(gram: Vectors) -> Vectors:
    weights = np.full(len(gram), 1 / len(gram))
    for _ in range(100):
        squares = weights @ gram @ weights - 2 * gram @ weights + gram.diagonal()
        nearness = 1 / np.maximum(1e-6, squares)
        weights = nearness / nearness.sum()
    return weights


def _at_once(self: Bulyan, squares: Vectors) -> Any:
    """All are chosen by their first scores."""
    best = np.argsort(scores(squares, len(squares) - self.byzantine - 2), kind="stable")
    return np.sort(best[: len(squares) - 2 * self.byzantine])


def _two_fewer(self: Bulyan, squares: Vectors) -> Any:
    return _chosen(self, squares)[: len(squares) - 2 * self.byzantine - 2]


_chosen, _blocks, _put = Bulyan._chosen, stack.Stack.blocks, stack.Stack.put
_weiszfeld = rfa.weiszfeld


def _is_whole(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "i"


def _around_the_mean(rows: Vectors, kept: int) -> Vectors:
    nearest = np.argsort(np.abs(rows - rows.mean(axis=0)), axis=0)[:kept]
    return np.take_along_axis(rows, nearest, axis=0).mean(axis=0)


def _every_update_counts(self: stack.Stack, participant: str, arrays: Arrays) -> None:
    _put(self, f"{participant}-{len(self)}", arrays)


def _clip_each_tensor(arrays: Arrays, factor: float) -> Arrays:
    return {name: v * min(1.0, 2.0 / np.linalg.norm(v)) for name, v in arrays.items()}


def _upper(rows: Vectors) -> Vectors:
    return np.sort(rows, axis=0)[len(rows) // 2]


S = "aggregator.strategies"
MISTAKES: dict[str, tuple[Callable[[], None], str, Any]] = {
    "median: the upper of two in the middle": (check_median, f"{S}.median.median", _upper),
    "median: the mean": (check_median, f"{S}.median.median", lambda rows: rows.mean(axis=0)),
    "trimmed mean: only the highest are dropped": (
        check_trimmed_mean,
        f"{S}.trimmed_mean.TrimmedMean._trimmed",
        lambda self, rows: np.sort(rows, axis=0)[: len(rows) - self.byzantine].mean(axis=0),
    ),
    "trimmed mean: whole updates are dropped": (
        check_trimmed_mean,
        f"{S}.trimmed_mean.TrimmedMean._trimmed",
        lambda self, rows: rows[np.argsort(rows.sum(axis=1))][self.byzantine : -self.byzantine].mean(axis=0),
    ),
    "krum: the distance to itself counts": (check_krum_close, f"{S}.krum.squared_distances", _self_counted),
    "krum: lengths, not squares": (check_krum_close, f"{S}.krum.squared_distances", _not_squared),
    "krum: n - f - 1 neighbours": (check_krum_close, f"{S}.krum.scores", _one_neighbour_more),
    "multi-krum: weights are believed": (check_multi_krum, f"{S}.collected.Collected.add", _believes_weights),
    "krum: n of 2f + 2 is enough": (check_sizes, f"{S}.krum.Krum.least", property(lambda k: 2 * k.byzantine + 2)),
    "bulyan: n of 4f + 2 is enough": (
        check_sizes,
        f"{S}.bulyan.Bulyan.least",
        property(lambda b: 4 * b.byzantine + 2),
    ),
    "bulyan: n of 4f + 4 is needed": (
        check_sizes,
        f"{S}.bulyan.Bulyan.least",
        property(lambda b: 4 * b.byzantine + 4),
    ),
    "trimmed mean: n of 2b is enough": (
        check_sizes,
        f"{S}.trimmed_mean.TrimmedMean.least",
        property(lambda t: 2 * t.byzantine),
    ),
    "bulyan: chosen by the first scores": (check_bulyan, f"{S}.bulyan.Bulyan._chosen", _at_once),
    "bulyan: theta = n - 2f - 2": (check_bulyan, f"{S}.bulyan.Bulyan._chosen", _two_fewer),
    "bulyan: nearest the mean": (check_bulyan, f"{S}.bulyan.mean_around_median", _around_the_mean),
    "bulyan: theta - f values": (
        check_bulyan,
        f"{S}.bulyan.mean_around_median",
        lambda rows, kept: mean_around_median(rows, kept + 1),
    ),
    "rfa: no nu": (check_a_hit_point, f"{S}.geometric_median.NU", 0.0),
    "rfa: one pass": (check_geometric_median, f"{S}.geometric_median.weiszfeld", lambda g: _weiszfeld(g, 1)),
    "rfa: squares for lengths": (check_geometric_median, f"{S}.geometric_median.weiszfeld", _from_squares),
    "rfa: an absolute tolerance": (check_geometric_median, f"{S}.geometric_median.weiszfeld", _absolute_tolerance),
    "rfa: a norm for each tensor": (check_geometric_median, f"{S}.collected.Collected.finish", _per_layer),
    "rfa: weights are believed": (check_geometric_median, f"{S}.collected.Collected.add", _believes_weights),
    "counters are in the distance": (
        check_other_scales,
        f"{S}.collected.parameters",
        lambda model, buffers: {
            name for name in model if name in parameters(model, buffers) or _is_whole(model[name])
        },
    ),
    "running statistics are in the distance": (
        check_other_scales,
        f"{S}.collected.parameters",
        lambda model, buffers: {name for name in model if not _is_whole(model[name])},
    ),
    "weights w_i, not updates": (check_other_scales, f"{S}.collected.Collected.add", _on_weights),
    "integers are cut off": (
        check_integers,
        f"{S}.collected.put",
        lambda exact, out: np.copyto(out, np.trunc(exact) if _is_whole(out) else exact, casting="unsafe"),
    ),
    "in the order of arrival": (check_order, "aggregator.stack.sorted", list),
    "every update counts": (check_one_each, "aggregator.stack.Stack.put", _every_update_counts),
    "NaN comes in": (check_not_finite, f"{S}.collected.check_within", lambda bound, name, values: None),
    "an n x n x d array": (
        partial(check_memory, "krum", size=1 << 16),
        "aggregator.stack.Stack.inner_products",
        _all_pairs,
    ),
    "all updates in memory": (partial(check_memory, "median", size=1 << 19), "aggregator.stack.ROOM", 1 << 40),
    "clipping: a norm for each tensor": (check_clipping, f"{S}.clipping.scaled", _clip_each_tensor),
    "clipping: short ones are lengthened": (check_clipping, f"{S}.clipping.norm_of", lambda arrays: 2.0001),
    "clipping: after the mean": (
        check_clipping,
        f"{S}.clipping.Clipped.add",
        lambda self, arrays, by: self._strategy.add(arrays, by),
    ),
    "clipping: counters count": (
        check_clipping,
        f"{S}.clipping.norm_of",
        lambda arrays: math.sqrt(sum(float((v.astype(float) ** 2).sum()) for v in arrays.values())),
    ),
    "clipping: counters are scaled": (
        check_clipping,
        f"{S}.clipping.scaled",
        lambda arrays, factor: {name: (v * factor).astype(v.dtype) for name, v in arrays.items()},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, place, broken = MISTAKES[mistake]  # that it passes otherwise is shown above
    monkeypatch.setattr(place, broken, raising=place != "aggregator.stack.sorted")
    with pytest.raises((AssertionError, ConfigError, RuntimeWarning, pytest.fail.Exception)):
        check()


def test_a_disk_that_takes_nothing_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = stack.Stack({"w": np.zeros(3)}, tmp_path)
    kept.put("a", {"w": np.ones(3)})
    monkeypatch.setattr("os.pwrite", no_space)
    with pytest.raises(StateError, match=f"{tmp_path}: no room for the updates"):
        kept.put("b", {"w": np.ones(3)})
    assert len(kept) == 1
    assert list(tmp_path.iterdir()) == [], "its file has no name"
    with pytest.raises(StateError, match="no room for the updates of a round, 24 bytes each"):
        stack.Stack({"w": np.zeros(3)}, tmp_path / "missing").put("a", {"w": np.ones(3)})


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


# -- in a run -----------------------------------------------------------------------------------------------------


def test_too_small_a_cohort_is_refused_with_the_remedy(tmp_path: Path) -> None:
    asked = {"run.dir": str(tmp_path / "run"), "strategy.name": "krum", "strategy.byzantine": 2}
    with pytest.raises(ConfigError, match=r"round\.participants is 6: add participants, or lower strategy\.byz"):
        simulate("digits", {**asked, "round.participants": 6, "round.quorum": 6})
    with pytest.raises(ConfigError, match=r"needs at least 7 updates in every round, and round\.quorum is 0: set"):
        simulate("digits", {**asked, "round.participants": 10})
    with pytest.raises(ConfigError, match=r"keeps strategy\.keep = 9 needs at least 11 .* or strategy\.keep"):
        simulate("digits", {**asked, "strategy.name": "multi-krum", "strategy.keep": 9, "round.quorum": 10})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "holds"), [("fedavg", False), ("median", True), ("trimmed-mean", True), ("multi-krum", True)]
)
def test_two_of_ten_flip_signs(name: str, holds: bool, tmp_path: Path) -> None:
    """10 times the opposite of what they learned: a mean goes backwards, robust rules come near an honest run."""
    asked: dict[str, Scalar] = {
        "round.participants": 10, "round.quorum": 10, "stop.rounds": 4, "strategy.name": name,
        "strategy.byzantine": 2, "study.attack": "sign-flip:10", "study.attackers": 2,
    }  # fmt: skip
    accuracy = simulate("digits", {**asked, "run.dir": str(tmp_path)}).summary["metrics"]["accuracy"]
    assert accuracy > 0.85 if holds else accuracy < 0.5
