"""Messages that end whoever reads them: a defect of ours, or an attack on what we are built of.

A process that was killed by a message cannot say so. So it notes which one it is about to read, in a few bytes of
the run directory that outlive it, and takes the note back when it has read it, or lost its lead. Whoever leads next
finds the note. A message that ended several leaders here is refused unread; who is killed now and then is not
suspected, because it was reading something else each time.
"""

from __future__ import annotations

import json
import mmap
import os
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from broker.durable import replace_file
from broker.errors import BadMessage, FluffleError, StateError

MOST_ENDED = 5  # leaders of this run directory, by one message
NOTHING = 0
BYTES = 8  # of the note: the offset plus one, or nothing

log = structlog.get_logger(__name__)


class Poison:
    """What was being read, and how many leaders each message ended. Opening and `count` block; the rest not."""

    def __init__(self, directory: Path) -> None:
        self._counts = directory / "poison.json"
        self._ended: dict[str, int] = {}
        path = directory / "reading"
        try:
            with path.open("a+b") as file:
                os.posix_fallocate(file.fileno(), 0, BYTES)  # or a full disk would kill us later, as SIGBUS
                self._note = mmap.mmap(file.fileno(), BYTES)
        except OSError as error:
            raise StateError(f"{path}: cannot be written ({error.strerror or error}): check the disk") from error

    def count(self, run_id: str) -> None:
        """Called by whoever leads now: what the leader before was reading, if anything, is counted against it."""
        self._ended = self._load()
        noted = int.from_bytes(self._note[:], "little")
        if noted != NOTHING:
            key = f"{run_id}/{noted - 1}"
            self._ended[key] = self._ended.get(key, 0) + 1
            log.warning("leader_ended_reading", run_id=run_id, offset=noted - 1, times=self._ended[key])
            self._store()
        self._write(NOTHING)

    @contextmanager
    def reading(self, run_id: str, offset: int) -> Iterator[None]:
        """Around the reading of one message. Raises BadMessage if it is not to be read."""
        if self.is_refused(run_id, offset):
            raise BadMessage(f"it was not read again: it ended {MOST_ENDED} leaders")
        self._write(offset + 1)
        try:
            yield
        except (FluffleError, CancelledError):
            self._write(NOTHING)
            raise
        self._write(NOTHING)

    def is_refused(self, run_id: str, offset: int) -> bool:
        return self._ended.get(f"{run_id}/{offset}", 0) >= MOST_ENDED

    def _write(self, noted: int) -> None:
        self._note[:] = noted.to_bytes(BYTES, "little")

    def _store(self) -> None:
        try:
            replace_file(self._counts, json.dumps(self._ended).encode(), self._counts.with_suffix(".new"))
        except OSError as error:  # the note stays, so it is counted once there is room
            raise StateError(f"{self._counts}: cannot be written ({error.strerror or error}): free some") from error

    def _load(self) -> dict[str, int]:
        try:
            found = json.loads(self._counts.read_bytes())
            return {str(key): int(times) for key, times in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.error("poison_counts_unreadable", file=str(self._counts), reason=str(error))
            return {}
