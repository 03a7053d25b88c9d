"""A thread for work that must not be done on the event loop, one piece after the other: training, or a disk.

Many participants may share a process, and a piece of work may take microseconds: then waking the event loop for
every finished one costs more than the work. So whatever is finished until the loop looks is told together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")
Outcome = tuple["asyncio.Future[Any]", Any, BaseException | None]


class Lane:
    """Does one piece of work after the other. Used from one event loop at a time.

    Without locks: appending to a deque and taking from it are whole steps, and the flag is put down before the loop
    looks and put up after something was appended, so nothing is missed.
    """

    def __init__(self, name: str, pool: Executor | None = None) -> None:
        """`pool`: another one than a thread of its own; it must do one thing after the other, too."""
        self._pool = pool or ThreadPoolExecutor(1, name)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finished: deque[Outcome] = deque()
        self._waking = False  # the loop knows that something is finished, and has not looked yet

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises. What was not begun when this is cancelled is not done."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # the one before may have ended before it looked
            self._loop, self._finished, self._waking = loop, deque(), False
        done: asyncio.Future[Result] = loop.create_future()
        self._pool.submit(partial(self._do, done, work))
        return await done

    def shutdown(self) -> None:
        """Returns once nothing is done any more."""
        self._pool.shutdown()

    def _do(self, done: asyncio.Future[Any], work: Callable[[], Any]) -> None:
        if done.cancelled():
            return
        self._finished.append(_outcome(done, work))
        if not self._waking and self._loop is not None:
            self._waking = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._waking = False
        while self._finished:
            done, result, error = self._finished.popleft()
            if done.done():  # cancelled meanwhile
                continue
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)


def _outcome(done: asyncio.Future[Any], work: Callable[[], Any]) -> Outcome:
    try:
        return done, work(), None
    except BaseException as error:  # it is raised where it is awaited
        return done, None, error
