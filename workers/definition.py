"""What the commands need of a task: with torch it is a `TaskDefinition`, without an `EstimatorDefinition`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from workers.data import Dataset
from workers.preprocess import PreprocessReport
from workers.task import Arrays, LearningTask, Scalar


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one row of the input: a class and its probability, or another value (probability None)."""

    row: int
    value: float
    probability: float | None


class BoundTask(LearningTask, Protocol):
    """One participant's learning task; `report` says what preprocessing did to its data."""

    report: PreprocessReport


@runtime_checkable
class Definition(Protocol):
    """What everybody agrees on: a model and how it learns, the data, and which of it is held out."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def load(self) -> Callable[..., Dataset]: ...
    @property
    def metric(self) -> str: ...
    @property
    def defaults(self) -> Mapping[str, Scalar]: ...
    @property
    def held_out(self) -> float: ...
    @property
    def seed(self) -> int: ...

    def check(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> None:
        """Raises ConfigError for training settings that cannot work. `inputs`: an example's shape, if known."""

    def run_defaults(self) -> dict[str, Scalar]:
        """Settings of a run that this task wants, by dotted name, beside `defaults`."""

    def of_rank(self, rank: int) -> Definition:
        """The same with LoRA adapters of another rank; 0: its own. Raises ConfigError if it can have none."""

    def bind(
        self, train: Dataset | None = None, held_out: Dataset | None = None, participant: str = "this participant"
    ) -> BoundTask:
        """One participant's task. Without `train` it can only make the initial model and evaluate."""

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """What this model says of each input, in order; rows that preprocessing drops are left out."""
