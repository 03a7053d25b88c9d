"""The thread that trains, whoever's turn it is.

Many participants may share a process, and training may take microseconds: then waking the event loop for every
finished piece of work costs more than the work. So what is finished within a moment is told together.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")
Outcome = tuple["asyncio.Future[Any]", Any, BaseException | None]

TOLD_EVERY_S = 0.002  # while there is more to do


class TrainingThread:
    """Does one piece of work after the other. Used from one event loop at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "train")
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._running = False
        self._lock = threading.Lock()

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises. What was not begun when this is cancelled is not done."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        with self._lock:
            self._waiting.append((done, work))
            idle, self._running = not self._running, True
        if idle:
            self._pool.submit(self._work, loop)
        return await done

    def shutdown(self) -> None:
        """Returns once nothing is done any more."""
        self._pool.shutdown()

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        finished: list[Outcome] = []
        told_at = time.monotonic()
        while (piece := self._next()) is not None:
            done, work = piece
            if not done.cancelled():
                finished.append(_outcome(done, work))
            if time.monotonic() - told_at > TOLD_EVERY_S:
                _tell(loop, finished)
                finished, told_at = [], time.monotonic()
        _tell(loop, finished)

    def _next(self) -> tuple[asyncio.Future[Any], Callable[[], Any]] | None:
        with self._lock:
            self._running = bool(self._waiting)
            return self._waiting.popleft() if self._waiting else None


def _outcome(done: asyncio.Future[Any], work: Callable[[], Any]) -> Outcome:
    try:
        return done, work(), None
    except BaseException as error:  # it is raised where it is awaited
        return done, None, error


def _tell(loop: asyncio.AbstractEventLoop, finished: Sequence[Outcome]) -> None:
    if finished:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(partial(_resolve, finished))


def _resolve(finished: Sequence[Outcome]) -> None:
    for done, result, error in finished:
        if done.done():  # cancelled meanwhile
            continue
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)
