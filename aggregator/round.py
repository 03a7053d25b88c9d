"""The round as a pure state machine: no I/O, no clock, no event loop; `now` is an argument.

A round is OPEN until its target is reached, or its deadline passes with at least the quorum; then it is
closed and the new version committed. A deadline below the quorum starts a further attempt: a longer
deadline, the same task offered again to those missing; what was accepted stays. It never hangs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from aggregator.settings import RoundSettings
from broker.head import OpenRound


class Step(Enum):
    """What is to be done with an open round."""

    WAIT = "wait"  # for updates, or for the deadline
    CLOSE = "close"  # enough was accepted: combine and commit
    EXTEND = "extend"  # the deadline passed below the quorum, or all failed: offer the task again
    GIVE_UP = "give up"  # everybody who was asked failed, time and again: trying on is pointless


MOST_FAILURES = 3  # attempts in which everybody fails


@dataclass(slots=True)
class Round:
    """An open round and who has answered it. `accepted` maps a participant to the weight of its update."""

    open: OpenRound
    settings: RoundSettings
    accepted: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)

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
        """Who was asked and has neither delivered, nor failed, nor left."""
        return [p for p in self.open.cohort if self.awaits(p)]

    @property
    def to_tell(self) -> list[str]:
        """Who is to be told of it, among those who miss."""
        return self.missing

    def goes_on_after(self, closed: Round) -> None:
        """Learns from the round before, if that still matters."""

    @property
    def count(self) -> int:
        """How many updates it has."""
        return len(self.accepted)

    @property
    def size(self) -> int:
        """How many updates it would have if everybody delivered."""
        return len(self.open.cohort)

    @property
    def is_full(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.count >= max(self.target, self.quorum)

    @property
    def _all_answered(self) -> bool:
        return len(self.accepted) + len(self.failed) + len(self.left) >= len(self.open.cohort)

    @property
    def _all_failed(self) -> bool:
        return len(self.failed) >= len(self.open.cohort)

    def turn(self, participant: str) -> int:  # noqa: ARG002 - everybody is asked for the same
        """Which of the tasks that this round offers is a participant's next: 0 is the first."""
        return 0

    def takes_from(self, participant: str) -> bool:  # noqa: ARG002 - a task counts once anyway
        """Whether it may still add to this round."""
        return True

    def offers(self, task: int) -> bool:
        """Whether an update for that task can still be part of it."""
        return task == self.open.task

    def awaits(self, participant: str) -> bool:
        """Whether this one was asked and has neither delivered, nor failed, nor left."""
        answers = (self.accepted, self.failed, self.left)
        return self.open.asks(participant) and not any(participant in answered for answered in answers)

    def accept(self, participant: str, weight: int, task: int) -> None:  # noqa: ARG002 - there is one task
        self.accepted[participant] = weight
        self.failed.discard(participant)
        self.left.discard(participant)

    def fail(self, participant: str, task: int) -> None:  # noqa: ARG002 - there is one task
        if self.awaits(participant):
            self.failed.add(participant)

    def leave(self, participant: str) -> None:
        """Nobody waits for who left, unless it is back in time."""
        if self.awaits(participant):
            self.left.add(participant)

    def come_back(self, participant: str) -> None:
        self.left.discard(participant)

    def invited(self, live: Collection[str], seed: int) -> Sequence[str]:  # noqa: ARG002 - see buffered.py
        """Who is to be asked beyond those who were told, now that somebody is done. They count as told."""
        return ()

    def reopen(self, opened: OpenRound) -> None:
        """Goes on with another cohort or attempt; a new attempt offers the task to those who failed, too."""
        if opened.attempt > self.open.attempt:
            self.failed.clear()
            self.left.clear()
        self.open = opened
        self.failed.intersection_update(opened.cohort)
        self.left.intersection_update(opened.cohort)

    def without(self, participant: str) -> OpenRound:
        """The round when one is not asked any more. What it delivered stays; a round is never nobody's."""
        others = tuple(p for p in self.open.cohort if p != participant)
        stays = participant in self.accepted or not others
        return self.open if stays else self.open.model_copy(update={"cohort": others})

    def step(self, now: float) -> Step:
        """What is to be done at `now` (Unix seconds)."""
        enough = self.count >= self.quorum
        if self.is_full or (enough and self._all_answered):
            return Step.CLOSE
        if self._all_failed:
            return Step.EXTEND if self.open.attempt < MOST_FAILURES else Step.GIVE_UP
        if now < self.open.deadline:
            return Step.WAIT
        return Step.CLOSE if enough else Step.EXTEND

    def extended(self, now: float, live: Collection[str], reserves: Sequence[str]) -> OpenRound:
        """The next attempt: who vanished or failed makes room for live `reserves`; who delivered stays."""
        cohort = self.open.cohort
        there = set(live)
        kept = [p for p in cohort if p in self.accepted or (p in there and p not in self.failed)]
        others = [p for p in reserves if not self.open.asks(p)]
        fresh = others + [p for p in cohort if p in self.failed and p in there]
        room = max(len(cohort), self.quorum) - len(kept)
        asked = [*kept, *fresh[: max(0, room)]] or cohort
        attempt = self.open.attempt + 1
        return self.open.model_copy(
            update={
                "attempt": attempt,
                "cohort": tuple(sorted(asked)),
                "deadline": now + deadline_s(self.settings, self.open.allowed_s, attempt),
            }
        )


def reckoned(opened: OpenRound, settings: RoundSettings, now: float) -> OpenRound:
    """The round for a leader whose clock may differ from that which set the deadline: from `now` on, it is never
    further away than an attempt may take. A clock that was hours ahead would keep everybody waiting for hours."""
    latest = now + deadline_s(settings, opened.allowed_s, opened.attempt)
    return opened if opened.deadline <= latest else opened.model_copy(update={"deadline": latest})


def deadline_s(settings: RoundSettings, first_s: float, attempt: int) -> float:
    """Seconds that attempt 1, 2, ... may take: each `deadline_growth` times longer, up to a limit."""
    longest = max(first_s, settings.deadline_max_s)
    doublings = min(attempt - 1, 64)
    return min(longest, first_s * settings.deadline_growth**doublings)
