"""Which learning task a worker does, and on which data: what its site says, else what the run says.

A run may choose among the shipped tasks only. A site's own code is imported because the site names it, never
because a message does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from broker.errors import ConfigError, DataError, FluffleError
from broker.messages import TrainRound
from workers.data import Dataset, split
from workers.definition import Definition, is_definition
from workers.partition import Plan, Shard, share_out
from workers.tables import read_examples
from workers.task import LearningTask, is_learning_task
from workers.tasks import CATALOGUE, find_object

SHARE = "share"  # of the task's data, as the run shares it out
ALL = "all"  # that the task loads here

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """What a site has. `task` "": a shipped one that the run names. `data`: `share`, `all`, or where it is;
    "" is the share for a shipped task, and all for a site's own. `threads`: of torch, 0 as many as it likes.
    `lora_rank`: of its adapters, 0 as the task has them. `device`: where it trains, "" as the task says; in so many
    `processes`."""

    participant: str
    task: str = ""
    data: str = ""
    threads: int = 1
    lora_rank: int = 0
    device: str = ""
    processes: int = 1

    def fitted(self, definition: Definition) -> Definition:
        """The task as this site can do it. Raises ConfigError if it cannot."""
        return definition.of_rank(self.lora_rank).on(self.device, self.processes)


class Assignment:
    """Finds the learning task for an order, and keeps it for the next ones. Used by one thread at a time."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._found: tuple[Hashable, LearningTask] | None = None

    def check(self) -> None:
        """Raises ConfigError if the task that this site names cannot be imported, or not be done here."""
        if self._holding.task and is_definition(found := find_object(self._holding.task)):
            self._holding.fitted(found)

    def __call__(self, told: TrainRound) -> LearningTask:
        """Raises ConfigError or DataError for what cannot work here."""
        name = self._holding.task or _shipped(told.learning_task)
        key = (name, told.seed, *sorted(told.data.items()))
        if self._found is None or self._found[0] != key:
            self._found = key, self._find(name, told)
        return self._found[1]

    def _find(self, name: str, told: TrainRound) -> LearningTask:
        found = find_object(name)
        if is_learning_task(found):
            return found
        if callable(found):
            return _made(found, name, self._holding)
        if sys.modules.get("torch"):  # the task brought it
            from workers.modules import use_threads

            use_threads(self._holding.threads)
        definition = self._holding.fitted(found)
        shard = self._shard(definition, told)
        held_out = shard.held_out if len(shard.held_out) else None
        task = definition.bind(shard.train, held_out, shard.name)
        log.info("data_prepared", participant=shard.name, source=shard.train.source, **task.report.to_dict())
        return task

    def _shard(self, definition: Definition, told: TrainRound) -> Shard:
        participant, place = self._holding.participant, self._holding.data
        if place == SHARE or (not place and definition.name in CATALOGUE):
            return _share(definition, told, participant)
        place = "" if place == ALL else place
        data = load_data(definition, place)
        if place and not _wants_place(definition):
            data = read_examples(Path(place), data)
        return Shard(participant, *split(data, definition.held_out, definition.seed))


def load_data(definition: Definition, place: str = "") -> Dataset:
    """The task's data set, from `place` if its `load` takes one. Raises DataError, as `load` is the user's code."""
    try:
        return definition.load(place) if _wants_place(definition) else definition.load()
    except FluffleError:
        raise
    except Exception as error:
        raise DataError(
            f"task {definition.name!r}: loading its data{f' from {place}' if place else ''} failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def _wants_place(definition: Definition) -> bool:
    return bool(inspect.signature(definition.load).parameters)


def _shipped(name: str) -> str:
    if name not in CATALOGUE:
        raise ConfigError(
            f"this run learns {name!r}, which is not shipped: start the worker with --task, for it imports no code "
            "because a message names it"
        )
    return name


def _made(make: Callable[..., Any], name: str, holding: Holding) -> LearningTask:
    task = make(holding.participant, holding.data)
    if not is_learning_task(task):
        raise ConfigError(f"task {name!r}: called with participant and data, it gave {task!r}, no learning task")
    return task


def _share(definition: Definition, told: TrainRound, participant: str) -> Shard:
    participants, partition = told.data.get("participants"), told.data.get("partition")
    if not isinstance(participants, int) or not isinstance(partition, str):
        raise ConfigError(
            f"the run does not say how the data of task {definition.name!r} is shared out: set data.partition and "
            "round.participants for the aggregator, or start the worker with --data all or --data FILE"
        )
    imbalance = told.data.get("imbalance", 1.0)
    if not isinstance(imbalance, int | float):
        raise ConfigError(f"the run says data.imbalance = {imbalance!r}, which is no number")
    plan = Plan(participants, partition, told.seed, definition.held_out, definition.seed, imbalance)
    shards = {shard.name: shard for shard in share_out(load_data(definition), plan).shards}
    if participant not in shards:
        names = ", ".join(list(shards)[:10])
        raise ConfigError(
            f"participant {participant!r} has no share of the data of task {definition.name!r}: {partition} for "
            f"{participants} participants is for {names}{', ...' if len(shards) > 10 else ''}"
        )
    return shards[participant]
