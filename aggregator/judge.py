"""What an update is worth, decided from the record alone: delivered often, counted once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.settings import RoundSettings
from broker.head import HeadRecord, OpenRound
from broker.messages import Fate, UpdateReady, Verdict

Settled = Mapping[str, tuple[int, Fate]]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What an update is before its arrays are looked at. `folds`: a late one that still adds to the sum."""

    verdict: Verdict
    reason: str = ""
    staleness: int = 0
    folds: bool = False


def judge(update: UpdateReady, head: HeadRecord, settled: Settled, settings: RoundSettings) -> Judgement:
    """Decides from the record alone whether an update counts. Delivered often, counted once."""
    if refusal := _foreign(update, head):
        return Judgement("refused", refusal)
    last_task, last_verdict = settled.get(update.participant, (0, "refused"))
    if update.task < last_task or (update.task == last_task and last_verdict != "refused"):
        return Judgement("duplicate", f"task {update.task} of {update.participant} was decided before")
    base = head.base_of(update.task)
    if base is None:
        return Judgement("late", f"task {update.task} is older than any that is remembered")
    version, sha256 = base
    if update.base_sha256 != sha256:
        return Judgement("refused", f"base model {update.base_sha256[:12]} is not version {version} of this run")
    if settings.is_buffered and head.open is not None and head.open.work == "train":
        return _buffered(update, head.open, head.version - version, settings)
    if head.open is None or update.task != head.open.task:
        return _late(update, head, head.version - version, settings)
    return _answers(update, head.open)


def _foreign(update: UpdateReady, head: HeadRecord) -> str:
    if update.run_id != head.run_id:
        return f"unknown run {update.run_id!r}: the run here is {head.run_id!r}"
    if update.epoch > head.epoch or not 1 <= update.task <= head.task:
        return f"epoch {update.epoch}, task {update.task} was never offered by this run"
    if (update.arrays == "none") != (update.body is None):
        return "an update names arrays exactly if it has a body"
    return ""


def _buffered(update: UpdateReady, opened: OpenRound, staleness: int, settings: RoundSettings) -> Judgement:
    """Any update fills the buffer, unless its version is too old."""
    if update.arrays == "none":
        return Judgement("refused", "arrays 'none' do not answer work 'train'")
    if update.task >= opened.task and update.epoch < opened.epoch:
        return Judgement("refused", f"epoch {update.epoch} is older than task {opened.task} (epoch {opened.epoch})")
    if staleness > settings.staleness_max:
        older = f"{staleness} versions old, more than round.staleness_max = {settings.staleness_max}"
        return Judgement("late", f"task {update.task} is {older}", staleness)
    return Judgement("counted", staleness=staleness)


def _late(update: UpdateReady, head: HeadRecord, staleness: int, settings: RoundSettings) -> Judgement:
    training = head.open is not None and head.open.work == "train" and update.arrays != "none"
    folds = settings.late == "fold" and training and staleness <= settings.staleness_max
    return Judgement("late", f"round of task {update.task} had closed", staleness, folds)


def _answers(update: UpdateReady, opened: OpenRound) -> Judgement:
    if update.epoch < opened.epoch:
        return Judgement("refused", f"epoch {update.epoch} is older than task {opened.task} (epoch {opened.epoch})")
    if not opened.asks(update.participant):
        return Judgement("refused", f"{update.participant} was not asked for task {opened.task}")
    if (update.arrays == "none") != (opened.work == "evaluate"):
        return Judgement("refused", f"arrays {update.arrays!r} do not answer work {opened.work!r}")
    return Judgement("counted")


def weight_of(num_examples: int, settings: RoundSettings) -> int:
    """Integer weight of an update: its examples, capped, or 1 where all weigh the same."""
    return min(num_examples, settings.weight_max)


def damping(staleness: int) -> float:
    """s(tau) = 1/sqrt(1 + tau), by which a stale update is scaled (FedBuff, Nguyen et al., 2022, Alg. 1)."""
    return 1 / math.sqrt(1 + staleness)
