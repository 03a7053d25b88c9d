"""Waiting for deliveries: what the inboxes of all brokers have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from functools import partial

from broker.errors import ConnectionLost
from broker.transport import Delivery

TAKEN_IN_A_ROW = 64  # deliveries that one inbox may take before others have their turn


class WaitingInbox(ABC):
    """Waiting for the next delivery. A waiting `get` holds nothing, so cancelling it loses nothing."""

    def __init__(self) -> None:
        self.ended = ""  # why, once it has
        self._taken = 0
        self._waiting: list[asyncio.Future[bool]] = []

    async def get(self, timeout_s: float | None = None) -> Delivery | None:
        self._taken += 1
        if self._taken % TAKEN_IN_A_ROW == 0:
            await asyncio.sleep(0)
        delivery = self._next()
        if delivery is None:
            until = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            while delivery is None and await self._woken(until):
                delivery = self._next()
        return delivery

    async def close(self) -> None:
        self.leave("its inbox was closed: consume or read again")
        self.give_back()

    def wake(self) -> None:
        for waiting in self._waiting:
            _resolve(waiting, come=True)

    def leave(self, why: str) -> None:
        """Ends this inbox: it gets nothing more, and whoever waits for it is told why."""
        if not self.ended:
            self.ended = why
            self._depart()
            self.wake()

    def give_back(self) -> None:  # noqa: B027 - readers of a stream have nothing to give back
        """Returns what was not settled. Comes after `leave`."""

    def _check(self) -> None:
        if self.ended:
            raise ConnectionLost(f"cannot go on with {self._origin}: {self.ended}")

    def _next(self) -> Delivery | None:
        self._check()
        return self._take()

    async def _woken(self, until: float | None) -> bool:
        """Waits until something may have come; False once it is `until`."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[bool] = loop.create_future()
        timer = None if until is None else loop.call_at(until, partial(_resolve, waiting, come=False))
        self._waiting.append(waiting)
        try:
            return await waiting
        finally:
            self._waiting.remove(waiting)
            if timer is not None:
                timer.cancel()

    @property
    @abstractmethod
    def _origin(self) -> str:
        """What it takes from, for messages."""

    @abstractmethod
    def _take(self) -> Delivery | None:
        """The next delivery, if there is one now."""

    @abstractmethod
    def _depart(self) -> None:
        """Stops being served."""


def _resolve(waiting: asyncio.Future[bool], *, come: bool) -> None:
    if not waiting.done():
        waiting.set_result(come)
