"""From an order to a finished update: pure work, run in a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker import codecs, tensors
from broker.codecs.feedback import check_residual
from broker.codecs.layout import Made
from broker.errors import BadMessage, TaskError
from broker.lora import largest_rank, of_rank
from broker.messages import TrainRound, UpdateReady, Where
from broker.payloads import describe
from broker.travelling import due, shared
from workers.heap import Freed
from workers.journal import Held
from workers.kept import Kept
from workers.own import Own, train_personal
from workers.progress import Progress, Saving, Work
from workers.task import Arrays, LearningTask, TrainConfig, train_seed

CODEC_DRAWS = 1  # tells a codec's random numbers from those of training


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bodies up to `inline_bytes` travel behind their header; larger ones in chunks through the broker, or in parts
    through a claim-check store."""

    inline_bytes: int = 256 << 10
    chunk_bytes: int = 1 << 20
    part_bytes: int = 8 << 20

    def describe(self, blob: tensors.Buffer, model: Where | None, name: str = "") -> Where:
        """How a body travels: the way that the model came. `name`: of one that is handed over in memory."""
        if model is not None and model.where == "inline":  # a control variate may make it larger than the model
            return describe(blob, len(blob), self.chunk_bytes)
        if model is not None and model.where == "url":
            return describe(blob, self.inline_bytes, self.part_bytes, "url", name)
        return describe(blob, self.inline_bytes, self.chunk_bytes)


@dataclass(frozen=True, slots=True)
class Errand:
    """What is to be done with which model, for whom, and how the update is encoded. `residual`: what the updates
    before owe to this one. `own`: what is the participant's own; None: nothing. `progress`: what was
    saved in the middle of some training; `keep` saves more of it. `lora_rank`: of this participant's adapters;
    0: the model's. `room`: where the update is written."""

    told: TrainRound
    blob: tensors.Buffer
    participant: str
    packing: codecs.Packing
    residual: Kept | None = None
    own: Own | None = None
    progress: Progress | None = None
    keep: Callable[[Progress], bool] = lambda _: False
    lora_rank: int = 0
    room: tensors.Room = tensors.in_memory


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished update, and what it owes to the next if it is counted; None: that does not change. `own`: what
    is then the participant's own. How long training and encoding took, with what was before a resumed one."""

    held: Held
    owes: Kept | None = None
    own: Kept | None = None
    trained_s: float = 0.0
    encoded_s: float = 0.0


def carry_out(task: LearningTask, errand: Errand, config: TrainConfig) -> Finished:
    """Trains or evaluates as told; the update is still to be `described`.

    Raises TaskError if the task returns nonsense, and whatever it raises.
    """
    began = config.clock()
    told, base = errand.told, at_rank(tensors.decode(errand.blob), errand.lora_rank)
    body: tensors.Buffer = b""
    codec, owes, keeps, trained_s, encoded_s = codecs.NONE, None, None, 0.0, 0.0
    effective_steps, start_loss, own = 0.0, None, errand.own or Own(told)
    if told.work == "train":
        start = own.model(base)
        saving = Saving(
            Work(told, errand.participant, own, errand.lora_rank), errand.progress, errand.keep, config.clock
        )
        began -= saving.seconds_before
        result = task.train(start, replace(own.config(base, config), save=saving.save, resume=saving.resume))
        _check(result.arrays, base)
        beside = own.beside(base, start, result)
        if kept := own.after(base, result, beside, train_personal(task, told, base, config)):
            keeps = Kept.of(told, kept)
        trained_s = config.clock() - began
        sent = due(shared(base, told.local), told.fragments, told.round)
        arrays = {name: result.arrays[name] for name in sent}
        num_examples, metrics = result.num_examples, result.metrics
        effective_steps, start_loss = float(result.effective_steps), result.start_loss
        del result, kept, saving  # nobody needs all arrays beside the update that they become
        packed = _packed(arrays, sent, errand, config, beside)
        encoded_s = config.clock() - began - trained_s
        body, codec, owes = packed.body, errand.packing.name, _owing(packed, errand)
    else:
        measured = task.evaluate(own.judged(base))
        num_examples, metrics = measured.num_examples, measured.metrics
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TaskError(f"task {task.name!r}: metric {name!r} is {value}: lower train.lr or check the data")
    update = UpdateReady(
        participant=errand.participant,
        run_id=told.run_id,
        epoch=told.epoch,
        task=told.task,
        base_sha256=told.model.sha256 if told.model else "",
        arrays=config.wants if body else "none",
        num_examples=num_examples,
        metrics={name: float(value) for name, value in metrics.items()},
        seconds=config.clock() - began,
        effective_steps=effective_steps,
        start_loss=start_loss,
        lora_rank=_own_rank(errand) if body else 0,
        codec=codec,
    )
    return Finished(Held(update, body), owes, keeps, trained_s, encoded_s)


def at_rank(model: Arrays, rank: int) -> Arrays:
    """What this participant holds of the model. Raises TaskError if the run's adapters have no such rank."""
    if not rank:
        return model
    if rank > (most := largest_rank(model)):
        raise TaskError(f"site.lora_rank = {rank} is above the rank of the run's adapters, {most}: lower it")
    return of_rank(model, rank)


def _own_rank(errand: Errand) -> int:
    """As the update tells it: 0 if nothing is left out."""
    return errand.lora_rank if errand.lora_rank < largest_rank(tensors.decode(errand.blob)) else 0


def described(finished: Finished, model: Where | None, sizes: Sizes, *, handed_over: bool = False) -> Finished:
    """The same with how its body travels, if it has one; hashing that need not keep others from training."""
    held, update = finished.held, finished.held.update
    if held.blob:
        name = f"{update.participant}/{update.run_id}/{update.task}" if handed_over else ""
        held.update = update.model_copy(update={"body": sizes.describe(held.blob, model, name)})
    return finished


def slowed(finished: Finished, lag_s: float) -> Finished:
    """The same work of a machine that took so much longer."""
    held = finished.held
    held.update = held.update.model_copy(update={"seconds": held.update.seconds + lag_s})
    return replace(finished, trained_s=finished.trained_s + lag_s)


def _packed(arrays: Arrays, base: Arrays, errand: Errand, config: TrainConfig, beside: Arrays) -> codecs.Packed:
    """The update that trained arrays, or gradients, come to. What became part of it is taken out of `arrays`.
    `beside`: what travels with it, whatever the codec."""
    if errand.packing.name == codecs.NONE and errand.residual is None:
        freed = Freed()

        def write(name: str, out: NDArray[Any]) -> None:
            if name in beside:
                tensors.copy(beside[name], out)
                return
            _change(name, arrays, base, config, out)
            freed.note(out.nbytes)

        return codecs.Packed(tensors.encode_each({**base, **beside}, write, errand.room), {})
    changes = Made(base, partial(_changed, arrays=arrays, base=base, config=config))
    rng = np.random.default_rng([config.seed, CODEC_DRAWS])
    if errand.residual is None and not errand.packing.codec.feedback:
        return errand.packing.pack(changes, {}, rng, beside=beside)
    whole, due, missed = dict(changes), {}, 0
    if errand.residual is not None:
        due, missed = owed_by(errand.residual, errand.told, whole), errand.residual.missed(errand.told)
    return errand.packing.pack(whole, due, rng, missed, beside)


def owed_by(residual: Kept, told: TrainRound, model: Arrays) -> Arrays:
    """What is owed to an update that answers `told`. Raises BadMessage with the reason why that is nothing."""
    arrays = residual.arrays(told)
    check_residual(arrays, model)
    return arrays


def _owing(packed: codecs.Packed, errand: Errand) -> Kept | None:
    """Whoever owed something and owes nothing any more has paid."""
    pays = bool(packed.residual) or errand.residual is not None
    return Kept.of(errand.told, packed.residual) if pays else None


def train_config(
    told: TrainRound,
    participant: str,
    should_stop: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> TrainConfig:
    """What the task is told; the seed is the participant's own in this round, whatever the attempt."""
    seed = train_seed(told.seed, participant, told.round, told.turn)
    return TrainConfig(told.round, seed, told.settings, told.wants, should_stop=should_stop, clock=clock)


def _check(arrays: Arrays, base: Arrays) -> None:
    try:
        tensors.check_like(arrays, base)
    except BadMessage as bad:
        raise TaskError(f"the task returned other arrays than it was given: {bad}") from None


def _changed(name: str, arrays: Arrays, base: Arrays, config: TrainConfig) -> NDArray[Any]:
    out = np.empty_like(base[name])
    _change(name, arrays, base, config, out)
    return out


def _change(name: str, arrays: Arrays, base: Arrays, config: TrainConfig, out: NDArray[Any]) -> None:
    values = arrays.pop(name)
    if config.wants in ("gradient", "model"):
        tensors.copy(values, out)
        return
    trained, began, change = values.reshape(-1), base[name].reshape(-1), out.reshape(-1)
    for part in tensors.blocks(trained, began, change):
        np.subtract(trained[part], began[part], out=change[part])
