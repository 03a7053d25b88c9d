"""Giving memory back. The C library keeps blocks below 32 MB that were freed, for the next ones of that size; while
a large update is written, its tensors are freed one by one, and nothing of that size comes again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

TRIMMED_EVERY = 16 << 20  # bytes that were freed


@cache
def _trim() -> Callable[[int], int] | None:
    """What glibc has for it; other C libraries do without."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return found


class Freed:
    """Counts what is freed, and gives it back now and then."""

    def __init__(self) -> None:
        self._bytes = 0

    def note(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        if self._bytes >= TRIMMED_EVERY and (trim := _trim()):
            self._bytes = 0
            trim(0)
