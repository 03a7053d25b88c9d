"""What a supervisor says to a process, and how the process hears it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(Exception):
    """SIGTERM came before the work was done."""


@contextmanager
def on_signal(stop: Callable[[], object], *numbers: signal.Signals) -> Iterator[None]:
    """Calls `stop` at the first of these signals (SIGTERM if none is named); a second one acts as ever."""
    loop, watched = asyncio.get_running_loop(), numbers or (signal.SIGTERM,)

    def leave() -> None:
        for number in watched:
            loop.remove_signal_handler(number)

    def first() -> None:
        leave()
        stop()

    for number in watched:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        leave()
