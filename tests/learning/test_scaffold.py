"""SCAFFOLD, both halves together, against the paper's Algorithm 1 (Option II) computed anew here in float64; and
each mistake that others made, caught.

What participants send goes through a real update's bytes, and c_i and c go as bytes from round to round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies import check_training, make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.scaffold import Scaffold
from aggregator.sums import FixedPointSum
from broker import tensors
from broker.codecs import packing
from broker.errors import BadMessage, ConfigError, StateError, TaskError
from broker.messages import TrainRound, Where
from broker.tensors import Arrays, Named
from broker.travelling import beside, controls_in, named_controls
from workers import control
from workers.own import Own, own_of
from workers.task import Evaluation, TrainConfig, TrainResult
from workers.trainer import Errand, carry_out, train_config

Vector = NDArray[np.float64]
N, ETA_L, ETA_G = 3, 0.05, 0.8
POINTS: Mapping[str, Vector] = {
    name: np.array(point) for name, point in {"p1": [1.0, -2, 4], "p2": [0, 3, 1], "p3": [-4, 1, 2.0]}.items()
}
CURVES = {"p1": 1.0, "p2": 3.0, "p3": 0.4}
EXAMPLES = {"p1": 90, "p2": 5, "p3": 30}
START = np.array([5.0, 5, 5])
ROUNDS: Sequence[Mapping[str, int]] = [  # who answers, and with how many steps
    {"p1": 4, "p2": 7, "p3": 2},
    {"p1": 3, "p3": 5},
    {"p2": 4},
    {"p1": 4, "p2": 4, "p3": 4},
]


def rate_of(step: int) -> float:
    """Step sizes fall within a round, so K times one of them would be wrong."""
    return ETA_L / (1 + 0.2 * step)


@dataclass
class Quadratic:
    """F(y) = curve / 2 ||y - point||^2, and a running mean that no gradient moves."""

    participant: str
    steps: int = 0
    name: str = "quadratic"
    rates: list[float] = field(default_factory=list)

    @property
    def num_examples(self) -> int:
        return EXAMPLES[self.participant]

    def initial(self) -> Arrays:
        return {"y": START.copy(), "running_mean": np.zeros(1), "n": np.array(0)}

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        y, self.rates = arrays["y"].copy(), [rate_of(k) for k in range(self.steps)]
        for rate in self.rates:
            y -= rate * (CURVES[self.participant] * (y - POINTS[self.participant]) + config.correction["y"])
        moved = {"y": y, "running_mean": arrays["running_mean"] + 1, "n": arrays["n"] + 1}
        return TrainResult(moved, self.num_examples, step_sum=self.told(), buffers=frozenset({"running_mean"}))

    def told(self) -> float:
        return sum(self.rates)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({"loss": 0.0}, 1)


def paper(rounds: Sequence[Mapping[str, int]] = ROUNDS, damped: Mapping[str, float] | None = None) -> list[Vector]:
    """x after each round."""
    x, c, own, found = START.copy(), np.zeros(3), {name: np.zeros(3) for name in POINTS}, []
    for round_ in rounds:
        delta_y, delta_c = np.zeros(3), np.zeros(3)
        for name, steps in round_.items():
            y = x.copy()
            for k in range(steps):
                y = y - rate_of(k) * (CURVES[name] * (y - POINTS[name]) - own[name] + c)
            new = own[name] - c + (x - y) / sum(rate_of(k) for k in range(steps))
            delta_y += (damped or {}).get(name, 1.0) * (y - x) / len(round_)
            delta_c += (new - own[name]) / N
            own[name] = new
        x, c = x + ETA_G * delta_y, c + delta_c
        found.append(x)
    return found


def total() -> FixedPointSum:
    return FixedPointSum(1, 64)


CHOSEN = StrategySettings(name="scaffold", server_lr=ETA_G, buffers="running_mean")


def order(number: int, model: bytes, **more: Any) -> TrainRound:
    fields: dict[str, Any] = {
        "run_id": "run-1", "epoch": 1, "seq": 1, "task": number, "round": number, "attempt": 1, "work": "train",
        "asked": tuple(POINTS), "version": number - 1, "wants": "delta+control",
        "model": Where(size_bytes=len(model), sha256="0" * 64), **more,
    }  # fmt: skip
    return TrainRound(**fields)


@dataclass
class World:
    """The aggregator's strategy, and what each participant keeps."""

    strategy: Any = field(default_factory=lambda: make_strategy(CHOSEN, RoundSettings(participants=N)))
    make: Callable[[str, int], Quadratic] = Quadratic
    codec: str = "none"
    damped: Mapping[str, float] = field(default_factory=dict)
    kept: dict[str, Arrays] = field(default_factory=dict)
    state: bytes = tensors.encode({})

    def run(self, rounds: Sequence[Mapping[str, int]] = ROUNDS) -> list[Arrays]:
        model, found = tensors.encode(Quadratic("p1").initial()), []
        for number, round_ in enumerate(rounds, 1):
            self.strategy.start(tensors.decode(model), tensors.decode(self.state))
            for name, steps in round_.items():
                self.strategy.add(*self.sent(name, steps, order(number, model), model))
            moved = self.strategy.finish()
            model, self.state = tensors.encode(moved), tensors.encode(self.strategy.state)
            found.append(moved)
        return found

    def sent(self, name: str, steps: int, told: TrainRound, model: bytes) -> tuple[Named, Contribution]:
        base = tensors.decode(model)
        own = own_of(told, self.kept.get(name, {}), base, server=tensors.decode(self.state))
        errand = Errand(told, model, name, packing(self.codec), own=own)
        finished = carry_out(self.make(name, steps), errand, train_config(told, name, lambda: False))
        assert finished.own
        self.kept[name] = tensors.decode(finished.own.blob)
        arrays, with_it = packing(self.codec).unpack_both(finished.held.blob, base, beside(base, told.wants))
        by = Contribution(EXAMPLES[name], name, damping=self.damped.get(name, 1.0), control=controls_in(with_it))
        return arrays, by


def check(world: World, expected: Sequence[Vector] | None = None) -> None:
    found = world.run()
    for model, wanted in zip(found, expected or paper(), strict=True):
        np.testing.assert_allclose(model["y"], wanted, rtol=1e-8, atol=1e-8)
    if not world.damped:
        assert found[-1]["running_mean"] == len(ROUNDS), "buffers are averaged, whatever server_lr"
        assert found[-1]["n"] == len(ROUNDS)
    assert not controls_in(tensors.decode(world.state))["running_mean"].any()


def test_it_does_what_the_paper_says() -> None:
    check(World())


def test_with_all_of_them_the_server_holds_the_mean_of_all_control_variates() -> None:
    world = World()
    world.run([dict.fromkeys(POINTS, steps) for steps in (4, 2, 7)])
    mean = np.mean([controls_in(kept)["y"] for kept in world.kept.values()], axis=0)
    np.testing.assert_allclose(controls_in(tensors.decode(world.state))["y"], mean, atol=1e-9)


def test_it_comes_to_the_optimum_where_fedavg_stays_away() -> None:
    """Theorem III: whatever the clients' data. With eta_g 1 and many rounds."""
    optimum = sum(CURVES[n] * POINTS[n] for n in POINTS) / sum(CURVES.values())
    found = World().run([dict.fromkeys(POINTS, 8)] * 150)[-1]["y"]
    np.testing.assert_allclose(found, optimum, atol=1e-4)
    x = START.copy()
    for _ in range(150):
        ends = []
        for name in POINTS:
            y = x.copy()
            for k in range(8):
                y -= rate_of(k) * CURVES[name] * (y - POINTS[name])
            ends.append(y)
        x = np.mean(ends, axis=0)
    assert np.abs(x - optimum).max() > 0.1


@pytest.mark.parametrize("codec", ["int8", "topk:0.1", "fp16+zstd"])
def test_control_variates_travel_whole_whatever_the_codec(codec: str) -> None:
    """So does a model as small as this one, in most codecs: what is looked at is c."""
    plain, coded = World(), World(codec=codec)
    plain.run(ROUNDS[:1])
    coded.run(ROUNDS[:1])
    assert coded.state == plain.state


def test_a_stale_update_is_damped_and_its_control_variate_is_not() -> None:
    damped = {"p2": 0.5}
    check(World(damped=damped), paper(damped=damped))
    scaled = patched_add(lambda by: replace(by, control={n: v * by.damping for n, v in by.control.items()}))
    with pytest.raises(AssertionError):
        check(World(scaled, damped=damped), paper(damped=damped))


# -- mistakes that others made ------------------------------------------------------------------------------------


def patched_add(change: Callable[[Contribution], Contribution]) -> Scaffold:
    class Patched(Scaffold):
        def add(self, arrays: Named, by: Contribution) -> None:
            super().add(arrays, change(by))

    return Patched(N, total(), CHOSEN)


class BySize(Scaffold):
    """Divides the sum of Delta c by |S|."""

    def finish(self, out: Arrays | None = None) -> Arrays:
        self._participants = self._control_sum.weight
        return super().finish(out)


class WeighsY(Scaffold):
    """Delta y by examples, Delta c not."""

    def __init__(self) -> None:
        super().__init__(N, FixedPointSum(1000, 1 << 16), CHOSEN)

    def add(self, arrays: Named, by: Contribution) -> None:
        self._sum.add(arrays, by.weight, by.damping)
        self._control_sum.add(by.control, 1)


class ByExamples(Quadratic):
    def told(self) -> float:
        return ETA_L * self.num_examples


class ByEpochs(Quadratic):
    def told(self) -> float:
        return ETA_L * 1


class ByFirstRate(Quadratic):
    def told(self) -> float:
        return ETA_L * self.steps


_change = control.change


def own_variate(self: Own, base: Arrays, start: Arrays, result: TrainResult) -> Arrays:
    """c_i+ itself, not its change."""
    server = self._server(base)
    new = {n: v + self._control(server)[n] for n, v in _change(start, result, server).items()}
    return named_controls(new)


MISTAKES: dict[str, tuple[str, Any] | Callable[[], World]] = {
    "sign of the correction": ("workers.control.correction", lambda c, own: {n: own[n] - c[n] for n in c}),
    "c forgotten in the correction": ("workers.control.correction", lambda c, own: {n: -own[n] for n in c}),
    "no correction": ("workers.control.correction", lambda c, own: {n: 0 * c[n] for n in c}),
    "c_i is sent and not its change": ("workers.own.Own.beside", own_variate),
    "c_i is overwritten before the difference": (
        "workers.control.change",
        lambda start, result, server: {n: np.zeros_like(c) for n, c in server.items()},
    ),
    "(y - x) for (x - y)": (
        "workers.control.change",
        lambda start, result, c: {n: -v - 2 * c[n] for n, v in _change(start, result, c).items()},
    ),
    "random c at first": (
        "workers.own.zero_controls",
        lambda model: {n: np.full(v.shape, 0.3) for n, v in model.items() if v.dtype.kind == "f"},
    ),
    "buffers have control variates": (
        "workers.control.change",
        lambda start, result, server: _change(start, replace(result, buffers=frozenset()), server),
    ),
    "c_i is lost at each restart": ("workers.own.Own._control", lambda self, server: server),
    "divided by |S|": lambda: World(BySize(N, total(), CHOSEN)),
    "Delta y is weighted, Delta c not": lambda: World(WeighsY()),
    "K is the number of examples": lambda: World(make=ByExamples),
    "K is the number of epochs": lambda: World(make=ByEpochs),
    "K times the first step size": lambda: World(make=ByFirstRate),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = MISTAKES[mistake]
    if isinstance(broken, tuple):
        monkeypatch.setattr(*broken)
        broken = World
    with pytest.raises(AssertionError):
        check(broken())


def test_the_copies_are_right_but_for_their_mistakes() -> None:
    check(World(patched_add(lambda by: by)))
    check(World(Scaffold(N, total(), CHOSEN)))


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "why"),
    [({"momentum": 0.9}, "train.momentum"), ({"mu": 0.1}, "train.mu"), ({"optimiser": "adamw"}, "adamw")],
)
def test_only_plain_gradient_descent_fits(train: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"scaffold.*{why}"):
        check_training("scaffold", train, RoundSettings())
    check_training("scaffold", {"momentum": 0.0, "mu": 0, "lr": 0.3, "optimiser": "sgd"}, RoundSettings())
    check_training("fedavg", train, RoundSettings())


def test_clipping_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="clip_norm"):
        make_strategy(CHOSEN.model_copy(update={"clip_norm": 1.0}), RoundSettings(participants=N))


class Silent(Quadratic):
    def told(self) -> float:
        return 0.0


def test_a_task_that_tells_no_steps_is_told_the_remedy() -> None:
    with pytest.raises(TaskError, match=r"set TrainResult\.step_sum"):
        World(make=Silent).run()


def started() -> tuple[Any, Arrays]:
    strategy = World().strategy
    model = Quadratic("p1").initial()
    strategy.start(model, {})
    return strategy, {name: np.zeros_like(values) for name, values in model.items()}


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("y", np.full(3, np.nan), "not finite"),
        ("y", np.full(3, -1e6), "beyond"),
        ("other", np.zeros(3), "no control"),
    ],
)
def test_a_bad_control_variate_is_refused_and_leaves_no_trace(name: str, values: Vector, why: str) -> None:
    strategy, zero = started()
    good = {"y": np.ones(3), "running_mean": np.zeros(1)}
    strategy.add({**zero, "y": np.ones(3)}, Contribution(1, "a", control=good))
    with pytest.raises(BadMessage, match=why):
        strategy.add({**zero, "y": np.ones(3)}, Contribution(1, "b", control={**good, name: values}))
    with pytest.raises(BadMessage, match="not finite"):
        strategy.add({**zero, "y": np.full(3, np.inf)}, Contribution(1, "b", control=good))
    np.testing.assert_allclose(strategy.finish()["y"], START + ETA_G)
    np.testing.assert_allclose(controls_in(strategy.state)["y"], 1 / N)


def test_the_scale_of_c_is_its_own() -> None:
    """A model of large values does not coarsen it: 1e-9 is not lost beside 1e9."""
    strategy = Scaffold(1, total(), CHOSEN)
    model = {"y": np.full(3, 1e9)}
    strategy.start(model, {})
    strategy.add({"y": np.zeros(3)}, Contribution(1, "a", control={"y": np.full(3, 1e-9)}))
    strategy.finish()
    np.testing.assert_allclose(controls_in(strategy.state)["y"], 1e-9, rtol=1e-3)


def test_anothers_state_is_refused_and_its_own_is_overwritten_in_place() -> None:
    strategy, zero = started()
    with pytest.raises(StateError, match="begin again with --fresh"):
        strategy.start(Quadratic("p1").initial(), {"m/y": np.zeros(3)})
    state = {"control/y": np.zeros(3), "control/running_mean": np.zeros(1)}
    strategy.start(Quadratic("p1").initial(), state)
    strategy.add(zero, Contribution(1, "a", control={"y": np.full(3, 3.0), "running_mean": np.zeros(1)}))
    strategy.finish()
    assert strategy.state is state
    assert state["control/y"].tolist() == [1, 1, 1]
    with pytest.raises(StateError, match="shorter name"):
        strategy.start({"x" * 195: np.zeros(1)}, {})


def test_who_lost_its_control_variate_begins_with_the_servers() -> None:
    told, model = order(2, b""), Quadratic("p1").initial()
    server = {"control/y": np.array([1.0, 2, 3]), "control/running_mean": np.zeros(1)}
    for lost, expected in ((True, [0, 0, 0]), (False, [1, 2, 3])):
        config = own_of(told, {}, model, lost=lost, server=server).config(model, TrainConfig(2, 0))
        assert config.correction["y"].tolist() == expected
    with pytest.raises(BadMessage, match="shape"):
        own_of(told, {"control/y": np.zeros(4), "control/running_mean": np.zeros(1)}, model, server=server)
