"""Each strategy against its paper, computed anew here in float64; and each mistake that others made, caught.

Rounds are given as what participants sent, so that a strategy can be followed over several of them by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies import STRATEGIES, Strategy, make_strategy
from aggregator.strategies.adaptive import adam, yogi
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.fednova import FedNova
from aggregator.strategies.optimiser import Block, ServerOptimiser
from aggregator.sums import FixedPointSum
from broker import tensors
from broker.errors import BadMessage, ConfigError, StateError
from broker.tensors import Arrays, Named

MOST, CAP = 1000, 1 << 16
ETA = 0.03  # of fedadam and fedyogi, by default
BUFFERS = frozenset({"*.running_var"})
Vector = NDArray[np.float64]


class Sent(NamedTuple):
    """What one participant sent in a round: its change of each tensor, its examples, its effective steps."""

    arrays: Arrays
    examples: int
    steps: float


def model() -> Arrays:
    return {
        "w": np.array([1.0, -2.0, 0.5, 3.0]),
        "bn.running_var": np.array([0.9, 1.1], np.float32),
        "bn.num_batches_tracked": np.array(5),
    }


def sent(seed: int, examples: int, steps: float) -> Sent:
    """One coordinate of `w` hardly ever moves; the variance's mean change would be far too much for a step."""
    rng = np.random.default_rng(seed)
    w = rng.normal(scale=0.3, size=4) * [1, 1, 1e-4, 1]
    variance = rng.uniform(-0.05, 0.02, 2).astype(np.float32)
    return Sent({"w": w, "bn.running_var": variance, "bn.num_batches_tracked": np.array(7)}, examples, steps)


ROUNDS = [
    [sent(1, 30, 3.0), sent(2, 10, 12.0), sent(3, 60, 6.0)],
    [sent(4, 30, 3.0), sent(5, 10, 1.0)],  # one is missing
    [sent(6, 30, 30.0), sent(7, 10, 2.0), sent(8, 60, 6.0)],
    [sent(9, 60, 5.5)],
]
ROUNDS_OF = RoundSettings(participants=3, max_examples=MOST)


def give(strategy: Strategy, one: Sent) -> None:
    strategy.add(one.arrays, Contribution(one.examples, "p", one.steps))


def after_each_round(strategy: Strategy, rounds: Sequence[Sequence[Sent]] = ROUNDS) -> list[Arrays]:
    """The model after each round; state goes as bytes from one to the next, as in the head record."""
    current, state, models = model(), tensors.encode({}), []
    for round_ in rounds:
        strategy.start(current, tensors.decode(state))
        for one in round_:
            give(strategy, one)
        current = strategy.finish()
        state = tensors.encode(strategy.state)
        models.append(current)
    return models


def means(round_: Sequence[Sent], name: str) -> Vector:
    """sum_i n_i Delta_i / sum_i n_i over those who answered."""
    total = sum(s.examples for s in round_)
    return sum((s.examples / total * s.arrays[name].astype(np.float64) for s in round_), np.zeros(1))


# -- the papers, in a few lines each ------------------------------------------------------------------------------


def fedavg(eta: float = 1.0) -> list[Vector]:
    x, out = model()["w"], []
    for round_ in ROUNDS:
        x = x + eta * means(round_, "w")
        out.append(x)
    return out


def fedavgm(eta: float = 1.0, beta: float = 0.9) -> list[Vector]:
    x, v, out = model()["w"], np.zeros(4), []
    for round_ in ROUNDS:
        v = beta * v + means(round_, "w")
        x = x + eta * v
        out.append(x)
    return out


def diloco(lr: float = 0.7, mu: float = 0.9) -> list[Vector]:
    """In torch's words: SGD(lr, momentum=mu, nesterov=True) on the gradient x - mean of w."""
    x, v, out = model()["w"], np.zeros(4), []
    for round_ in ROUNDS:
        outer = -means(round_, "w")
        v = mu * v + outer
        x = x - lr * (outer + mu * v)
        out.append(x)
    return out


def adaptive(kind: str, eta: float = 0.03, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3) -> list[Vector]:
    """Algorithm 2, value by value."""
    x, m, v, out = model()["w"], np.zeros(4), np.full(4, tau**2), []
    for round_ in ROUNDS:
        d, x = means(round_, "w"), x.copy()
        for j in range(4):
            m[j] = b1 * m[j] + (1 - b1) * d[j]
            if kind == "fedadagrad":
                v[j] = v[j] + d[j] ** 2
            elif kind == "fedadam":
                v[j] = b2 * v[j] + (1 - b2) * d[j] ** 2
            elif v[j] > d[j] ** 2:
                v[j] = v[j] - (1 - b2) * d[j] ** 2
            else:
                v[j] = v[j] + (1 - b2) * d[j] ** 2
            x[j] += eta * m[j] / (v[j] ** 0.5 + tau)
        out.append(x)
    return out


def fednova(eta: float = 1.0) -> list[Vector]:
    """With d_i = (x - w_i) / a_i: x - tau_eff eta sum_i p_i d_i."""
    x, out = model()["w"], []
    for round_ in ROUNDS:
        p = np.array([s.examples for s in round_]) / sum(s.examples for s in round_)
        a = np.array([s.steps for s in round_])
        d = np.stack([-s.arrays["w"] / s.steps for s in round_])
        x = x - (p @ a) * eta * (p @ d)
        out.append(x)
    return out


EXPECTED: dict[str, list[Vector]] = {
    "fedavg": fedavg(),
    "fedsgd": fedavg(-1.0),
    "fedavgm": fedavgm(),
    "fedadagrad": adaptive("fedadagrad", 0.1),
    "fedadam": adaptive("fedadam"),
    "fedyogi": adaptive("fedyogi"),
    "fednova": fednova(),
    "diloco": diloco(),
}


def check(strategy: Strategy, expected: Sequence[Vector]) -> None:
    """Parameters follow the paper; buffers and integers are the participants' mean, whatever the strategy."""
    variance, count = model()["bn.running_var"].astype(np.float64), 5
    for found, wanted, round_ in zip(after_each_round(strategy), expected, ROUNDS, strict=True):
        np.testing.assert_allclose(found["w"], wanted, rtol=1e-6, atol=1e-7)
        variance = variance + means(round_, "bn.running_var")
        np.testing.assert_allclose(found["bn.running_var"], variance, rtol=1e-6)
        count += 7
        assert found["bn.num_batches_tracked"] == count


def named(name: str, **chosen: Any) -> Strategy:
    return make_strategy(StrategySettings(name=name, **chosen), ROUNDS_OF)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_strategy_does_what_its_paper_says(name: str) -> None:
    check(named(name), EXPECTED[name])


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"name": "fedavgm", "server_lr": 0.3, "momentum": 0.5}, fedavgm(0.3, 0.5)),
        ({"name": "diloco", "server_lr": 0.3, "momentum": 0.5}, diloco(0.3, 0.5)),
        ({"name": "fednova", "server_lr": 0.3}, fednova(0.3)),
        (
            {"name": "fedyogi", "server_lr": 0.3, "beta_1": 0.5, "beta_2": 0.6, "tau": 0.1},
            adaptive("fedyogi", 0.3, 0.5, 0.6, 0.1),
        ),
    ],
    ids=lambda chosen: chosen["name"] if isinstance(chosen, dict) else "",
)
def test_settings_are_the_papers(chosen: dict[str, Any], expected: list[Vector]) -> None:
    check(make_strategy(StrategySettings(**chosen), ROUNDS_OF), expected)


# -- mistakes that others made ------------------------------------------------------------------------------------


@dataclass
class Wrong:
    """A rule with a mistake: `by(rule, d, *moments)` gives the step."""

    by: Callable[..., Block]
    first: Mapping[str, float] = field(default_factory=lambda: {"m": 0.0, "v": 1e-6})
    rounds: int = 0

    @property
    def moments(self) -> Mapping[str, float]:
        return self.first

    def step(self, change: Block, *moments: Block) -> Block:
        self.rounds += 1
        return self.by(self, change, *moments)


def adam_step(
    change: Block, m: Block, v: Block, next_v: Callable[[Block, Block, float], Block] = adam, tau: float = 1e-3
) -> Block:
    m[...] = 0.9 * m + 0.1 * change
    v[...] = next_v(v, change**2, 0.99)
    return ETA * m / (np.sqrt(np.abs(v)) + tau)


def bias_corrected(rule: Wrong, d: Block, m: Block, v: Block) -> Block:
    adam_step(d, m, v)
    m_hat, v_hat = m / (1 - 0.9**rule.rounds), v / (1 - 0.99**rule.rounds)
    return ETA * m_hat / (np.sqrt(v_hat) + 1e-3)


def v_of_m(_: Wrong, d: Block, m: Block, v: Block) -> Block:
    m[...] = 0.9 * m + 0.1 * d
    v[...] = adam(v, m**2, 0.99)
    return ETA * m / (np.sqrt(v) + 1e-3)


def d_in_the_step(_: Wrong, d: Block, m: Block, v: Block) -> Block:
    adam_step(d, m, v)
    return ETA * d / (np.sqrt(v) + 1e-3)


def tau_within_the_root(_: Wrong, d: Block, m: Block, v: Block) -> Block:
    adam_step(d, m, v)
    return ETA * m / np.sqrt(v + 1e-3)


def wrong_yogi(v: Block, squared: Block, beta_2: float) -> Block:
    return v + (1 - beta_2) * squared * np.sign(v - squared)


def plain_momentum(_: Wrong, d: Block, v: Block) -> Block:
    v[...] = 0.9 * v + d
    return 0.7 * v


def nesterov_with_the_old_v(_: Wrong, d: Block, v: Block) -> Block:
    step = 0.7 * (d + 0.9 * v)
    v[...] = 0.9 * v + d
    return step


def nesterov(sign: int) -> Callable[..., Block]:
    def by(_: Wrong, d: Block, v: Block) -> Block:
        v[...] = 0.9 * v + d
        return sign * 0.7 * (d + 0.9 * v)

    return by


def momentum(keep: float, sign: int = 1) -> Callable[..., Block]:
    def by(_: Wrong, d: Block, v: Block) -> Block:
        v[...] = 0.9 * v + keep * d
        return sign * v

    return by


class Planned(FixedPointSum):
    """Divides by the weight that was asked for, not by that of the answers."""

    def mean(self, name: str, part: slice) -> NDArray[np.float64]:
        return super().mean(name, part) * self.weight / 100


def total() -> FixedPointSum:
    return FixedPointSum(MOST, CAP)


def optimiser(by: Callable[..., Block], *first: float, buffers: frozenset[str] = BUFFERS) -> Strategy:
    names = {f"m{number}": value for number, value in enumerate(first)}
    return ServerOptimiser(total(), Wrong(by, names), buffers)


class Forgets(ServerOptimiser):
    """Begins every round with new moments."""

    def start(self, model: Arrays, state: Arrays) -> None:
        super().start(model, {})


class Nova(FedNova):
    """A copy whose steps, and what they divide, can be told wrong."""

    def __init__(
        self, told: Callable[[float], float], tau_eff: Callable[[Sequence[Sent]], float] | None = None,
        buffers: frozenset[str] = BUFFERS,
    ) -> None:  # fmt: skip
        super().__init__(total(), 1.0, 1000.0, buffers)
        self.told, self.tau, self.number = told, tau_eff, -1

    def start(self, model: Arrays, state: Arrays) -> None:
        super().start(model, state)
        self.number += 1

    def add(self, arrays: Named, by: Contribution) -> None:
        super().add(arrays, replace(by, effective_steps=self.told(by.effective_steps)))

    def finish(self, out: Arrays | None = None) -> Arrays:
        if self.tau is not None:
            self._weighted_steps = [self.tau(ROUNDS[self.number]) * self._sum.weight]
        return super().finish(out)


def right(_: Wrong, d: Block, m: Block, v: Block) -> Block:
    return adam_step(d, m, v)


def unweighted(round_: Sequence[Sent]) -> float:
    return float(np.mean([s.steps for s in round_]))


class OneVoteEach(FedAvg):
    def add(self, arrays: Named, by: Contribution) -> None:
        super().add(arrays, replace(by, weight=1))


class NoCounters(FedAvg):
    """Leaves integers as they were."""

    def finish(self, out: Arrays | None = None) -> Arrays:
        return {**super().finish(out), "bn.num_batches_tracked": self._model["bn.num_batches_tracked"]}


MISTAKES: list[tuple[str, str, Callable[[], Strategy]]] = [
    ("fedavg", "planned cohort", lambda: FedAvg(Planned(MOST, CAP), 1.0)),
    ("fedavg", "not weighted", lambda: OneVoteEach(total(), 1.0)),
    ("fedavg", "integers dropped", lambda: NoCounters(total(), 1.0)),
    ("fedavg", "buffers moved by server_lr", lambda: FedAvg(total(), 2.0)),
    ("fedsgd", "wrong sign", lambda: FedAvg(total(), 1.0)),
    ("fedadam", "bias correction", lambda: optimiser(bias_corrected, 0.0, 1e-6)),
    ("fedadam", "bias correction, v from 0", lambda: optimiser(bias_corrected, 0.0, 0.0)),
    ("fedadam", "v from 0", lambda: optimiser(right, 0.0, 0.0)),
    ("fedadam", "v from m^2", lambda: optimiser(v_of_m, 0.0, 1e-6)),
    ("fedadam", "d instead of m in the step", lambda: optimiser(d_in_the_step, 0.0, 1e-6)),
    ("fedadam", "tau within the root", lambda: optimiser(tau_within_the_root, 0.0, 1e-6)),
    ("fedadam", "tau 1e-8", lambda: named("fedadam", tau=1e-8)),
    ("fedadam", "server_lr 1", lambda: named("fedadam", server_lr=1.0)),
    ("fedadam", "wrong sign", lambda: optimiser(lambda r, d, m, v: -right(r, d, m, v), 0.0, 1e-6)),
    ("fedadam", "buffers in Adam", lambda: optimiser(right, 0.0, 1e-6, buffers=frozenset())),
    ("fedadam", "forgets its moments", lambda: Forgets(total(), Wrong(right), BUFFERS)),
    ("fedadam", "planned cohort", lambda: ServerOptimiser(Planned(MOST, CAP), Wrong(right), BUFFERS)),
    ("fedadam", "Yogi's v", lambda: optimiser(lambda _, *x: adam_step(*x, yogi), 0.0, 1e-6)),
    ("fedyogi", "Adam's v", lambda: optimiser(right, 0.0, 1e-6)),
    ("fedyogi", "sign of v - d^2", lambda: optimiser(lambda _, *x: adam_step(*x, wrong_yogi), 0.0, 1e-6)),
    ("fedadagrad", "forgets old squares", lambda: optimiser(lambda r, *x: 0.1 / ETA * right(r, *x), 0.0, 1e-6)),
    ("fedavgm", "damped momentum", lambda: optimiser(momentum(0.1), 0.0)),
    ("fedavgm", "wrong sign", lambda: optimiser(momentum(1.0, -1), 0.0)),
    ("fedavgm", "Nesterov", lambda: optimiser(nesterov(1), 0.0)),
    ("fedavgm", "no momentum", lambda: named("fedavg")),
    ("diloco", "plain momentum", lambda: optimiser(plain_momentum, 0.0)),
    ("diloco", "the old v", lambda: optimiser(nesterov_with_the_old_v, 0.0)),
    ("diloco", "wrong sign", lambda: optimiser(nesterov(-1), 0.0)),
    ("diloco", "buffers in the outer step", lambda: optimiser(nesterov(1), 0.0, buffers=frozenset())),
    ("fednova", "not normalised", lambda: Nova(lambda a: 1.0)),
    ("fednova", "steps of the first for all", lambda: Nova(lambda a: 3.0)),
    ("fednova", "tau_eff 1", lambda: Nova(lambda a: a, lambda _: 1.0)),
    ("fednova", "tau_eff not weighted", lambda: Nova(lambda a: a, unweighted)),
    ("fednova", "buffers divided by steps", lambda: Nova(lambda a: a, buffers=frozenset())),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [(name, make) for name, _, make in MISTAKES],
    ids=[f"{name}: {mistake}" for name, mistake, _ in MISTAKES],
)
def test_a_mistake_is_caught(name: str, make: Callable[[], Strategy]) -> None:
    with pytest.raises(AssertionError):
        check(make(), EXPECTED[name])


def test_the_copies_are_right_but_for_their_mistakes() -> None:
    check(FedAvg(total(), 1.0), EXPECTED["fedavg"])
    check(optimiser(right, 0.0, 1e-6), EXPECTED["fedadam"])
    check(optimiser(momentum(1.0), 0.0), EXPECTED["fedavgm"])
    check(optimiser(nesterov(1), 0.0), EXPECTED["diloco"])
    check(Nova(lambda a: a), EXPECTED["fednova"])


# -- what all of them promise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
@given(order=st.permutations(range(6)))
@hypothesis_settings(max_examples=20, deadline=None)
def test_any_order_gives_the_same_bits(name: str, order: list[int]) -> None:
    round_ = [sent(i, 10 + 7 * i, 1 + 0.3 * i) for i in range(6)]
    ordered = [[round_[i] for i in order], [round_[i] for i in reversed(order)]]
    straight = [round_, round_]
    rounds = RoundSettings(participants=6, max_examples=MOST)
    first, second = (
        after_each_round(make_strategy(StrategySettings(name=name), rounds), given) for given in (ordered, straight)
    )
    assert [tensors.encode(arrays) for arrays in first] == [tensors.encode(arrays) for arrays in second]


@pytest.mark.parametrize("name", STRATEGIES)
def test_in_place_of_model_and_state_comes_the_same(name: str) -> None:
    expected = after_each_round(named(name))[-1]
    strategy, current, state = named(name), model(), {}
    for number, round_ in enumerate(ROUNDS):
        strategy.start(current, state)
        for one in round_:
            give(strategy, one)
        strategy.finish(current)
        assert number == 0 or not state or strategy.state is state
        state = strategy.state
    assert tensors.encode(current) == tensors.encode(expected)
    assert bool(state) == (name in ("fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco"))


def test_a_state_that_may_not_be_overwritten_is_copied() -> None:
    strategy = named("fedadam")
    after_each_round(strategy)
    kept = tensors.encode(strategy.state)
    strategy.start(model(), tensors.decode(kept))
    give(strategy, ROUNDS[0][0])
    strategy.finish()
    assert tensors.encode(strategy.state) != kept


def test_moments_are_float32_at_least_and_only_those_of_parameters() -> None:
    small = {"half": np.zeros(3, np.float16), "double": np.zeros(3), "count": np.array(0), "mean": np.zeros(3)}
    strategy = named("fedadam", buffers="mean, *running_var")
    strategy.start(small, {})
    strategy.add({name: np.full_like(values, 1) for name, values in small.items()}, Contribution(5, "p"))
    assert strategy.finish()["mean"].tolist() == [1, 1, 1]
    assert {name: array.dtype for name, array in strategy.state.items()} == {
        "m/half": np.float32, "v/half": np.float32, "m/double": np.float64, "v/double": np.float64
    }  # fmt: skip


@pytest.mark.parametrize("state", ["m", "other", "shape"])
def test_another_strategys_state_is_refused_with_the_remedy(state: str) -> None:
    strategy = named("fedadam")
    after_each_round(strategy)
    foreign = dict(strategy.state)
    if state == "m":
        del foreign["v/w"]
    elif state == "other":
        foreign["momentum/w"] = np.zeros(4)
    else:
        foreign["v/w"] = np.zeros(5)
    with pytest.raises(StateError, match=r"is another one's .* strategy.name .* --fresh"):
        strategy.start(model(), foreign)
    with pytest.raises(StateError, match="needs a shorter name"):
        strategy.start({"x" * 199: np.zeros(1)}, {})


def test_a_large_server_lr_moves_no_buffer_of_fedavg() -> None:
    """A variance would become negative, and its root not a number."""
    found = after_each_round(named("fedavg", server_lr=50.0))[0]
    mean = model()["bn.running_var"] + means(ROUNDS[0], "bn.running_var")
    np.testing.assert_allclose(found["bn.running_var"], mean, rtol=1e-6)
    assert found["w"][0] == pytest.approx(1.0 + 50 * means(ROUNDS[0], "w")[0], abs=1e-4)


@pytest.mark.parametrize("steps", [0.0, 0.5, 1001.0, float("inf"), float("nan")])
def test_fednova_refuses_steps_that_nobody_can_have_made(steps: float) -> None:
    strategy = named("fednova", steps_max=1000.0)
    strategy.start(model(), {})
    with pytest.raises(BadMessage, match=r"fednova takes 1 to 1000: .*TrainResult.effective_steps"):
        give(strategy, ROUNDS[0][0]._replace(steps=steps))
    good = ROUNDS[0][1]
    give(strategy, good)
    np.testing.assert_allclose(strategy.finish()["w"], model()["w"] + good.arrays["w"], atol=1e-6)


def test_fednova_comes_to_the_joint_optimum_where_fedavg_follows_the_busiest() -> None:
    """Wang et al., figure 2: quadratics with other numbers of local steps."""
    targets, steps, rate = np.array([0.0, 10.0]), [2, 40], 0.01

    def end_of(name: str) -> float:
        strategy, x, state = named(name), {"w": np.array([3.0])}, {}
        for _ in range(400):
            strategy.start(x, state)
            for target, k in zip(targets, steps, strict=True):
                give(strategy, Sent({"w": (1 - (1 - rate) ** k) * (target - x["w"])}, 10, float(k)))
            x = strategy.finish()
        return float(x["w"][0])

    assert end_of("fednova") == pytest.approx(5.0, abs=0.6)
    assert end_of("fedavg") > 9.0


def test_settings_that_cannot_work_name_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"'fedprox' is how participants train: set strategy.name = 'fedavg' with train"
    ):
        named("fedprox")
    with pytest.raises(ConfigError, match="did you mean 'fedadam'"):
        named("fedadan")
    for wrong in ({"beta_1": 1.0}, {"beta_2": -0.1}, {"tau": 0.0}, {"momentum": 1.0}, {"steps_max": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StrategySettings(**wrong)
