"""Virtual time: an event loop whose clock stands still while anything is done, and jumps when nothing is.

Aggregator and workers run on it unchanged: whatever waits on the event loop (deadlines, heartbeats, retries,
expiry) waits in virtual seconds, and whoever needs the time of day is given a clock that follows the loop's.

1. While a callback is ready, it is run: that takes no virtual time.
2. Work for a thread is done at once, while the loop waits for it. So it takes no virtual time either, and what is
   handed back never depends on which thread was quick.
3. When nothing is ready, the clock jumps to the next timer.
4. When there is no timer either, nothing would ever happen again: that raises StateError.

So the order of events follows from the program alone: equal programs and seeds do the same at the same virtual
times, however busy the machine is. Threads that bypass the loop (that call `call_soon_threadsafe` on their own
account) are not waited for; nothing in Fluffle does so.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

from broker.errors import StateError

P = ParamSpec("P")
R = TypeVar("R")


class AtOnce(Executor):
    """One thread. Whoever gives it work waits until that is done, so there is never more than one piece of it."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)

    def submit(self, work: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future = self._pool.submit(work, *args, **kwargs)
        wait((future,))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


class VirtualLoop(asyncio.SelectorEventLoop):
    """The event loop of a virtual clock, which begins at 0 seconds."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        self._at_once = AtOnce("virtual")
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def run_in_executor(self, executor: Any, work: Callable[..., R], *args: Any) -> asyncio.Future[R]:  # type: ignore[override]
        """Whatever executor is named: the outcome must not depend on threads."""
        del executor
        return super().run_in_executor(self._at_once, work, *args)

    def close(self) -> None:
        self._at_once.shutdown()
        super().close()


class _Jumping(selectors.DefaultSelector):
    """Where the loop would sleep, time jumps instead. Sockets and signals are still looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise StateError(
                f"virtual time stands still at {self.now:g} s: everybody waits for what nobody will do: report this"
            )
        self.now += max(0.0, timeout)
        return events
