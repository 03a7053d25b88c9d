"""Files as memory, so that a large body need not be held: the system keeps in its cache what there is room for, and
whoever passes over a body gives it back on the way (`tensors.give_back`).
"""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path

from broker.errors import StateError


class Draft(mmap):
    """A file without a name, mapped. It is gone with this object, or the process, unless it is given one."""

    _file: int
    _close: weakref.finalize[..., Draft]

    @classmethod
    def on(cls, directory: Path, size_bytes: int) -> Draft:
        """Raises OSError if the disk has no room for so many bytes, at least one."""
        file = _without_name(directory)
        try:
            os.posix_fallocate(file, 0, size_bytes)  # or a full disk would kill us later, as SIGBUS
            draft = cls(file, size_bytes)
        except BaseException:
            os.close(file)
            raise
        draft._file, draft._close = file, weakref.finalize(draft, os.close, file)
        return draft

    @classmethod
    def behind(cls, blob: object) -> Draft | None:
        """The one that a body lies in, if it has no name yet."""
        found = blob.obj if isinstance(blob, memoryview) else blob
        return found if isinstance(found, cls) and found._close.alive else None

    def link(self, path: Path) -> bool:
        """Gives it a name that nothing has; false if this file system cannot."""
        with suppress(OSError):
            os.link(f"/proc/self/fd/{self._file}", path, src_dir_fd=self._file)  # which has it follow the link
            self._close()
            return True
        return False


def _without_name(directory: Path) -> int:
    """A new file's descriptor. Where the system knows no better it can never be given a name."""
    with suppress(OSError, AttributeError):
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.dup(file.fileno())


def draft(directory: Path, size_bytes: int) -> memoryview:
    """Room on a disk for a large body: stored there as a file, it needs no copy. Raises StateError if there is no
    room."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return memoryview(Draft.on(directory, size_bytes))
    except OSError as error:
        raise StateError(f"{directory}: no room for a body of {size_bytes} bytes ({error}): free some") from error


def read_mapped(path: Path) -> memoryview:
    """The bytes of a file, read when they are looked at. Raises OSError.

    Only for files that nobody writes to: one that is cut short would kill us. To replace it does no harm.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
