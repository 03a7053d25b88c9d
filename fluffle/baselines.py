"""What federated training is compared with: pooled training, and each participant alone.

Both train with the participants' own learning task, on the same shares of the data, for as many epochs, and are
measured on the same held-out examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from workers.definition import Definition
from workers.partition import Shares
from workers.task import Arrays, LearningTask, Scalar, TrainConfig, train_seed

CENTRAL = "central"


@dataclass(frozen=True, slots=True)
class BaselineSettings:
    """A run's length, seed and training settings (`lr`, `batch_size`, ...; empty: the task's defaults), and the
    model that it begins with; empty: the task's own."""

    rounds: int = 20
    seed: int = 42
    train: Mapping[str, Scalar] = field(default_factory=dict)
    initial: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """One round of one participant is done."""

    participant: str
    round: int
    rounds: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """One training: `metrics` of the last model, `history` of every round's, on the central held-out examples.

    `arrays` are that model, of pooled training only.
    """

    participant: str
    num_examples: int
    metrics: dict[str, float]
    history: tuple[dict[str, float], ...]
    arrays: Arrays = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        names = ("participant", "num_examples", "metrics", "history")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class LocalResult:
    """Each participant alone, and over them the mean, min and max of each metric."""

    participants: tuple[BaselineResult, ...]

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """For each metric its `mean`, `min` and `max` over the participants."""
        values = {name: [p.metrics[name] for p in self.participants] for name in self.participants[0].metrics}
        return {name: {"mean": fmean(v), "min": min(v), "max": max(v)} for name, v in values.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"summary": self.summary, "participants": [p.to_dict() for p in self.participants]}


Report = Callable[[Progress], None]


def train_central(
    definition: Definition, shares: Shares, settings: BaselineSettings, report: Report = lambda _: None
) -> BaselineResult:
    """One model on everybody's training data together, for rounds * local_epochs epochs."""
    return _train(definition.bind(shares.train, shares.held_out, CENTRAL), CENTRAL, settings, report)


def train_local(
    definition: Definition, shares: Shares, settings: BaselineSettings, report: Report = lambda _: None
) -> LocalResult:
    """One model per participant on its own training data, each measured on the central held-out examples."""
    return LocalResult(
        tuple(
            replace(one, arrays={})
            for shard in shares.shards
            for one in [
                _train(definition.bind(shard.train, shares.held_out, shard.name), shard.name, settings, report)
            ]
        )
    )


def _train(task: LearningTask, participant: str, settings: BaselineSettings, report: Report) -> BaselineResult:
    arrays = settings.initial or task.initial()
    history: list[dict[str, float]] = []
    state: Arrays = {}
    for number in range(1, settings.rounds + 1):
        seed = train_seed(settings.seed, participant, number)
        trained = task.train(arrays, TrainConfig(round=number, seed=seed, settings=settings.train, state=state))
        arrays, state = trained.arrays, trained.state
        history.append(task.evaluate(arrays).metrics)
        report(Progress(participant, number, settings.rounds, history[-1]))
    return BaselineResult(participant, task.num_examples, history[-1], tuple(history), arrays)
