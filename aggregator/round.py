"""The round as a pure state machine: no I/O, no clock, no event loop; `now` is an argument.

A round is OPEN until its target is reached, or its deadline passes with at least the quorum; then it is
closed and the new version committed. A deadline below the quorum starts a further attempt: a longer
deadline, the same task offered again to those missing; what was accepted stays. It never hangs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from aggregator.settings import RoundSettings
from broker.head import HeadRecord, OpenRound
from broker.messages import Fate, UpdateReady, Verdict

Settled = Mapping[str, tuple[int, Fate]]


class Step(Enum):
    """What is to be done with an open round."""

    WAIT = "wait"  # for updates, or for the deadline
    CLOSE = "close"  # enough was accepted: combine and commit
    EXTEND = "extend"  # the deadline passed below the quorum: offer the task again


@dataclass(slots=True)
class Round:
    """An open round and who has answered it. `accepted` maps a participant to the weight of its update."""

    open: OpenRound
    settings: RoundSettings
    accepted: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    _asked: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._asked = frozenset(self.open.cohort)

    @property
    def target(self) -> int:
        """How many updates close the round at once; never more than were asked."""
        return min(self.settings.target or len(self.open.cohort), len(self.open.cohort))

    @property
    def quorum(self) -> int:
        """How many close it at the deadline. A quorum that was set is never lowered."""
        return self.settings.quorum or self.target

    @property
    def missing(self) -> list[str]:
        """Who was asked and has neither delivered nor failed."""
        return [p for p in self.open.cohort if self.awaits(p)]

    @property
    def _all_answered(self) -> bool:
        return len(self.accepted) + len(self.failed) >= len(self.open.cohort)

    def awaits(self, participant: str) -> bool:
        """Whether this one was asked and has neither delivered nor failed."""
        return participant in self._asked and participant not in self.accepted and participant not in self.failed

    def accept(self, participant: str, weight: int) -> None:
        self.accepted[participant] = weight
        self.failed.discard(participant)

    def fail(self, participant: str) -> None:
        if self.awaits(participant):
            self.failed.add(participant)

    def reopen(self, opened: OpenRound) -> None:
        """Goes on with another cohort or attempt; a new attempt offers the task to those who failed, too."""
        if opened.attempt > self.open.attempt:
            self.failed.clear()
        self.open, self._asked = opened, frozenset(opened.cohort)

    def step(self, now: float) -> Step:
        """What is to be done at `now` (Unix seconds)."""
        enough = len(self.accepted) >= self.quorum
        if len(self.accepted) >= max(self.target, self.quorum) or (enough and self._all_answered):
            return Step.CLOSE
        if now < self.open.deadline:
            return Step.WAIT
        return Step.CLOSE if enough else Step.EXTEND

    def extended(self, now: float, live: Collection[str], reserves: Sequence[str]) -> OpenRound:
        """The next attempt: who vanished or failed makes room for live `reserves`; who delivered stays."""
        cohort = self.open.cohort
        kept = [p for p in cohort if p in self.accepted or (p in live and p not in self.failed)]
        fresh = [p for p in reserves if p not in cohort] + [p for p in cohort if p in self.failed and p in live]
        room = max(len(cohort), self.quorum) - len(kept)
        asked = [*kept, *fresh[: max(0, room)]] or cohort
        attempt = self.open.attempt + 1
        return self.open.model_copy(
            update={
                "attempt": attempt,
                "cohort": tuple(sorted(asked)),
                "deadline": now + deadline_s(self.settings, attempt),
            }
        )


def deadline_s(settings: RoundSettings, attempt: int) -> float:
    """Seconds that attempt 1, 2, ... may take: each `deadline_growth` times longer, up to a limit."""
    longest = max(settings.deadline_s, settings.deadline_max_s)
    doublings = min(attempt - 1, 64)
    return min(longest, settings.deadline_s * settings.deadline_growth**doublings)


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
    base = {task: (version, sha256) for task, version, sha256 in head.lineage}.get(update.task)
    if base is None:
        return Judgement("late", f"task {update.task} is older than any that is remembered")
    version, sha256 = base
    if update.base_sha256 != sha256:
        return Judgement("refused", f"base model {update.base_sha256[:12]} is not version {version} of this run")
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


def _late(update: UpdateReady, head: HeadRecord, staleness: int, settings: RoundSettings) -> Judgement:
    training = head.open is not None and head.open.work == "train" and update.arrays != "none"
    folds = settings.late == "fold" and training and staleness <= settings.staleness_max
    return Judgement("late", f"round of task {update.task} had closed", staleness, folds)


def _answers(update: UpdateReady, opened: OpenRound) -> Judgement:
    if update.epoch < opened.epoch:
        return Judgement("refused", f"epoch {update.epoch} is older than task {opened.task} (epoch {opened.epoch})")
    if update.participant not in opened.cohort:
        return Judgement("refused", f"{update.participant} was not asked for task {opened.task}")
    if (update.arrays == "none") != (opened.work == "evaluate"):
        return Judgement("refused", f"arrays {update.arrays!r} do not answer work {opened.work!r}")
    return Judgement("counted")


def weight_of(num_examples: int, staleness: int, settings: RoundSettings) -> int:
    """Integer weight of an update: its capped examples, damped by 1/sqrt(1 + staleness) (FedBuff, Nguyen 2022)."""
    capped = min(num_examples, settings.max_examples)
    return max(1, round(capped / math.sqrt(1 + staleness)))
