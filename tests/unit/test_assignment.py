"""Which learning task a worker does, on which data."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import nn

from broker.errors import ConfigError, DataError
from broker.messages import TrainRound
from tests.federation import Pull
from workers.assignment import Assignment, Holding
from workers.data import Dataset, split
from workers.partition import Plan, share_out
from workers.task import TrainConfig
from workers.tasks import find_task
from workers.torch_task import TaskDefinition

RUN: dict[str, Any] = {
    "run_id": "r", "epoch": 1, "seq": 1, "task": 1, "round": 1, "attempt": 1, "work": "train", "asked": ("p01",),
    "version": 0, "model": None, "seed": 7, "learning_task": "digits",
    "data": {"partition": "dirichlet:0.5", "participants": 3},
}  # fmt: skip
ROWS = Dataset(np.arange(60.0).reshape(20, 3), np.arange(20) % 2, name="rows", columns=("a", "b", "c"))


def told(**changes: Any) -> TrainRound:
    return TrainRound(**{**RUN, **changes})


def definition(**changes: Any) -> TaskDefinition:
    return TaskDefinition(
        **{"name": "rows", "model": lambda: nn.Linear(3, 2), "load": lambda: ROWS, "held_out": 0.25, **changes}
    )


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's module, `mine`."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def examples(assignment: Assignment, order: TrainRound) -> int:
    return assignment(order).num_examples


def test_a_long_tail_is_the_runs_too() -> None:
    digits = find_task("digits")
    shares = share_out(digits.load(), Plan(3, "iid", 7, digits.held_out, digits.seed, imbalance=20.0))
    data = {"partition": "iid", "participants": 3, "imbalance": 20.0}
    assert examples(Assignment(Holding("p01")), told(data=data)) == len(shares.shards[0].train) < 200
    with pytest.raises(ConfigError, match=r"data\.imbalance = 'much', which is no number"):
        Assignment(Holding("p01"))(told(data={**data, "imbalance": "much"}))


def test_a_shipped_task_gets_the_share_that_a_simulation_gives() -> None:
    digits = find_task("digits")
    shares = share_out(digits.load(), Plan(3, "dirichlet:0.5", 7, digits.held_out, digits.seed))
    for shard in shares.shards:
        task = Assignment(Holding(shard.name))(told())
        expected = digits.bind(shard.train, shard.held_out, shard.name)
        assert task.num_examples == len(shard.train)
        assert task.evaluate(task.initial()) == expected.evaluate(task.initial())
        trained, alike = (t.train(t.initial(), TrainConfig(1, 5)).arrays for t in (task, expected))
        assert all(np.array_equal(trained[name], alike[name]) for name in alike)


def test_the_task_is_kept_until_the_run_wants_another() -> None:
    assignment = Assignment(Holding("p01"))
    first = assignment(told())
    assert assignment(told(round=2, task=2, run_id="s")) is first
    assert assignment(told(seed=8)) is not first


def test_a_message_cannot_choose_code() -> None:
    with pytest.raises(ConfigError, match="learns 'os:system', which is not shipped: start the worker with"):
        Assignment(Holding("p01"))(told(learning_task="os:system"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": {}}, "does not say how the data of task 'digits' is shared out"),
        ({"data": {"partition": "iid", "participants": "3"}}, "does not say how"),
        ({"data": {"partition": "iid", "participants": 2}}, "'p03' has no share .* 2 participants is for p01, p02"),
        ({"data": {"partition": "odd", "participants": 3}}, "partition 'odd' is not one of"),
    ],
)  # fmt: skip
def test_a_share_that_cannot_be_is_refused_in_words(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Assignment(Holding("p03"))(told(**changes))


def test_a_sites_own_task_trains_on_all_that_it_loads(mine: ModuleType) -> None:
    mine.TASK = definition()
    train, held_out = split(ROWS, 0.25, 42)
    task = Assignment(Holding("p01", "mine:TASK"))(told())
    assert (task.num_examples, task.evaluate(task.initial()).num_examples) == (len(train), len(held_out))
    shared = Assignment(Holding("p01", "mine:TASK", "share"))(told(data={"partition": "iid", "participants": 4}))
    assert shared.num_examples < len(train)


def test_a_load_that_takes_an_argument_is_told_where_the_data_is(mine: ModuleType) -> None:
    def load(place: str) -> Dataset:
        if place == "nowhere":
            raise FileNotFoundError(place)
        return ROWS.take(np.arange(int(place)))

    mine.TASK = definition(load=load)
    assert examples(Assignment(Holding("p01", "mine:TASK", "8")), told()) == 6
    with pytest.raises(DataError, match="loading its data from nowhere failed with FileNotFoundError"):
        Assignment(Holding("p01", "mine:TASK", "nowhere"))(told())


def test_examples_come_from_a_file(mine: ModuleType, tmp_path: Path) -> None:
    mine.TASK = definition()
    csv, npz = tmp_path / "rows.csv", tmp_path / "rows.npz"
    csv.write_text("c,target,a,b\n3,1,1,2\n6,0,4,\n9,1,7,8\n12,0,10,11\n")
    np.savez(npz, x=np.ones((12, 3)), y=np.arange(12) % 2)
    assert examples(Assignment(Holding("p01", "mine:TASK", str(npz))), told()) == 9
    assert examples(Assignment(Holding("p01", "mine:TASK", str(csv))), told()) == 2  # one row lacks a value
    csv.write_text(csv.read_text().replace("4,\n", "4,5\n"))
    assert examples(Assignment(Holding("p01", "mine:TASK", str(csv))), told()) == 3


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("a,b,c\n1,2,3\n", "column 'target' is missing"),
        ("a,b,target\n1,2,3\n", "column 'c' is missing"),
        ("a,b,c,target\n1,2,3,0.5\n", "classes: whole numbers"),
        ("a,b,c,target\n1,2,3,\n", "classes: whole numbers"),
        ("a,b,c,target\n1,2,many,1\n", "cannot be read as inputs"),
    ],
)
def test_a_file_that_cannot_be_the_tasks_is_refused_in_words(
    mine: ModuleType, tmp_path: Path, content: str, error: str
) -> None:
    mine.TASK = definition()
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=error):
        Assignment(Holding("p01", "mine:TASK", str(tmp_path / "rows.csv")))(told())


def test_a_plain_learning_task_or_what_makes_one_will_do(mine: ModuleType) -> None:
    mine.TASK, mine.make, mine.no = Pull("p01"), lambda who, data: Pull(who, examples=len(data)), lambda *_: 3
    assert Assignment(Holding("p01", "mine:TASK"))(told()) is mine.TASK
    assert examples(Assignment(Holding("p02", "mine:make", "abcd")), told()) == 4
    with pytest.raises(ConfigError, match="gave 3, no learning task"):
        Assignment(Holding("p01", "mine:no"))(told())


def test_a_task_that_is_not_there_is_told_before_anything_starts(mine: ModuleType) -> None:
    with pytest.raises(ConfigError, match="mine has no task named"):
        Assignment(Holding("p01", "mine:TASK")).check()
