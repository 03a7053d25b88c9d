"""Where the commands meet learning tasks and their data. It brings torch: import it late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker import tensors
from broker.errors import BadMessage, StateError
from fluffle.config import Config
from workers.assignment import load_data
from workers.data import Dataset, split
from workers.modules import buffer_patterns, build
from workers.partition import Plan, Shares, share_out
from workers.preprocess import prepare
from workers.task import Arrays, Evaluation, Scalar
from workers.tasks import find_task
from workers.torch_task import CHUNK_ROWS, TaskDefinition

FEW_OWNERS = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one row of the input: a class and its probability, or a measured value (probability None)."""

    row: int
    value: float
    probability: float | None


def task_defaults(name: str) -> dict[str, Scalar]:
    """A task's own settings by dotted name. Raises FluffleError if there is no such task.

    Data with natural owners, such as hospitals, is by default left with them; if they are few, each is a
    participant. What its model holds beside parameters is averaged plainly by every strategy.
    """
    definition = find_task(name)
    own: dict[str, Scalar] = {f"train.{key}": value for key, value in definition.defaults.items()}
    if buffers := buffer_patterns(build(definition.model, definition.seed)):
        own["strategy.buffers"] = ",".join(buffers)
    group = load_data(definition).group
    owners = 0 if group is None else len(np.unique(group))
    if owners:
        own["data.partition"] = "natural"
    if 0 < owners <= FEW_OWNERS:
        own["round.participants"] = owners
    return own


def shares_of(config: Config, definition: TaskDefinition) -> Shares:
    """The task's data, shared out as the configuration says."""
    plan = Plan(
        participants=config.round.participants,
        partition=config.data.partition,
        seed=config.run.seed,
        held_out=definition.held_out,
        split_seed=definition.seed,
    )
    return share_out(load_data(definition), plan)


def held_out(definition: TaskDefinition, most: int | None = None) -> Dataset:
    """The examples that nobody trains on, the first `most`; how the others were shared out does not matter."""
    examples = split(load_data(definition), definition.held_out, definition.seed)[1]
    return examples.take(np.arange(len(examples))[:most])


def evaluate(definition: TaskDefinition, arrays: Arrays) -> Evaluation:
    """Measures a model on the held-out examples."""
    return definition.bind(held_out=held_out(definition)).evaluate(arrays)


def predict(definition: TaskDefinition, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
    """What the model says of each input, in order; rows that preprocessing drops are left out.

    Raises StateError if the model is not of this task.
    """
    module = definition.model()
    try:
        tensors.check_like(arrays, {name: value.numpy() for name, value in module.state_dict().items()})
    except BadMessage as error:
        raise StateError(f"the model is not one of task {definition.name!r}: {error}") from None
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    numbered = replace(inputs, y=np.arange(len(inputs)))
    prepared, _ = prepare(numbered, definition.preprocess)
    module.eval()
    with torch.inference_mode():
        parts = [module(x) for x in torch.split(torch.from_numpy(prepared.x), CHUNK_ROWS)] if len(prepared) else []
    return list(_predictions(definition, prepared.y, parts))


def _predictions(definition: TaskDefinition, rows: NDArray[Any], parts: Sequence[Tensor]) -> Iterator[Prediction]:
    outputs = torch.cat(list(parts)).double() if parts else torch.empty(0, 1)
    if definition.metric == "accuracy":
        outputs = outputs[..., -1] if outputs.ndim == 3 else outputs  # of a sequence, what comes after it
        best = outputs.softmax(dim=1).max(dim=1)
        for row, value, probability in zip(rows, best.indices, best.values, strict=True):
            yield Prediction(int(row), int(value), float(probability))
    else:
        for row, value in zip(rows, outputs.reshape(len(rows)), strict=True):
            yield Prediction(int(row), float(value), None)
