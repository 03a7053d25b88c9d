"""Participants that train side by side: what each comes to alone, within rounding; and always the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor, nn

from broker.errors import TaskError
from broker.messages import TrainRound
from fluffle import Result, find_task, resume, simulate
from fluffle.learning import load_data
from workers import together as together_module
from workers.data import Dataset
from workers.partition import Plan, share_out
from workers.preprocess import Preprocess
from workers.scaler import FederatedScaler
from workers.stacked import Member, Unstackable, Work, train_side_by_side, try_out
from workers.task import Arrays, Scalar, TrainConfig, TrainResult, WorkAbandoned, train_seed
from workers.together import Together
from workers.torch_task import TaskDefinition, TorchTask

torch.set_num_threads(1)

SIZES = (23, 17, 16, 9, 3, 1)


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """Every event, whatever a test before has configured."""
    before = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**before)


def points(n: int, seed: int = 0) -> Dataset:
    """Three classes in four dimensions."""
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    return Dataset(x, x[:, :3].argmax(axis=1), name="points")


def numbers(n: int, seed: int = 0) -> Dataset:
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    return Dataset(x, x.sum(axis=1), name="numbers")


def gaps(n: int, seed: int = 0) -> Dataset:
    data = points(n, seed)
    data.x[::5, 1] = np.nan
    return data


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def standardised() -> nn.Module:
    return nn.Sequential(FederatedScaler(4), nn.Linear(4, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3))


class Tied(nn.Module):
    """One weight under two names, one that is frozen, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.last.bias.requires_grad_(requires_grad=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.second(self.first(x).relu()))
        return found


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.smooth_l1_loss(outputs.squeeze(1), targets)


TOY = TaskDefinition(name="toy", model=layers, load=lambda: points(60), defaults={"lr": 0.5, "batch_size": 8})
TASKS: Mapping[str, tuple[TaskDefinition, Callable[[int, int], Dataset]]] = {
    "layer norm": (TOY, points),
    "tied, frozen and unused": (replace(TOY, model=Tied), points),
    "missing values": (replace(TOY, model=standardised, preprocess=Preprocess(missing="keep")), gaps),
    "squared error": (replace(TOY, model=lambda: nn.Linear(4, 1), loss="mse", metric="rmse"), numbers),
    "a loss of one's own": (replace(TOY, model=lambda: nn.Linear(4, 1), loss=huber, metric="rmse"), numbers),
    "convolution": (replace(TOY, model=convolution), points),
}  # fmt: skip


def bound(
    definition: TaskDefinition, data: Callable[[int, int], Dataset], sizes: Sequence[int] = SIZES
) -> list[TorchTask]:
    return [definition.bind(data(size, seed), None, f"p{seed:02}") for seed, size in enumerate(sizes)]


def both_ways(tasks: Sequence[TorchTask], **train: Scalar) -> list[tuple[TrainResult, TrainResult]]:
    """What each comes to alone, and side by side."""
    start = tasks[0].initial()
    alone = [task.train(start, TrainConfig(2, seed, train)) for seed, task in enumerate(tasks)]
    chosen = tasks[0].definition.recipe(train)
    members = [Member(task, seed) for seed, task in enumerate(tasks)]
    found = train_side_by_side(try_out(tasks[0], chosen), members, Work(start, chosen))
    assert all(isinstance(one, TrainResult) for one in found), found
    return [(one, other) for one, other in zip(alone, found, strict=True) if isinstance(other, TrainResult)]


def assert_equal(one: TrainResult, other: TrainResult, atol: float = 2e-6) -> None:
    assert one.num_examples == other.num_examples
    assert other.metrics == pytest.approx(one.metrics, rel=1e-5)
    assert one.arrays.keys() == other.arrays.keys()
    for name, expected in one.arrays.items():
        assert other.arrays[name].dtype == expected.dtype
        np.testing.assert_allclose(other.arrays[name], expected, atol=atol, rtol=1e-5, err_msg=name)


# -- the arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_everybody_comes_to_what_it_comes_to_alone(name: str) -> None:
    tasks = bound(*TASKS[name])
    start = tasks[0].initial()
    for alone, beside in both_ways(tasks, lr=0.05, local_epochs=2, momentum=0.5, l2=0.01):
        assert_equal(alone, beside)
        assert any(not np.array_equal(start[key], array) for key, array in beside.arrays.items())


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    batch=st.integers(0, 12), epochs=st.integers(1, 3), most=st.integers(0, 7),
    momentum=st.sampled_from([0.0, 0.9]), l2=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_whatever_the_recipe_and_the_sizes(
    sizes: list[int], batch: int, epochs: int, most: int, momentum: float, l2: float
) -> None:
    tasks = bound(TOY, points, sorted(sizes, reverse=True))
    train = {"batch_size": batch, "local_epochs": epochs, "max_steps": most, "momentum": momentum, "l2": l2}
    for alone, beside in both_ways(tasks, lr=0.05, **train):
        assert_equal(alone, beside)


def test_the_handwritten_digits_of_mnist() -> None:
    definition = find_task("mnist-2nn")
    data = load_data(definition)
    few = Dataset(data.x[:420], data.y[:420], name="few")
    shares = share_out(few, Plan(8))
    tasks = sorted((definition.bind(one.train) for one in shares.shards), key=lambda one: -one.num_examples)
    for alone, beside in both_ways(tasks, local_epochs=2):
        assert_equal(alone, beside)


def test_it_is_given_up_when_told() -> None:
    tasks, polls = bound(TOY, points), iter((False, False, True))
    chosen = TOY.recipe({})
    with pytest.raises(WorkAbandoned, match="after 2 steps"):
        train_side_by_side(
            try_out(tasks[0], chosen), [Member(one, 0) for one in tasks],
            Work(tasks[0].initial(), chosen, lambda: next(polls)),
        )  # fmt: skip


# -- what cannot be done -------------------------------------------------------------------------------------


class AgainstTheMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def after_a_linear_layer(module: nn.Module) -> TaskDefinition:
    return replace(TOY, model=lambda: nn.Sequential(nn.Linear(4, 3), module))


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0, 5.0]))


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (after_a_linear_layer(nn.BatchNorm1d(3)), "changes the buffer '1.running_mean'"),
        (after_a_linear_layer(nn.Dropout()), "random"),
        (after_a_linear_layer(AgainstTheMean()), "influence one another"),
        (after_a_linear_layer(Branching()), "data-dependent control flow"),
        (replace(TOY, loss=weighted), "not their mean"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_says_why(definition: TaskDefinition, reason: str) -> None:
    with pytest.raises(Unstackable, match=reason):
        try_out(definition.bind(points(23)), definition.recipe({}))


def test_a_task_that_trains_in_its_own_way_says_so() -> None:
    class Own(TorchTask):
        def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
            return super().train(arrays, config)

    with pytest.raises(Unstackable, match="a way of its own"):
        Together({"p01": Own(TOY, points(9), None, "p01")}, TOY.recipe({}), 20)


def test_few_and_large_ones_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {f"p{n}": task for n, task in enumerate(bound(TOY, points))}
    with pytest.raises(Unstackable, match="asks 3 participants"):
        Together(tasks, TOY.recipe({}), 3)
    monkeypatch.setattr(together_module, "GROUP_BYTES", 4000)
    with pytest.raises(Unstackable, match=r"models so large gain nothing"):
        Together(tasks, TOY.recipe({}), 4)


# -- who trains with whom ------------------------------------------------------------------------------------


def told(asked: Sequence[str], task: int = 1) -> TrainRound:
    return TrainRound(
        run_id="r", epoch=1, seq=task, task=task, round=task + 1, attempt=1, work="train", asked=tuple(asked),
        version=task, model=None, seed=3,
    )  # fmt: skip


class Crew:
    """Participants p00 to p11, and what each comes to when it asks."""

    def __init__(self, **data: Dataset) -> None:
        sets = {f"p{n:02}": points(30 - n % 5, n) for n in range(12)} | data
        self.tasks = {name: TOY.bind(one, None, name) for name, one in sets.items()}
        self.together = Together(self.tasks, TOY.recipe({}), len(self.tasks))
        self.start = TOY.bind().initial()

    def ask(self, name: str, order: TrainRound, stop: Callable[[], bool] = lambda: False) -> TrainResult:
        return self.together.task_for(name, order).train(self.start, self._config(name, order, stop))

    def alone(self, name: str, order: TrainRound) -> TrainResult:
        return self.tasks[name].train(self.start, self._config(name, order, lambda: False))

    def _config(self, name: str, order: TrainRound, stop: Callable[[], bool]) -> TrainConfig:
        return TrainConfig(order.round, train_seed(order.seed, name, order.round), {}, should_stop=stop)


def bits(result: TrainResult) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in result.arrays.items()}


@pytest.mark.parametrize("most", [12, 5, 1])
def test_who_asks_first_changes_no_bit(most: int) -> None:
    one, other, order = Crew(), Crew(), told(list(Crew().tasks))
    one.together.largest_group = other.together.largest_group = most
    forwards = {name: one.ask(name, order) for name in one.tasks}
    backwards = {name: other.ask(name, order) for name in reversed(other.tasks)}
    for name, found in forwards.items():
        assert bits(found) == bits(backwards[name])
        assert_equal(one.alone(name, order), found)


@pytest.mark.parametrize("most", range(1, 8))
def test_groups_share_out_those_who_are_asked(most: int) -> None:
    crew, order = Crew(), told([f"p{n:02}" for n in range(0, 12, 2)])
    crew.together.largest_group = most
    groups = [crew.together._group_of(name, order) for name in order.asked]
    assert all(name in group and len(group) <= most for name, group in zip(order.asked, groups, strict=True))
    unique = {tuple(group) for group in groups}
    assert sorted(name for group in unique for name in group) == sorted(order.asked)
    for group in unique:
        sizes = [crew.tasks[name].num_examples for name in group]
        assert sizes == sorted(sizes, reverse=True)


def test_a_round_abandoned_by_the_first_is_trained_for_the_next() -> None:
    crew = Crew()
    order = told(list(crew.tasks))
    polls = iter((False, False, True))
    with pytest.raises(WorkAbandoned):
        crew.ask("p03", order, lambda: next(polls))
    assert_equal(crew.alone("p04", order), crew.ask("p04", order))
    with pytest.raises(WorkAbandoned, match="before the first step"):
        crew.ask("p05", order, lambda: True)


def test_who_still_has_an_older_order_disturbs_nobody() -> None:
    crew = Crew()
    before, now = told(list(crew.tasks), 1), told(list(crew.tasks), 2)
    crew.ask("p01", before)
    first = crew.ask("p01", now)
    assert bits(crew.ask("p02", before)) == bits(crew.alone("p02", before))
    again = Crew()
    assert bits(first) == bits(again.ask("p01", now))
    assert bits(crew.ask("p02", now)) == bits(again.ask("p02", now))


def test_one_that_diverges_fails_alone() -> None:
    wild = points(30)
    wild.x[:] *= 1e30
    crew = Crew(p07=wild)
    order = told(list(crew.tasks))
    with pytest.raises(TaskError, match=r"the loss is nan with train.lr = 0.5: lower train.lr"):
        crew.ask("p07", order)
    assert_equal(crew.alone("p08", order), crew.ask("p08", order))


def test_one_whose_data_the_model_cannot_take_fails_alone() -> None:
    wrong = points(30)
    wrong.y[3] = 7
    crew = Crew(p07=wrong)
    order = told(list(crew.tasks))
    with capture_logs() as logs:
        assert bits(crew.ask("p01", order)) == bits(crew.alone("p01", order))
        with pytest.raises(TaskError, match=r"Target 7 is out of bounds"):
            crew.ask("p07", order)
        assert bits(crew.ask("p02", order)) == bits(crew.alone("p02", order))
    assert [line["participants"] for line in logs if line["event"] == "group_trained_one_by_one"] == [12]


# -- whole simulations ---------------------------------------------------------------------------------------


def run(task: str, directory: Path, **chosen: Any) -> tuple[Result, list[dict[str, Any]]]:
    """A simulation, and what it noted about how it trains; `train__lr=0.1` sets train.lr."""
    dotted = {name.replace("__", "."): value for name, value in chosen.items()}
    with capture_logs() as logs:
        result = simulate(task, {"run.dir": str(directory), **dotted})
    return result, [line for line in logs if line["event"].startswith("trained_")]


@pytest.mark.parametrize(
    ("task", "chosen"),
    [
        ("digits", {"round.participants": 12, "stop.rounds": 3, "data.partition": "dirichlet:1"}),
        ("digits", {"round.participants": 14, "stop.rounds": 3, "round.cohort": 9, "train.momentum": 0.5}),
        ("mnist-logreg", {"round.participants": 30, "stop.rounds": 2}),
        ("diabetes", {"round.participants": 10, "stop.rounds": 3}),
    ],
)
def test_a_simulation_ends_with_the_same_model_within_rounding(
    tmp_path: Path, task: str, chosen: dict[str, Any]
) -> None:
    one_by_one, told_nothing = run(task, tmp_path / "alone", **chosen)
    first, notes = run(task, tmp_path / "first", **chosen, simulation__vectorise=True)
    second, _ = run(task, tmp_path / "second", **chosen, simulation__vectorise=True)
    assert told_nothing == []
    assert [note["event"] for note in notes] == ["trained_together"]
    for name, expected in one_by_one.arrays.items():
        np.testing.assert_allclose(first.arrays[name], expected, atol=1e-5)
    assert first.summary["metrics"] == pytest.approx(one_by_one.summary["metrics"], rel=1e-4)
    assert first.summary["updates"] == one_by_one.summary["updates"]
    assert second.summary["model_sha256"] == first.summary["model_sha256"]


def test_federated_statistics_come_first(tmp_path: Path) -> None:
    one_by_one, _ = run("heart", tmp_path / "alone", stop__rounds=4)
    beside, notes = run("heart", tmp_path / "beside", stop__rounds=4, simulation__vectorise=True)
    assert [note["event"] for note in notes] == ["trained_together"]
    for name, expected in one_by_one.arrays.items():
        np.testing.assert_allclose(beside.arrays[name], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (
            {"strategy.name": "fedsgd", "train.batch_size": 0},
            "strategy 'fedsgd' wants more, or other, than trained models",
        ),
        ({"round.participants": 3}, "asks 3 participants"),
        ({"train.mu": 0.01}, "for each participant alone"),
    ],
)
def test_what_falls_back_has_the_bits_of_one_by_one(tmp_path: Path, chosen: dict[str, Any], reason: str) -> None:
    one_by_one, _ = run("digits", tmp_path / "alone", stop__rounds=2, **chosen)
    asked, notes = run("digits", tmp_path / "asked", stop__rounds=2, **chosen, simulation__vectorise=True)
    (note,) = notes
    assert note["event"] == "trained_one_by_one"
    assert reason in note["reason"]
    assert asked.summary["model_sha256"] == one_by_one.summary["model_sha256"]


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole, _ = run("digits", tmp_path / "whole", stop__rounds=4, simulation__vectorise=True)
    run("digits", tmp_path / "cut", stop__rounds=2, simulation__vectorise=True)
    resumed = resume(tmp_path / "cut", {"stop.rounds": 4})
    assert resumed.summary["model_sha256"] == whole.summary["model_sha256"]
