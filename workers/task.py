"""The learning task: what a user writes. Named numpy arrays cross this boundary, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from broker.errors import TaskError
from broker.messages import Wants

Arrays = dict[str, NDArray[Any]]
Scalar = bool | int | float | str


class WorkAbandoned(TaskError):
    """Training stopped because `TrainConfig.should_stop` said that the work became pointless. Not a failure."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What a task is told about one piece of work.

    `settings` holds the run's training settings (`lr`, `batch_size`, `local_epochs`, ...). `seed` depends on
    the run's seed, the participant and the round, so that a repeated attempt gives the same arrays.
    `should_stop` turns true once the work became pointless; a task that looks gives its machine back early.
    `clock` gives seconds, for a task that keeps to a budget of time.

    `origin`: the arrays to which a proximal term pulls; None: those it starts from. `correction`: to be added to
    each gradient, by tensor (SCAFFOLD). `state`: the `TrainResult.state` of this participant's last update that
    was counted; empty at first, and once it was lost.

    `save` keeps arrays of any names on the disk, in place of those before, and returns once they are safe: all that
    the rest of this training depends on. `resume`: what was last saved of this very training, by a worker that was
    killed in the middle of it; else empty.
    """

    round: int
    seed: int
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    wants: Wants = "delta"
    should_stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    origin: Arrays | None = None
    correction: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)
    save: Callable[[Arrays], None] = lambda _: None
    resume: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """`arrays`: the trained arrays (the worker subtracts those it started from; for `wants == "model"` they travel
    as they are), or for `"gradient"` the mean gradient over this participant's examples (settings: full batch).

    `effective_steps`: what a constant gradient of 1 would have moved the arrays by, in units of the step size; for
    plain gradient descent the number of steps. 0 if it is not known; FedNova needs it.

    `step_sum`: the sum of the step sizes, infinite if no gradient moved the arrays; 0 if it is not known.
    `buffers`: names of floating-point arrays that gradients do not move. SCAFFOLD needs both. `start_loss`: the
    mean loss of the arrays it started from, which q-FedAvg needs (`wants == "delta+loss"`). `state`: arrays of any
    names that the next training of this participant shall get, if this update is counted; they never travel.
    """

    arrays: Arrays
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    effective_steps: float = 0.0
    step_sum: float = 0.0
    buffers: frozenset[str] = frozenset()
    start_loss: float | None = None
    state: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics as means over `num_examples` held-out examples.

    `confusion` (classes, classes) counts examples: a row for each true class, a column for each predicted one. It
    stays where it was made: a participant sends its metrics only.
    """

    metrics: dict[str, float]
    num_examples: int
    confusion: NDArray[np.int64] | None = field(default=None, compare=False)


@runtime_checkable
class LearningTask(Protocol):
    """A model, data and loss of one participant. Methods run off the event loop, one at a time.

    All arrays have the names, shapes and dtypes that `initial()` returned.
    """

    name: str
    num_examples: int

    def initial(self) -> Arrays:
        """The arrays that everybody starts from; the same on every machine."""

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        """Trains from `arrays` (read-only) on the local data."""

    def evaluate(self, arrays: Arrays) -> Evaluation:
        """Measures `arrays` (read-only) on local held-out data."""


def is_learning_task(found: object) -> TypeGuard[LearningTask]:
    """Whether it is one. A class whose instances are some has the same attributes, and is none."""
    return isinstance(found, LearningTask) and not isinstance(found, type)


def train_seed(run_seed: int, participant: str, round: int, turn: int = 0) -> int:  # noqa: A002 - the design's word
    """The seed for one participant's work in one round; the attempt does not change it, a further turn does."""
    words = (f"{participant}/{round}" + (f"/{turn}" if turn else "")).encode().ljust(64, b"\0")[:64]
    own = run_seed.to_bytes(max(4, -(-run_seed.bit_length() // 32) * 4), "little")
    return int(np.random.SeedSequence(np.frombuffer(own + words, dtype="<u4")).generate_state(1)[0])
