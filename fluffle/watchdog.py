"""A process whose event loop hangs is of no use, and nobody notices from outside: so it ends itself.

A blocking call or a deadlock in its thread stops everything: heartbeats, deliveries, deadlines, the endpoint. Here
a thread asks the loop again and again for a sign of life. What runs in other threads (training, sums) does not
matter, unless it holds Python's interpreter lock all the time: then this thread is stopped, too.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import structlog

log = structlog.get_logger(__name__)

EXIT_CODE = os.EX_SOFTWARE  # 70, by the convention of sysexits.h
SLICES = 10  # a process that was frozen for long wakes up within one of them, and gets the others to answer
LAST_WORDS_S = 5.0


@contextmanager
def watched(limit_s: float) -> Iterator[None]:
    """Ends the process if the loop does not answer for `limit_s` while the block runs; 0 watches nothing."""
    if not limit_s:
        yield
        return
    over = threading.Event()
    watch = partial(_watch, asyncio.get_running_loop(), threading.get_ident(), limit_s, over)
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(loop: asyncio.AbstractEventLoop, thread: int, limit_s: float, over: threading.Event) -> None:
    slice_s = limit_s / SLICES
    while not over.wait(slice_s):
        answered = threading.Event()
        try:
            loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # it is closed
            return
        if not any(answered.wait(slice_s) for _ in range(SLICES)) and not over.is_set():
            _end(thread, limit_s)


def _end(thread: int, limit_s: float) -> None:
    """Says where the loop hangs, unless that hangs, too; then ends the process as `kill -9` would."""
    frame = sys._current_frames().get(thread)
    stack = "".join(traceback.format_stack(frame)) if frame else ""
    tell = partial(log.critical, "event_loop_stuck", limit_s=limit_s, exit_code=EXIT_CODE, stack=stack)
    words = threading.Thread(target=tell, name="last words", daemon=True)
    words.start()
    words.join(LAST_WORDS_S)
    os._exit(EXIT_CODE)
