"""Learning tasks that a site names: an object, a function that makes one, or a class."""

from __future__ import annotations

import pytest

from benchmarks.tasks import DRIFT as A_CLASS
from benchmarks.tasks import Drift
from broker.messages import TrainRound
from fluffle.chaos.task import TASK as A_FUNCTION
from fluffle.chaos.task import Pace, Paced
from fluffle.config import Config, EvaluationSettings, RunSection
from fluffle.jobs import run_job
from workers.assignment import Assignment, Holding

ORDER = TrainRound(
    run_id="run-1", epoch=1, seq=1, task=1, round=1, attempt=1, work="train", asked=("p01",), version=0, model=None,
    wants="delta", seed=42,
)  # fmt: skip


def test_a_function_makes_the_task_of_this_participant_from_what_its_site_says() -> None:
    task = Assignment(Holding("p02", A_FUNCTION, Pace(seconds=3.0).as_data))(ORDER)
    assert isinstance(task, Paced)
    assert (task.pace.seconds, task.point.tolist()) == (3.0, Paced("p02", Pace()).point.tolist())


def test_a_class_is_made_for_this_participant_and_not_taken_for_a_task() -> None:
    """It has all the attributes of one."""
    assert isinstance(Assignment(Holding("p01", A_CLASS))(ORDER), Drift)


def test_an_aggregator_makes_a_task_of_a_class_too() -> None:
    config = Config(task=A_CLASS, run=RunSection(id="run-1"), evaluation=EvaluationSettings(mode="none"))
    with pytest.raises(NotImplementedError, match="the initial model is a file"):
        run_job(config).initial()
