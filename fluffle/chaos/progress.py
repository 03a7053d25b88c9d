"""How far a run is, as the logs of all its processes tell: they may die, but not all that they wrote."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from broker.errors import StateError
from fluffle.chaos.processes import LEADER, LOG_ENDED, Event, Process

ROUND_BEHIND = {"round_closed": 0, "caught_up": 0, "work_begun": 1}  # events, and how far their round is ahead


@dataclass(frozen=True, slots=True)
class Closing:
    """When it was first heard that a round is closed, as `time.monotonic` has it."""

    round: int
    at: float


class Progress:
    """Hears every event of every process, from any thread. Whoever waits is woken by the next closed round."""

    def __init__(self, on_round: Callable[[int], None]) -> None:
        self.closings: list[Closing] = []
        self.leader = LEADER  # the process that last said that it leads
        self.on_end: Callable[[Process], object] | None = None  # told of every end
        self._on_round = on_round
        self._trouble: BaseException | None = None
        self._news = threading.Condition()

    @property
    def closed(self) -> int:
        """The newest round that is known to be closed."""
        return self.closings[-1].round if self.closings else 0

    def hear(self, process: Process, event: Event) -> None:
        if event.name == LOG_ENDED:
            if self.on_end:
                self.on_end(process)
        elif event.name == "leading":
            self.leader = process.name
        elif event.name in ROUND_BEHIND:
            self._reach(int(event.fields.get("round", 0)) - ROUND_BEHIND[event.name], event.at)

    def fail(self, trouble: BaseException) -> None:
        """Whoever waits now or later is told by this error."""
        with self._news:
            self._trouble = trouble
            self._news.notify_all()

    def wait_beyond(self, number: int, within_s: float) -> int:
        """The newest closed round, once it is above `number`. Raises StateError if none closes in that time."""
        deadline = time.monotonic() + within_s
        with self._news:
            self._news.wait_for(lambda: self.closed > number or self._trouble, deadline - time.monotonic())
            if self._trouble:
                raise self._trouble
            if self.closed <= number:
                raise StateError(f"no round was closed after round {number} for {within_s:g} s")
            return self.closed

    def _reach(self, number: int, at: float) -> None:
        with self._news:
            before = self.closed
            if number <= before:
                return
            self.closings.append(Closing(number, at))
            self._news.notify_all()
        for closed in range(before + 1, number + 1):
            self._on_round(closed)
