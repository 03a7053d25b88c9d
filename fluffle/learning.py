"""Where the commands meet learning tasks and their data. Most tasks bring torch: import it late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from broker import tensors
from broker.errors import BadMessage, ConfigError, StateError
from broker.topology import AGGREGATOR
from fluffle.config import Config
from fluffle.shards import load_model
from workers.assignment import load_data
from workers.data import Dataset, split
from workers.definition import Definition, Prediction
from workers.partition import Plan, Shares, share_out
from workers.task import Arrays, Evaluation, Scalar, TrainConfig, train_seed
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
        imbalance=config.data.imbalance,
    )
    return share_out(load_data(definition), plan)


def root_of(
    config: Config, definition: Definition, examples: Dataset
) -> tuple[Callable[[Arrays, int], Arrays], Dataset]:
    """How the aggregator trains on the first of the held-out examples, as participants do on theirs; and the rest.

    Raises ConfigError if nothing would be left to evaluate.
    """
    size = config.strategy.root_examples
    if size >= len(examples):
        raise ConfigError(
            f"strategy.root_examples = {size}, but only {len(examples)} examples are held out, and some must be "
            "left to evaluate: lower it"
        )
    places = np.arange(len(examples))
    task = definition.bind(examples.take(places[:size]), None, AGGREGATOR)

    def root(model: Arrays, number: int) -> Arrays:
        from workers.modules import use_threads

        use_threads()  # or the next leader might come to other bits
        seed = train_seed(config.run.seed, AGGREGATOR, number)
        trained = task.train(model, TrainConfig(number, seed, config.train.chosen())).arrays
        return {name: np.asarray(trained[name] - values, values.dtype) for name, values in model.items()}

    return root, examples.take(places[size:])


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
    _check_model(arrays, definition)
    return definition.predict(arrays, inputs)


def initial_model(config: Config, definition: Definition) -> Arrays:
    """What `run.initial` names; empty: the task's own is to be taken. Raises StateError if it is another task's."""
    if not config.run.initial:
        return {}
    arrays = load_model(Path(config.run.initial))
    _check_model(arrays, definition)
    return arrays


def _check_model(arrays: Arrays, definition: Definition) -> None:
    try:
        tensors.check_like(arrays, definition.bind().initial())
    except BadMessage as error:
        raise StateError(f"the model is not one of task {definition.name!r}: {error}") from None
