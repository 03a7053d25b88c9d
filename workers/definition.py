"""What a user writes: the definition of a learning task, whatever library it trains with. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

from workers.data import Dataset
from workers.recipe import Recipe
from workers.task import Arrays, LearningTask, Scalar


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one row of the input: a class and its probability, or a measured value (probability None)."""

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
    """What everybody agrees on: name, data, model and default training settings (`TaskDefinition`, `HfTask`).

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

    def recipe(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> Recipe:
        """The defaults with these settings over them. Raises ConfigError for one that cannot work, also for
        examples of the shape `inputs` if that is known."""

    def bind(
        self, train: Dataset | None = None, held_out: Dataset | None = None, participant: str = "this participant"
    ) -> BoundTask:
        """One participant's task. Without `train` it can only make the initial model and evaluate."""

    def buffers(self) -> Sequence[str]:
        """Patterns for the arrays that gradients do not move."""

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """What the model says of each input, in order; rows that preprocessing drops are left out.

        Raises StateError if the model is not of this task.
        """


def is_definition(found: Any) -> TypeGuard[Definition]:
    """Whether it is one; a class of definitions is none."""
    return isinstance(found, Definition) and not isinstance(found, type)
