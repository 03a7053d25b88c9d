"""What comes next: pure decisions about opening rounds, from the record, who is live, and the time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from aggregator.buffered import Buffer, asked_first, last_task
from aggregator.pace import allowed_s
from aggregator.progress import evaluation_due, why_finished
from aggregator.registry import sample
from aggregator.round import Round
from aggregator.settings import RoundSettings, RunSettings
from broker.head import HeadRecord, OpenRound

Live = Sequence[str]


def enough(record: HeadRecord, live: int, settings: RunSettings, waited_s: float) -> bool:
    """Whether a round can open with so many: an operator may want that none does."""
    return record.wanted == "run" and live >= needed(record, settings, waited_s)


def needed(record: HeadRecord, settings: RunSettings, waited_s: float) -> int:
    """How many must live. If nobody was there yet, it waits for everybody expected, at most a deadline."""
    rounds = settings.round
    if not record.members and waited_s < rounds.deadline_s:
        return rounds.participants
    return max(1, rounds.quorum or rounds.target)


def opened(
    record: HeadRecord,
    work: Literal["train", "evaluate"],
    live: Live,
    settings: RunSettings,
    now: float,
    busy: Collection[str] = (),
) -> HeadRecord:
    """The record with the next task, for a cohort of those who live; `busy` are at work for an older one."""
    number = record.round + 1 if work == "train" else record.round
    task, sha256 = record.task + 1, record.model.sha256 if record.model else ""
    patience_s = allowed_s(record.pace, settings.round)
    opening = OpenRound(
        work=work,
        round=number,
        attempt=1,
        task=task,
        epoch=record.epoch,
        cohort=_cohort(live, busy, settings, number),
        opened=now,
        deadline=now + patience_s,
        allowed_s=patience_s,
    )
    remembered = 2 * settings.round.staleness_max + 4  # evaluations are tasks too
    lineage = (*record.lineage, (task, record.version, sha256))[-remembered:]
    return record.with_(open=opening, task=last_task(opening, settings.round), lineage=lineage)


def _cohort(live: Live, busy: Collection[str], settings: RunSettings, number: int) -> tuple[str, ...]:
    if settings.round.is_buffered:
        return asked_first(live, busy, settings.round, settings.seed, number)
    return sample(live, settings.round.most_asked, settings.seed, number)


def extended(record: HeadRecord, current: Round, live: Live, settings: RunSettings, now: float) -> HeadRecord:
    """The record with the next attempt at its open round."""
    opened = current.extended(now, live, live)
    return record.with_(open=opened, task=last_task(opened, settings.round))


def open_round(opened: OpenRound, settings: RoundSettings) -> Round:
    """The state machine for what the record says is open."""
    return (Buffer if settings.is_buffered and opened.work == "train" else Round)(opened, settings)


def continued(
    record: HeadRecord, work: str, live: Live, settings: RunSettings, now: float, busy: Collection[str] = ()
) -> HeadRecord:
    """After closed work: the evaluation of its version, the end, the next round, or a wait for participants."""
    if work == "train" and live and evaluation_due(settings, "federated", record.round):
        return opened(record, "evaluate", live, settings, now)
    if why := why_finished(record, settings, now):
        return record.with_(finished=why)
    ready = enough(record, len(live), settings, waited_s=settings.round.deadline_s)
    return opened(record, "train", live, settings, now, busy) if ready else record


def has_room(opening: OpenRound, participant: str, settings: RunSettings) -> bool:
    """Whether one who comes in the middle of a round can still be asked."""
    if settings.round.is_buffered:  # it is invited
        return False
    free = len(opening.cohort) < settings.round.most_asked
    return opening.work == "train" and free and not opening.asks(participant)
