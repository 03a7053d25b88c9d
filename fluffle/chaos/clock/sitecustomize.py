"""A wrong wall clock. Python imports this first in a process that `Process.start` gave a clock of its own.

Everything that Python itself can tell of the time of day is off by so many seconds; what only measures durations
(`time.monotonic`) is right, as in a machine whose clock was set wrong. Files keep the right times: their dates come
from the kernel. (libfaketime would do the same for C code, but is seldom installed.)
"""

from __future__ import annotations

import datetime
import os
import time

OFF_S = "CHAOS_CLOCK_OFF_S"


def set_wrong(off_s: int) -> None:
    """For the whole process, once."""
    true_time, true_time_ns, true_gettime = time.time, time.time_ns, time.clock_gettime

    class Wrong(datetime.datetime):
        """Asks `time.time`, unlike the one that it stands for."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Wrong:
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> Wrong:
            return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

    def gettime(clock: int) -> float:
        return true_gettime(clock) + (off_s if clock == time.CLOCK_REALTIME else 0)

    time.time = lambda: true_time() + off_s
    time.time_ns = lambda: true_time_ns() + off_s * 10**9
    time.clock_gettime = gettime
    datetime.datetime = Wrong  # type: ignore[misc]


if os.environ.get(OFF_S):
    set_wrong(int(os.environ[OFF_S]))
