"""What the commands need of a task, whatever it trains with. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

from workers.data import Dataset
from workers.task import Arrays, LearningTask, Scalar


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one row of the input: a class and its probability, or another value (probability None)."""

    row: int
    value: float
    probability: float | None


class Report(Protocol):
    """What preparing one participant's data did."""

    def to_dict(self) -> dict[str, int]: ...


class BoundTask(LearningTask, Protocol):
    """One participant's learning task, with what was done to its data."""

    @property
    def report(self) -> Report: ...


@runtime_checkable
class Definition(Protocol):
    """What everybody agrees on: a model and how it learns, the data, and which of it is held out: a
    `TaskDefinition` or `HfTask`, or without torch an `EstimatorDefinition`.

    `load` gets the whole data set, or one participant's own from where it is told. `held_out` is the share of
    examples nobody trains on; `seed` draws those and the initial model.
    """

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

    def on(self, device: str, processes: int = 1) -> Definition:
        """The same on another device: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto`; "": its own; in so many processes.
        Raises ConfigError if that is not there."""

    def bind(
        self, train: Dataset | None = None, held_out: Dataset | None = None, participant: str = "this participant"
    ) -> BoundTask:
        """One participant's task. Without `train` it can only make the initial model and evaluate."""

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """What this model says of each input, in order; rows that preprocessing drops are left out."""


def is_definition(found: Any) -> TypeGuard[Definition]:
    """Whether it is one; a class of definitions is none."""
    return isinstance(found, Definition) and not isinstance(found, type)
