"""Sums have the same bits in whatever order updates arrive, and what cannot be summed leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.fedsgd import FedSGD
from aggregator.sums import FixedPointSum, Scale
from broker.errors import BadMessage, ConfigError, StateError
from broker.tensors import BLOCK, Arrays, encode

MOST, CAP = 1000, 1 << 16
Update = tuple[Arrays, int]


def a_model(seed: int = 0, size: int = 50) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(size, 2)).astype(np.float32),
        "wide": rng.normal(scale=1e5, size=size),
        "half": rng.normal(size=size).astype(np.float16),
        "steps": rng.integers(-1000, 1000, size=3),
        "scalar": np.float32(rng.normal()).reshape(()),
        "nothing": np.zeros((0, 4), np.float32),
    }


def changes(model: Arrays, seed: int) -> Arrays:
    """A delta for every tensor, in its dtype."""
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(-9, 9, values.shape).astype(values.dtype) for name, values in model.items()}


def summed(model: Arrays, updates: Sequence[Update], rate: float = 1.0) -> Arrays:
    total = FixedPointSum(MOST, CAP)
    total.start(model)
    for arrays, weight in updates:
        total.add(arrays, weight)
    return total.step(model, rate)


@given(order=st.permutations(range(8)), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_any_order_gives_the_same_bits(order: list[int], seed: int) -> None:
    model = a_model(seed)
    updates = [(changes(model, seed + 1 + i), 1 + (37 * i) % MOST) for i in range(8)]
    assert encode(summed(model, [updates[i] for i in order])) == encode(summed(model, updates))


def test_float_sums_would_not_do() -> None:
    """What the integers are for: in float64 some order of these updates gives other bits."""
    model = {"w": np.zeros(100_000)}
    updates = [changes(model, seed)["w"] for seed in range(6)]
    forwards, backwards = sum(updates), sum(reversed(updates))
    assert (forwards != backwards).any()
    exact = [summed(model, [({"w": u}, 1) for u in order])["w"] for order in (updates, updates[::-1])]
    assert (exact[0] == exact[1]).all()


def test_any_order_gives_the_same_bits_across_blocks() -> None:
    model = {"w": np.zeros(2 * BLOCK + 17, np.float32)}
    updates = [(changes(model, seed), seed + 1) for seed in range(4)]
    assert encode(summed(model, updates)) == encode(summed(model, updates[::-1]))


@given(order=st.permutations(range(40)), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_order_gives_the_same_bits_where_floats_have_run_out_of_them(order: list[int], seed: int) -> None:
    """Large values and weights: the sums go beyond 2**53, where a float64 drops units."""
    rng = np.random.default_rng(seed)
    updates = [({"w": rng.uniform(900, 1000, 20)}, MOST - i) for i in range(40)]
    model = {"w": np.zeros(20)}
    assert encode(summed(model, [updates[i] for i in order])) == encode(summed(model, updates))


@given(
    largest=st.floats(0, 1e6), weight_max=st.integers(1, 1 << 30), updates=st.integers(1, 1 << 20), data=st.data()
)
def test_no_sum_within_the_limits_overflows(
    largest: float, weight_max: int, updates: int, data: st.DataObject
) -> None:
    """Every product is exact in float64, and all of them together fit an int64."""
    cap = data.draw(st.integers(weight_max, weight_max * updates))
    try:
        scale = Scale.of("w", np.array([largest, -largest / 2]), weight_max, cap)
    except StateError:
        assume(False)
    assert scale.bound >= max(1024.0, 16 * largest)
    assert scale.bound * weight_max * 2.0**scale.bits <= 2.0**51
    assert scale.bound * cap * 2.0**scale.bits <= 2.0**62


@given(seed=st.integers(0, 1000), weights=st.lists(st.integers(1, MOST), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_sum_is_the_weighted_mean(seed: int, weights: list[int]) -> None:
    model = a_model(seed)
    updates = [(changes(model, seed + 1 + i), weight) for i, weight in enumerate(weights)]
    new = summed(model, updates, rate=0.5)
    for name, values in model.items():
        mean = sum(w * u[name].astype(np.float64) for u, w in updates) / sum(weights)
        exact = values.astype(np.float64) + 0.5 * mean
        assert new[name].dtype == values.dtype
        if values.dtype.kind == "i":
            assert np.abs(new[name] - exact).max() <= 0.5 + 1e-6
        else:
            rounding = np.abs(exact) * np.finfo(values.dtype).eps
            assert (np.abs(new[name] - exact) <= rounding + 1e-6).all()


def test_the_error_of_a_realistic_sum_is_tiny() -> None:
    """Measured against float64: a hundred participants of some hundred examples each."""
    rng = np.random.default_rng(7)
    model = {"w": rng.normal(size=5000)}
    total = FixedPointSum(1 << 20, 1 << 28)
    total.start(model)
    updates = [(rng.normal(scale=0.1, size=5000), int(rng.integers(100, 1000))) for _ in range(100)]
    for delta, weight in updates:
        total.add({"w": delta}, weight)
    mean = sum(w * d for d, w in updates) / sum(w for _, w in updates)
    assert np.abs(total.step(model, 1.0)["w"] - (model["w"] + mean)).mean() < 1e-9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1025.0])
@pytest.mark.parametrize("name", ["w", "half"])
def test_a_value_that_cannot_be_summed_leaves_no_trace(name: str, value: float) -> None:
    model, good = {n: np.zeros(100, d) for n, d in (("half", np.float16), ("w", np.float32))}, {}
    for tensor, values in model.items():
        good[tensor] = np.ones_like(values)
    with np.errstate(over="ignore"):
        bad = {n: v.copy() for n, v in good.items()}
        bad[name][-1] = value
    total = FixedPointSum(MOST, CAP)
    total.start(model)
    total.add(good, 3)
    with pytest.raises(BadMessage, match=f"tensor '{name}' has values that are not finite or beyond"):
        total.add(bad, 3)
    assert total.weight == 3
    assert encode(total.step(model, 1.0)) == encode(good)


def test_an_integer_out_of_bounds_is_refused() -> None:
    total = FixedPointSum(MOST, CAP)
    total.start({"steps": np.zeros(2, np.int64)})
    with pytest.raises(BadMessage, match="'steps'"):
        total.add({"steps": np.array([0, np.iinfo(np.int64).min])}, 1)


def test_values_at_the_bound_and_the_largest_weights_fit_exactly() -> None:
    """Nothing overflows at the limits: the mean of equal values is that value."""
    model = {"w": np.zeros(3), "large": np.array([1e5])}
    total = FixedPointSum(MOST, CAP)
    total.start(model)
    most = {"w": np.array([1024.0, -1024.0, 0.1]), "large": np.array([16 * 1e5])}
    while total.weight + MOST <= CAP:
        total.add(most, MOST)
    moved = total.step(model, 1.0)
    assert (moved["w"] == [1024.0, -1024.0, pytest.approx(0.1, abs=1e-8)]).all()
    assert moved["large"] == pytest.approx(17 * 1e5)


@pytest.mark.parametrize("weight", [0, -1, MOST + 1])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    total = FixedPointSum(MOST, CAP)
    total.start({"w": np.zeros(1)})
    with pytest.raises(BadMessage, match="does not fit"):
        total.add({"w": np.ones(1)}, weight)


def test_weights_beyond_the_cap_are_refused_and_leave_no_trace() -> None:
    total = FixedPointSum(MOST, 2 * MOST)
    total.start({"w": np.zeros(1)})
    for _ in range(2):
        total.add({"w": np.ones(1)}, MOST)
    with pytest.raises(BadMessage, match="does not fit: 2000 of at most 2000"):
        total.add({"w": np.full(1, 99.0)}, 1)
    assert total.step({"w": np.zeros(1)}, 1.0)["w"] == 1.0


def test_integers_are_rounded_to_the_nearest() -> None:
    model = {"steps": np.array([10, 10, -10])}
    updates = [({"steps": np.array([1, 2, -1])}, 2), ({"steps": np.array([0, 0, 0])}, 1)]
    assert summed(model, updates)["steps"].tolist() == [11, 11, -11]


def test_accumulators_are_allocated_once_and_begin_at_zero() -> None:
    model = a_model()
    total = FixedPointSum(MOST, CAP)
    total.start(model)
    before = {name: id(values) for name, values in total._sums.items()}
    total.add(changes(model, 1), 5)
    total.start(model)
    total.add(changes(model, 2), 5)
    assert {name: id(values) for name, values in total._sums.items()} == before
    assert encode(total.step(model, 1.0)) == encode(summed(model, [(changes(model, 2), 5)]))


def test_another_model_gets_other_accumulators() -> None:
    total = FixedPointSum(MOST, CAP)
    total.start({"w": np.zeros(3)})
    total.start({"v": np.zeros(4)})
    total.add({"v": np.ones(4)}, 1)
    assert total.step({"v": np.zeros(4)}, 1.0)["v"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_model_that_diverged_ends_the_run_in_words(value: float) -> None:
    with pytest.raises(StateError, match="tensor 'w'"):
        FixedPointSum(MOST, CAP).start({"w": np.array([0.0, value])})


@pytest.mark.parametrize("dtype", ["bool", "uint8"])
def test_a_model_with_values_that_have_no_mean_is_refused_in_words(dtype: str) -> None:
    with pytest.raises(
        StateError, match=f"tensor 'mask' has dtype {dtype}, which cannot be averaged: leave it out"
    ):
        FixedPointSum(MOST, CAP).start({"mask": np.ones(3, dtype)})


# -- the strategies in closed form --------------------------------------------------------------------------------


def test_fedavg_is_the_mean_of_the_models_weighted_by_examples() -> None:
    """McMahan et al., Algorithm 1: w <- sum_k n_k/n w_k."""
    base, one, two = ({"w": np.array(v, np.float32)} for v in ([1.0, 2.0], [3.0, 0.0], [5.0, 8.0]))
    fedavg = FedAvg(FixedPointSum(MOST, CAP), 1.0)
    fedavg.start(base, {})
    for local, examples in ((one, 30), (two, 10)):
        fedavg.add({"w": local["w"] - base["w"]}, Contribution(examples, "p"))
    assert fedavg.finish()["w"].tolist() == [3.5, 2.0]
    fedavg.finish(base)
    assert base["w"].tolist() == [3.5, 2.0], "it may take the place of the old one"


def test_the_servers_step_size_scales_the_mean_change() -> None:
    fedavg = FedAvg(FixedPointSum(MOST, CAP), 0.5)
    fedavg.start({"w": np.array([1.0])}, {})
    fedavg.add({"w": np.array([4.0])}, Contribution(7, "p"))
    assert fedavg.finish()["w"].tolist() == [3.0]


def test_fedsgd_with_full_batches_is_gradient_descent_on_the_pooled_data() -> None:
    """Least squares, step by step, on three shards of unequal size."""
    rng = np.random.default_rng(3)
    x, y, rate = rng.normal(size=(60, 4)), rng.normal(size=60), 0.1
    shards = [slice(0, 10), slice(10, 25), slice(25, 60)]
    fedsgd = FedSGD(FixedPointSum(MOST, CAP), rate)
    federated, central = {"w": np.zeros(4)}, np.zeros(4)
    for _ in range(20):
        fedsgd.start(federated, {})
        for shard in shards:
            gradient = 2 * x[shard].T @ (x[shard] @ federated["w"] - y[shard]) / len(x[shard])
            fedsgd.add({"w": gradient}, Contribution(len(x[shard]), "p"))
        federated = fedsgd.finish()
        central = central - rate * 2 * x.T @ (x @ central - y) / len(x)
        assert federated["w"] == pytest.approx(central, abs=1e-7)


def test_strategies_are_made_by_name_with_room_for_every_update_and_late_ones() -> None:
    rounds = RoundSettings(participants=10, max_examples=100)
    fedsgd = make_strategy(StrategySettings(name="fedsgd"), rounds)
    assert fedsgd.wants == "gradient"
    fedsgd.start({"w": np.zeros(1)}, {})
    for _ in range(2 * rounds.most_asked):
        fedsgd.add({"w": np.ones(1)}, Contribution(100, "p"))
    with pytest.raises(ConfigError, match="did you mean 'fedavg'"):
        make_strategy(StrategySettings(name="fedavgg"), rounds)
