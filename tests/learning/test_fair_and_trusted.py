"""q-FedAvg and FLTrust against their papers, computed anew value by value; label flipping; and mistakes, caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.daemon import Aggregator
from aggregator.job import Job
from aggregator.settings import RoundSettings, RunSettings, StrategySettings
from aggregator.strategies import Strategy, make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.fltrust import trusted
from aggregator.strategies.qfedavg import fair_weights
from broker.errors import BadMessage, ConfigError, StateError
from broker.memory import MemoryBroker
from broker.messages import Scalar
from broker.tensors import Arrays, encode
from broker.topology import AGGREGATOR, Topology
from fluffle import simulate
from fluffle.chaos.task import Pull
from tests.federation import Federation, names, settings
from workers.attack import attacking
from workers.task import TrainConfig
from workers.tasks import find_task
from workers.torch_task import TorchTask
from workers.worker import always

Vector = NDArray[np.float64]
MODEL: Arrays = {
    "a": np.array([1.0, 2]),
    "b": np.array([3.0]),
    "bn.running_mean": np.array([0.5]),
    "n": np.array(7),
}
ROUND = RoundSettings(participants=4)
LOSSES = (0.2, 1.5, 0.9, 3.0)


def updates(seed: int = 1) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [
        {
            "a": rng.normal(size=2),
            "b": rng.normal(size=1),
            "bn.running_mean": rng.normal(size=1) * 9,
            "n": np.array(i),
        }
        for i in range(4)
    ]


def vector(arrays: Arrays) -> Vector:
    return np.concatenate([arrays["a"], arrays["b"]])


def moved(made: Strategy, given: list[tuple[str, Arrays]], losses: tuple[float, ...] = LOSSES) -> Arrays:
    made.start(MODEL, {})
    for number, (name, arrays) in enumerate(given):
        loss = losses[number % len(losses)]
        made.add(arrays, Contribution(1 + 100 * number, name, start_loss=loss))
    return made.finish()


# -- q-FedAvg -----------------------------------------------------------------------------------------------------


def fair(q: float, lipschitz: float, **more: Any) -> Strategy:
    return make_strategy(StrategySettings(name="q-fedavg", q=q, lipschitz=lipschitz, **more), ROUND)


def by_paper(deltas: list[Vector], losses: tuple[float, ...], q: float, lipschitz: float) -> Vector:
    """Algorithm 2, with w^t - w-bar = -Delta."""
    top, bottom = np.zeros(3), 0.0
    for delta, loss in zip(deltas, losses, strict=True):
        change = lipschitz * -delta
        top += loss**q * change
        bottom += q * loss ** (q - 1) * math.fsum(change**2) + lipschitz * loss**q
    return vector(MODEL) - top / bottom


def check_fair() -> None:
    given = updates()
    for q, lipschitz in ((0.0, 10.0), (0.5, 2.0), (1.0, 10.0), (5.0, 0.7)):
        found = moved(fair(q, lipschitz), list(zip("abcd", given, strict=True)))
        expected = by_paper([vector(one) for one in given], LOSSES, q, lipschitz)
        np.testing.assert_allclose(vector(found), expected, rtol=1e-9)
        mean = np.mean([one["bn.running_mean"] for one in given])
        np.testing.assert_allclose(found["bn.running_mean"], 0.5 + mean)
        assert found["n"] == 8  # 8.5 is rounded to the even


def test_q_fedavg_does_what_the_paper_says() -> None:
    check_fair()


def test_with_q_0_it_is_the_plain_mean_and_a_large_q_neither_over_nor_underflows() -> None:
    given = updates()
    found = moved(fair(0.0, 3.0), list(zip("abcd", given, strict=True)))
    np.testing.assert_allclose(vector(found), vector(MODEL) + np.mean([vector(one) for one in given], axis=0))
    weights = fair_weights(np.array([1e-10, 1e-9, 1e-9]), np.ones(3), 100.0, 10.0)
    assert np.isfinite(weights).all()
    assert weights[0] < 1e-90 < weights[1] == weights[2]


_fair, F = fair_weights, "aggregator.strategies.qfedavg"


@pytest.mark.parametrize(
    "broken",
    [
        lambda losses, squares, q, lipschitz: losses**q / (losses**q).sum(),
        lambda losses, squares, q, lipschitz: _fair(losses, squares, q, 1.0),
        lambda losses, squares, q, lipschitz: _fair(losses, squares / lipschitz**2, q, lipschitz),
        lambda losses, squares, q, lipschitz: _fair(losses, np.sqrt(squares), q, lipschitz),
        lambda losses, squares, q, lipschitz: _fair(losses, squares, q + 1, lipschitz),
        lambda losses, squares, q, lipschitz: _fair(losses[::-1], squares, q, lipschitz),
    ],
    ids=[
        "weights of sum 1",
        "L is 1",
        "norms of Delta without L",
        "norms, not squares",
        "F^(q+1)",
        "losses of others",
    ],
)
def test_a_mistake_in_q_fedavg_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{F}.fair_weights", broken)
    with pytest.raises(AssertionError):
        check_fair()


def test_without_a_loss_or_a_step_size_it_is_refused_with_the_remedy() -> None:
    made = fair(1.0, 10.0)
    made.start(MODEL, {})
    with pytest.raises(BadMessage, match=r"set TrainResult\.start_loss"):
        made.add(updates()[0], Contribution(1, "a"))
    with pytest.raises(ConfigError, match=r"set train\.lr"):
        make_strategy(StrategySettings(name="q-fedavg"), ROUND)
    run = RunSettings(run_id="r", train={"lr": 0.25}, strategy=StrategySettings(name="q-fedavg"))
    assert run.combining.lipschitz == 4.0


def test_the_loss_is_that_of_the_model_that_came() -> None:
    task = find_task("digits").bind(find_task("digits").load(), None)
    start = task.initial()
    result = task.train(start, TrainConfig(1, 1, {"max_steps": 1}, "delta+loss"))
    task_on_all = find_task("digits").bind(None, find_task("digits").load())
    assert result.start_loss == pytest.approx(task_on_all.evaluate(start).metrics["loss"])
    assert task.train(start, TrainConfig(1, 1, {"max_steps": 1})).start_loss is None


async def test_q_fedavg_in_a_run(tmp_path: Path) -> None:
    run = settings(3, 2, strategy={"name": "q-fedavg", "lipschitz": 2.0})
    joined = Federation(MemoryBroker(Topology("default").access), tmp_path, names(3))
    assert (await joined.run(run)).version == 2


# -- FLTrust ------------------------------------------------------------------------------------------------------


def trusting() -> Strategy:
    return make_strategy(StrategySettings(name="fltrust"), ROUND)


def check_trust() -> None:
    """One points the other way, one is a hundred times too long; buffers are the root's."""
    root, *others = updates(3)
    others[0] = {name: -values for name, values in root.items()}
    others[1] = {name: 100 * values for name, values in others[1].items()}
    d0, top, bottom = vector(root), np.zeros(3), 0.0
    for other in map(vector, others):
        trust = max(0.0, float(other @ d0) / math.sqrt((other @ other) * (d0 @ d0)))
        top += trust * math.sqrt((d0 @ d0) / (other @ other)) * other
        bottom += trust
    assert bottom > 0
    given = [("p1", others[0]), ("zz", others[1]), (AGGREGATOR, root), ("0a", others[2])]
    found = moved(trusting(), given)
    np.testing.assert_allclose(vector(found), vector(MODEL) + top / bottom, rtol=1e-9)
    assert found["n"] == 7 + root["n"]
    np.testing.assert_allclose(found["bn.running_mean"], 0.5 + root["bn.running_mean"])


def test_fltrust_does_what_the_paper_says() -> None:
    check_trust()


_trusted = trusted


def _signed(gram: Vector, root: int) -> Vector:
    norms = np.sqrt(gram.diagonal())
    trust = gram[root] / (norms * norms[root])
    trust[root] = 0
    return trust * norms[root] / norms / trust.sum()


@pytest.mark.parametrize(
    "broken",
    [
        _signed,
        lambda gram, root: _trusted(gram, root) * np.sqrt(gram.diagonal()) / math.sqrt(gram[root, root]),
        lambda gram, root: _trusted(gram, root) * (np.maximum(gram[root], 0) > 0).sum(),
        lambda gram, root: _trusted(gram, 0),
        lambda gram, root: np.full(len(gram), 1 / len(gram)),
    ],
    ids=["no ReLU", "not rescaled", "sum, not mean", "another is the root", "plain mean"],
)
def test_a_mistake_in_fltrust_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aggregator.strategies.fltrust.trusted", broken)
    with pytest.raises(AssertionError):
        check_trust()


@pytest.mark.parametrize("make", [trusting, lambda: fair(1.0, 10.0)], ids=["fltrust", "q-fedavg"])
def test_any_order_gives_the_same_bits(make: Callable[[], Strategy]) -> None:
    given = dict(zip(("p1", AGGREGATOR, "p3", "p2"), updates(5), strict=True))
    losses = dict(zip(given, LOSSES, strict=True))
    found = {
        encode(moved(make(), [(name, given[name]) for name in order], tuple(losses[name] for name in order)))
        for order in list(permutations(given))[::5]
    }
    assert len(found) == 1


def test_if_nobody_points_the_roots_way_the_model_stays() -> None:
    root = updates(3)[0]
    for other in (
        {name: -values for name, values in root.items()},
        {name: 0 * values for name, values in root.items()},
    ):
        assert vector(moved(trusting(), [("p1", other), (AGGREGATOR, root)])).tolist() == [1, 2, 3]
    zero = {name: 0 * values for name, values in root.items()}
    assert vector(moved(trusting(), [("p1", root), (AGGREGATOR, zero)])).tolist() == [1, 2, 3]


def test_without_a_root_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="update of the aggregator's own"):
        moved(trusting(), [("p1", updates()[0]), ("p2", updates()[1])])
    run = settings(3, 1, strategy={"name": "fltrust"})
    with pytest.raises(ConfigError, match="a job with `root`"):
        Aggregator(Job(run, lambda: MODEL), MemoryBroker(), tmp_path)
    with pytest.raises(ConfigError, match="some must be left to evaluate: lower it"):
        simulate(
            "digits", {"run.dir": str(tmp_path / "r"), "strategy.name": "fltrust", "strategy.root_examples": 400}
        )


@pytest.mark.parametrize(("name", "holds"), [("fedavg", False), ("fltrust", True)])
def test_six_of_ten_flip_signs(name: str, holds: bool, tmp_path: Path) -> None:
    """A majority: no other rule bears that."""
    asked: dict[str, Scalar] = {
        "round.participants": 10, "stop.rounds": 4, "strategy.name": name, "study.attack": "sign-flip:10",
        "study.attackers": 6, "train.local_epochs": 1,
    }  # fmt: skip
    accuracy = simulate("digits", {**asked, "run.dir": str(tmp_path)}).summary["metrics"]["accuracy"]
    assert accuracy > 0.8 if holds else accuracy < 0.5


# -- label flipping -----------------------------------------------------------------------------------------------


def test_labels_are_flipped_once_and_evaluated_as_they_are() -> None:
    digits = find_task("digits")
    task = digits.bind(digits.load().take(np.arange(40)), digits.load().take(np.arange(30)))
    labels = task.rows.y.clone()
    task_for = attacking(always(task), "label-flip")
    for _ in range(2):
        flipped = task_for(None)  # type: ignore[arg-type]
        assert isinstance(flipped, TorchTask)
        assert flipped.rows.y.tolist() == [9 - label for label in labels.tolist()]
    assert task.rows.y.equal(labels)
    start = task.initial()
    assert flipped.evaluate(start) == task.evaluate(start)
    trained = flipped.train(start, TrainConfig(1, 3, {"local_epochs": 20})).arrays
    assert task.evaluate(trained).metrics["accuracy"] < 0.1


def test_labels_that_are_none_cannot_be_flipped() -> None:
    diabetes = find_task("diabetes")
    with pytest.raises(ConfigError, match="has no classes"):
        attacking(always(diabetes.bind(diabetes.load(), None)), "label-flip")(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no TaskDefinition's"):
        attacking(always(Pull("p01")), "label-flip")(None)  # type: ignore[arg-type]


def test_flipped_labels_spoil_a_mean(tmp_path: Path) -> None:
    asked: dict[str, Scalar] = {"round.participants": 6, "stop.rounds": 2, "simulation.vectorise": True}
    bad = {**asked, "study.attack": "label-flip", "study.attackers": 4, "run.dir": str(tmp_path / "bad")}
    assert simulate("digits", bad).summary["metrics"]["accuracy"] < 0.5
