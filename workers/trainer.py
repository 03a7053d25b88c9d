"""From an order to a finished update: pure work, run in a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from broker import tensors
from broker.errors import BadMessage, TaskError
from broker.messages import TrainRound, UpdateReady
from broker.payloads import describe
from workers.journal import Held
from workers.task import Arrays, LearningTask, TrainConfig, train_seed


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bodies up to `inline_bytes` travel behind their header, larger ones in chunks."""

    inline_bytes: int = 256 << 10
    chunk_bytes: int = 1 << 20


def carry_out(
    task: LearningTask, told: TrainRound, blob: tensors.Buffer, config: TrainConfig, participant: str, sizes: Sizes
) -> Held:
    """Trains or evaluates `blob` as told. Raises TaskError if the task returns nonsense, and whatever it raises."""
    began = time.monotonic()
    base = tensors.decode(blob)
    body: tensors.Buffer = b""
    if told.work == "train":
        result = task.train(base, config)
        body = tensors.encode(_changes(result.arrays, base, config.wants))
        num_examples, metrics = result.num_examples, result.metrics
    else:
        measured = task.evaluate(base)
        num_examples, metrics = measured.num_examples, measured.metrics
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TaskError(f"task {task.name!r}: metric {name!r} is {value}: lower train.lr or check the data")
    update = UpdateReady(
        participant=participant,
        run_id=told.run_id,
        epoch=told.epoch,
        task=told.task,
        base_sha256=told.model.sha256 if told.model else "",
        arrays=config.wants if body else "none",
        num_examples=num_examples,
        metrics={name: float(value) for name, value in metrics.items()},
        seconds=time.monotonic() - began,
        body=describe(body, sizes.inline_bytes, sizes.chunk_bytes) if body else None,
    )
    return Held(update, body)


def train_config(told: TrainRound, participant: str, should_stop: Callable[[], bool]) -> TrainConfig:
    """What the task is told; the seed is the participant's own in this round, whatever the attempt."""
    seed = train_seed(told.seed, participant, told.round)
    return TrainConfig(told.round, seed, told.settings, told.wants, should_stop)


def _changes(arrays: Arrays, base: Arrays, wants: str) -> Arrays:
    try:
        tensors.check_like(arrays, base)
    except BadMessage as bad:
        raise TaskError(f"the task returned other arrays than it was given: {bad}") from None
    if wants == "gradient":
        return arrays
    return {name: np.subtract(trained, base[name], dtype=trained.dtype) for name, trained in arrays.items()}
