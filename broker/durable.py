"""Files that are whole, or not there: after a crash or a power loss it is the old content or the new."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from broker.mapped import Draft
from broker.tensors import Buffer, give_back

WRITTEN_BYTES = 8 << 20  # between two times that a mapped file is given back


def replace_file(path: Path, content: Buffer | Sequence[Buffer], beside: Path, *, synced: bool = True) -> None:
    """Writes the content, perhaps in pieces, to `beside` in the same directory, syncs it, gives it the name `path`,
    and syncs the directory. A draft only gets its name: nothing is copied.

    Raises OSError; then `path` is what it was, and `beside` is gone. What is not `synced` survives the process, but
    perhaps no power loss: that may leave the old content, a damaged file, or none.
    """
    draft = Draft.behind(content)
    try:
        is_there = draft is not None and draft.link(beside)
        with beside.open("rb+" if is_there else "wb") as file:
            if not is_there:
                _write(file, [content] if isinstance(content, Buffer) else content)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        if not synced:  # a file system that knows what is good for us would write out what replaces another
            path.unlink(missing_ok=True)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if synced:
        _sync(path.parent)


def _write(file: BinaryIO, pieces: Sequence[Buffer]) -> None:
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), WRITTEN_BYTES):
            file.write(view[start : start + WRITTEN_BYTES])
            give_back(view[start : start + WRITTEN_BYTES])


def rename_file(path: Path, to: Path) -> None:
    """Gives `path` another name in the same directory, and syncs the directory. Raises OSError."""
    path.replace(to)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
