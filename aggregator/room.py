"""Where a running sum lies: in memory, or, where that is too much for the machine, in a file without a name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from broker.mapped import draft

SMALL_BYTES = 64 << 20  # always in memory
SHARE = 0.5  # of what is available may be taken

Zeros = Callable[[int], NDArray[np.int64]]  # so many

log = structlog.get_logger(__name__)


def in_memory(count: int) -> NDArray[np.int64]:
    return np.zeros(count, np.int64)


def where_there_is_room(directory: Path | None, available_bytes: Callable[[], int | None]) -> Zeros:
    """In memory if that takes at most half of what is available, or nobody knows what is; else on that disk."""

    def zeros(count: int) -> NDArray[np.int64]:
        size_bytes, available = 8 * count, None
        if directory is not None and size_bytes > SMALL_BYTES:
            available = available_bytes()
        if directory is None or available is None or size_bytes <= SHARE * available:
            return in_memory(count)
        log.warning("sum_on_disk", bytes=size_bytes, available_bytes=available, directory=str(directory))
        return np.frombuffer(draft(directory, size_bytes), np.int64)

    return zeros


def available_bytes(system: Path = Path("/")) -> int | None:
    """How much memory this process may still take, as Linux tells it and, in a container, the limits of its control
    group (version 2); None where it is not told."""
    found = [_free(system / "proc/meminfo", "MemAvailable:", 1024)]
    group = system / "sys/fs/cgroup"
    with suppress(OSError, ValueError):  # most have no limit, and say "max"
        limit = int((group / "memory.max").read_text())
        found.append(limit - (_free(group / "memory.stat", "anon", 1) or 0))
    return min((free for free in found if free is not None), default=None)


def _free(path: Path, name: str, unit: int) -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        words = (line.split() for line in path.read_text().splitlines())
        return int(next(line[1] for line in words if line[0] == name)) * unit
    return None
