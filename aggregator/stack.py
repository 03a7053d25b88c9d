"""The updates of a round on disk, read side by side and block by block: memory does not grow with their number."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import StateError
from broker.tensors import Arrays, Named, blocks

ROOM = 1 << 19  # values of all updates together that a block holds: 4 MiB in float64

Rows = NDArray[np.float64]  # (updates, values): the same place of every update, sorted by participant


class Stack:
    """One update per participant, shaped like a model, in a file without a name that is gone with the process.

    They come back sorted by participant, so nothing depends on the order in which they came.
    """

    def __init__(self, like: Arrays, directory: Path | None = None) -> None:
        """`directory`: on which disk; None: that of the system's temporary files."""
        self._like = {name: (values.dtype, values.size) for name, values in like.items()}
        self._begins: dict[str, int] = {}
        self._update_bytes = 0
        for name, values in like.items():
            self._begins[name] = self._update_bytes
            self._update_bytes += values.nbytes
        self._directory = directory or Path(tempfile.gettempdir())
        self._places: dict[str, int] = {}

    @cached_property
    def _file(self) -> int:
        """The descriptor of the file, closed with this object."""
        with tempfile.TemporaryFile(dir=self._directory) as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __len__(self) -> int:
        return len(self._places)

    @property
    def participants(self) -> list[str]:
        """Whose updates the rows of a block are, in order."""
        return sorted(self._places)

    def put(self, participant: str, arrays: Named) -> None:
        """Keeps an update, in the place of an older one of its participant. Raises StateError on a full disk."""
        place = self._places.get(participant, len(self._places))
        begin = place * self._update_bytes
        try:
            for name, values in arrays.items():
                self._write(begin + self._begins[name], values.reshape(-1))
        except OSError as error:
            raise self._no_room(error) from error
        self._places[participant] = place

    def _write(self, offset: int, flat: NDArray[Any]) -> None:
        for part in blocks(flat):
            piece = np.ascontiguousarray(flat[part]).data.cast("B")
            while piece:
                written = os.pwrite(self._file, piece, offset)
                offset, piece = offset + written, piece[written:]

    def blocks(self, name: str) -> Iterator[tuple[slice, Rows]]:
        """One tensor of all updates: where each block lies in it, and the values there."""
        dtype, size = self._like[name]
        begins = [self._places[p] * self._update_bytes + self._begins[name] for p in sorted(self._places)]
        most = max(1, ROOM // len(begins))
        for start in range(0, size, most):
            part = slice(start, min(start + most, size))
            rows = np.empty((len(begins), part.stop - start))
            for row, begin in zip(rows, begins, strict=True):
                row[:] = np.frombuffer(self._read(begin, part, dtype.itemsize), dtype)
            yield part, rows

    def one(self, participant: str, name: str) -> NDArray[Any]:
        """One tensor (values,) of one update."""
        dtype, size = self._like[name]
        begin = self._places[participant] * self._update_bytes + self._begins[name]
        return np.frombuffer(self._read(begin, slice(0, size), dtype.itemsize), dtype)

    def _read(self, begin: int, part: slice, item_bytes: int) -> bytes:
        return os.pread(self._file, (part.stop - part.start) * item_bytes, begin + part.start * item_bytes)

    def inner_products(self, names: Iterable[str]) -> NDArray[np.float64]:
        """The Gram matrix (updates, updates) of updates as vectors of these tensors: all that distances need.

        By einsum, whose bits do not depend on how many threads a matrix product would take.
        """
        gram = np.zeros((len(self), len(self)))
        for name in names:
            for _, rows in self.blocks(name):
                for i, row in enumerate(rows):
                    gram[i, i:] += np.einsum("jk,k->j", rows[i:], row)
        return gram + np.triu(gram, 1).T

    def _no_room(self, error: OSError) -> StateError:
        return StateError(
            f"{self._directory}: no room for the updates of a round, {self._update_bytes} bytes each ({error}): "
            "free some"
        )
