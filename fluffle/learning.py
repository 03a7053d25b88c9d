"""Where the commands meet learning tasks and their data. Most tasks bring torch: import it late."""

from __future__ import annotations

import numpy as np

from broker import tensors
from broker.errors import BadMessage, StateError
from fluffle.config import Config
from workers.assignment import load_data
from workers.data import Dataset, split
from workers.definition import Definition, Prediction
from workers.partition import Plan, Shares, share_out
from workers.task import Arrays, Evaluation, Scalar
from workers.tasks import find_task

FEW_OWNERS = 32


def task_defaults(name: str) -> dict[str, Scalar]:
    """A task's own settings by dotted name. Raises FluffleError if there is no such task.

    Data with natural owners, such as hospitals, is by default left with them; if they are few, each is a
    participant.
    """
    definition = find_task(name)
    own: dict[str, Scalar] = {f"train.{key}": value for key, value in definition.defaults.items()}
    own |= definition.run_defaults()
    group = load_data(definition).group
    owners = 0 if group is None else len(np.unique(group))
    if owners:
        own["data.partition"] = "natural"
    if 0 < owners <= FEW_OWNERS:
        own["round.participants"] = owners
    return own


def shares_of(config: Config, definition: Definition) -> Shares:
    """The task's data, shared out as the configuration says."""
    plan = Plan(
        participants=config.round.participants,
        partition=config.data.partition,
        seed=config.run.seed,
        held_out=definition.held_out,
        split_seed=definition.seed,
    )
    return share_out(load_data(definition), plan)


def held_out(definition: Definition, most: int | None = None) -> Dataset:
    """The examples that nobody trains on, the first `most`; how the others were shared out does not matter."""
    examples = split(load_data(definition), definition.held_out, definition.seed)[1]
    return examples.take(np.arange(len(examples))[:most])


def evaluate(definition: Definition, arrays: Arrays) -> Evaluation:
    """Measures a model on the held-out examples."""
    return definition.bind(held_out=held_out(definition)).evaluate(arrays)


def predict(definition: Definition, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
    """What the model says of each input, in order; rows that preprocessing drops are left out.

    Raises StateError if the model is not of this task.
    """
    try:
        tensors.check_like(arrays, definition.bind().initial())
    except BadMessage as error:
        raise StateError(f"the model is not one of task {definition.name!r}: {error}") from None
    return definition.predict(arrays, inputs)
