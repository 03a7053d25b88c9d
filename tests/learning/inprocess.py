"""Federated averaging in one process and a few lines of numpy: what the real thing is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from workers.partition import Shares
from workers.task import Arrays, Scalar, TrainConfig, TrainResult, train_seed
from workers.torch_task import TaskDefinition


def mean_of(results: Sequence[TrainResult]) -> Arrays:
    """The mean weighted by num_examples, in float64."""
    total = sum(result.num_examples for result in results)
    first = results[0].arrays
    return {
        name: (sum(r.arrays[name].astype(np.float64) * r.num_examples for r in results) / total).astype(array.dtype)
        for name, array in first.items()
    }


def fedavg(
    definition: TaskDefinition,
    shares: Shares,
    rounds: int,
    seed: int = 42,
    train: Mapping[str, Scalar] | None = None,
) -> Arrays:
    """The global model after `rounds` rounds with every participant."""
    tasks = {shard.name: definition.bind(shard.train, shard.held_out, shard.name) for shard in shares.shards}
    model = definition.bind().initial()
    for number in range(1, rounds + 1):
        answers = [
            task.train(model, TrainConfig(number, train_seed(seed, name, number), train or {}))
            for name, task in tasks.items()
        ]
        model = mean_of(answers)
    return model


def measure(definition: TaskDefinition, shares: Shares, model: Arrays) -> dict[str, float]:
    """Metrics on the examples that nobody trained on."""
    return definition.bind(held_out=shares.held_out).evaluate(model).metrics
