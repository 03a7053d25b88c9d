"""Simulated participants in virtual time: slow, vanishing in the middle of their work, and there only now and then.

A participant that is away has no worker: its task was cancelled, as if the process had been killed, and nobody is
told. Only its journal is left, as a disk would be. When it is back, a new worker joins as any other.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import structlog

from broker.codecs import NONE
from broker.errors import ConfigError
from broker.messages import TrainRound, UpdateReady
from fluffle.config import Config
from fluffle.delays import Delay, Windows, generator, parse_delay, parse_windows
from workers.worker import Worker

log = structlog.get_logger(__name__)

Lag = Callable[[TrainRound, UpdateReady], float]


@dataclass(frozen=True, slots=True)
class Habits:
    """What participants are like. `mbit_s`: of each one's link, up and down; with 0, transfers take no time."""

    seed: int
    delay: Delay
    delay_per: Literal["task", "participant"]
    dropout: float
    back_after: Delay
    windows: Mapping[str, Windows]
    mbit_s: float

    def heartbeat_s(self, asked_s: float) -> float:
        """Heartbeats more frequent than work would be most of what happens in a week of slow work."""
        return max(asked_s, self.delay.median_s)

    def transfer_s(self, told: TrainRound, update: UpdateReady) -> float:
        """How long model and update are on their way, one after the other."""
        if not self.mbit_s:
            return 0.0
        bodies = [body.size_bytes for body in (told.model, update.body) if body is not None]
        return sum(bodies) * 8 / (self.mbit_s * 1e6)


def habits_of(config: Config, participants: Sequence[str]) -> Habits | None:
    """What the settings say of participants; None: time is not virtual. Raises ConfigError for what cannot work."""
    chosen = config.simulation
    if not chosen.virtual_time:
        for name in ("delay", "dropout", "back_after", "available", "mbit_s"):
            if getattr(chosen, name):
                raise ConfigError(f"simulation.{name} is for virtual time: add --virtual-time, or leave it out")
        return None
    _check_possible(config)
    return Habits(
        seed=config.run.seed,
        delay=parse_delay("simulation.delay", chosen.delay or "constant:1", participants),
        delay_per=chosen.delay_per,
        dropout=chosen.dropout,
        back_after=parse_delay("simulation.back_after", chosen.back_after or "constant:60", participants),
        windows=parse_windows(chosen.available, participants, config.run.seed),
        mbit_s=chosen.mbit_s,
    )


def _check_possible(config: Config) -> None:
    if config.broker.url != "memory":
        raise ConfigError(
            "virtual time needs the embedded broker: processes on RabbitMQ have clocks of their own. Leave out "
            "--broker or --virtual-time"
        )
    if config.train.max_seconds:
        raise ConfigError(
            "train.max_seconds cannot end a training in virtual time, which stands still meanwhile: set "
            "train.max_seconds=0 and limit the work by train.max_steps"
        )
    if config.simulation.mbit_s and (len(config.codec.allowed) > 1 or config.codec.down != NONE):
        raise ConfigError(
            "simulation.mbit_s knows neither which of several codecs a worker would choose nor who has the version "
            "before: name one codec.up, and leave codec.down at none"
        )


class Presence:
    """One participant. `run` returns after `stop`, or when it is never there again.

    `make` makes its worker, as often as it comes back. `clock`: seconds that pass as the event loop's do.
    """

    def __init__(
        self, participant: str, habits: Habits, make: Callable[[Lag], Worker], clock: Callable[[], float]
    ) -> None:
        self.participant = participant
        self.dropouts = self.absences = 0  # how often it vanished in the middle of its work, and as a window ended
        self._habits, self._make, self._clock = habits, make, clock
        self._over = asyncio.Event()
        self._worker: Worker | None = None
        self._running: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._back_at = -math.inf
        self._begun = (0, 0)  # a task, and how often it was begun
        self._count = 0  # of works that were begun

    def stop(self) -> None:
        """The run is over: a worker that is there stops as it does anywhere."""
        self._over.set()
        if self._worker is not None:
            self._worker.stop()

    async def run(self) -> None:
        while not self._over.is_set():
            window = self._habits.windows[self.participant].next(max(self._clock(), self._back_at))
            if window is None:
                return
            begin, end = window
            await self._until(begin)
            if not self._over.is_set():
                await self._be_there(end)

    async def _until(self, begin: float) -> None:
        if (pause_s := begin - self._clock()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), pause_s)

    async def _be_there(self, end: float) -> None:
        self._worker = self._make(self._lag_s)
        self._running = asyncio.create_task(self._worker.run(), name=self.participant)
        if end < math.inf:
            self._later(end - self._clock(), self._leave, end)
        try:
            await asyncio.wait((self._running,))
        finally:
            for timer in self._timers:
                timer.cancel()
            self._timers.clear()
            self._running.cancel()
            self._worker = None
        if not self._running.cancelled():
            self._running.result()

    def _lag_s(self, told: TrainRound, update: UpdateReady) -> float:
        """How long a work takes that took no virtual time; it may also be decided that it is never finished."""
        if told.work != "train":
            return 0.0
        task, again = self._begun
        self._begun = (told.task, again + 1 if told.task == task else 0)
        lag_s = self._delay_s() + self._habits.transfer_s(told, update)
        if self._habits.dropout:
            self._draw_fate(lag_s)
        return lag_s

    def _draw_fate(self, lag_s: float) -> None:
        fate = generator(self._habits.seed, "dropout", self.participant, *self._begun)
        if fate.random() < self._habits.dropout:
            back_s = self._habits.back_after.seconds(self.participant, self.dropouts, fate)
            self._later(lag_s * fate.random(), self._drop_out, back_s)

    def _delay_s(self) -> float:
        habits, count = self._habits, self._count
        if habits.delay_per == "participant":
            return habits.delay.seconds(self.participant, 0, generator(habits.seed, "delay", self.participant))
        self._count += 1
        random = generator(habits.seed, "delay", self.participant, *self._begun)
        return habits.delay.seconds(self.participant, count, random)

    def _later(self, seconds: float, vanish: Callable[[float], None], argument: float) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, vanish, argument))

    def _drop_out(self, back_s: float) -> None:
        self.dropouts += 1
        self._vanish(self._clock() + back_s, "dropout")

    def _leave(self, end: float) -> None:
        self.absences += 1
        self._vanish(end, "window")

    def _vanish(self, back_at: float, why: str) -> None:
        log.debug("participant_vanished", participant=self.participant, at_s=self._clock(), why=why)
        self._back_at = back_at
        if self._running is not None:
            self._running.cancel()
