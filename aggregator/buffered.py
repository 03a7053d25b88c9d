"""Buffered rounds: a version is committed after every K updates, fresh or stale, and nobody waits for anybody
(FedBuff: Nguyen et al., 2022, Algorithm 1).

The tasks of one version are numbered one after the other: a participant's first contribution from that version
answers the first, its second the second, and so on, so that it makes at most `round.turns` from each. Whoever is
still at an older task when a version is committed finishes that first, then goes on with the newest; or, where only
`round.concurrency` work at a time, makes room for somebody else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from aggregator.registry import sample
from aggregator.round import Round, Step, deadline_s
from aggregator.settings import RoundSettings
from broker.head import OpenRound


@dataclass(slots=True)
class Buffer(Round):
    """An open round that any update of a remembered version fills.

    `working` were asked for a task and have not done it yet, among them those who are `elsewhere`, at an older one,
    and are left alone; `turns`: how many tasks of this version each has done. Whoever is invited is told at once,
    so none of it is in the record.
    """

    working: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    turns: dict[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)  # updates that this version has of each
    taken: int = 0

    def __post_init__(self) -> None:
        self.working.update(self.open.cohort)

    @property
    def target(self) -> int:
        return self.settings.buffer

    @property
    def count(self) -> int:
        return self.taken

    @property
    def size(self) -> int:
        return self.settings.buffer

    @property
    def missing(self) -> list[str]:
        return sorted(self.working)

    @property
    def to_tell(self) -> list[str]:
        return sorted(self.working - self.elsewhere)

    def goes_on_after(self, closed: Round) -> None:
        """Whoever worked when that one closed is at an older task now."""
        if self.settings.concurrency:
            self.elsewhere = self.working.intersection(closed.missing)

    @property
    def _all_answered(self) -> bool:
        return not self.working

    @property
    def _all_failed(self) -> bool:
        return bool(self.failed) and not self.working and not self._exhausted

    @property
    def _exhausted(self) -> bool:
        """Whether somebody has done all that may be done from this version, though nobody works any more."""
        return not self.working and any(turn >= self._turns_allowed for turn in self.turns.values())

    @property
    def _turns_allowed(self) -> int:
        return last_task(self.open, self.settings) - self.open.task + 1

    def turn(self, participant: str) -> int:
        return self.turns.get(participant, 0)

    def takes_from(self, participant: str) -> bool:
        """Its turns, and the one it was at when this version was new: more is nobody honest's, and could fill the
        buffer with tasks of all versions that are remembered."""
        return self.made.get(participant, 0) <= self._turns_allowed

    def offers(self, task: int) -> bool:
        return 0 < task <= last_task(self.open, self.settings)

    def awaits(self, participant: str) -> bool:
        return participant in self.working

    def accept(self, participant: str, weight: int, task: int) -> None:
        self.accepted[participant] = self.accepted.get(participant, 0) + weight
        self.made[participant] = self.made.get(participant, 0) + 1
        self.taken += 1
        if task >= self.open.task:
            self.turns[participant] = task - self.open.task + 1
        self._is_done(participant, task)

    def fail(self, participant: str, task: int) -> None:
        if task >= self.open.task:
            self.failed.add(participant)
        self._is_done(participant, task)

    def _is_done(self, participant: str, task: int) -> None:
        """With an older task, it goes on with the newest, which it was told of; unless its place is for others."""
        if task >= self.open.task or self.settings.concurrency:
            self.working.discard(participant)
            self.elsewhere.discard(participant)

    def leave(self, participant: str) -> None:
        self.working.discard(participant)

    def come_back(self, participant: str) -> None:
        """It is invited like everybody who does nothing."""

    def invited(self, live: Collection[str], seed: int) -> Sequence[str]:
        """Who is to be asked now: everybody idle, or, if only some work at a time, in the place of who is done."""
        idle = [p for p in sorted(live) if p not in self.working and p not in self.failed]
        idle = [p for p in idle if self.turn(p) < self._turns_allowed]
        if self.settings.concurrency:
            room = self.settings.concurrency - len(self.working)
            idle = list(sample(idle, room, seed, self.open.task + self.taken)) if room > 0 else []
        self.working.update(idle)
        return idle

    def step(self, now: float) -> Step:
        step = Round.step(self, now)
        return Step.EXTEND if step is Step.WAIT and self._exhausted else step

    def reopen(self, opened: OpenRound) -> None:
        if opened.attempt > self.open.attempt:
            self.failed.clear()
            self.elsewhere.clear()  # whoever was told may not have heard it
            self.working.update(opened.cohort)
        self.open = opened

    def extended(self, now: float, live: Collection[str], reserves: Sequence[str]) -> OpenRound:  # noqa: ARG002
        """The next attempt: the same version, and as many further tasks of it for everybody."""
        attempt, there = self.open.attempt + 1, set(live)
        asked = [p for p in self.open.cohort if p in there] or self.open.cohort
        deadline = now + deadline_s(self.settings, self.open.allowed_s, attempt)
        return self.open.model_copy(update={"attempt": attempt, "cohort": tuple(asked), "deadline": deadline})


def last_task(opened: OpenRound, settings: RoundSettings) -> int:
    """The last of the tasks that an open round offers."""
    if opened.work != "train" or settings.policy != "buffered":
        return opened.task
    return opened.task + settings.turns_allowed * opened.attempt - 1


def asked_first(
    live: Sequence[str], busy: Collection[str], settings: RoundSettings, seed: int, number: int
) -> tuple[str, ...]:
    """Who is asked when a version is new: everybody, or who is still at work and others up to the concurrency."""
    if not settings.concurrency:
        return tuple(sorted(live))
    kept = [p for p in live if p in busy][: settings.concurrency]
    room = settings.concurrency - len(kept)
    others = sample([p for p in live if p not in busy], room, seed, number) if room else ()
    return tuple(sorted((*kept, *others)))
