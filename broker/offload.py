"""Heavy work leaves the event loop; light work is not worth a thread's hop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LIGHT_BYTES = 256 << 10  # takes well under a millisecond to hash, copy or add up


async def off_loop(size_bytes: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Runs `work`, which goes over about `size_bytes` of data, in a thread unless it is light."""
    if size_bytes <= LIGHT_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def contained(work: Callable[P, R]) -> Callable[P, R]:
    """`work` of a user, for a thread: a StopIteration cannot cross into a coroutine, which would wait for ever."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except StopIteration as stop:
            raise RuntimeError("it raised StopIteration: does a loop use next() on what ended?") from stop

    return run
