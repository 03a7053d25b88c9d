"""The claim-check store: large bodies lie beside the broker, and messages only say that they do.

A body is a folder named by its sha256, with its pieces as files `00000`, `00001`, … in it, so that
`cat FOLDER/* | sha256sum` prints the folder's name. Where the folder lies follows from the message that names the
body and from its verified sender (`broker/topology.py`), never from a path or a URL in it; where the store is, each
site says itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from broker.errors import BadMessage, ChunksMissing, StoreFailed
from broker.messages import Where
from broker.objects import Objects, open_objects
from broker.payloads import WINDOW, Arrived, Assembly, nothing, piece, send_pieces, tried_together
from broker.retry import Backoff
from broker.tensors import Buffer

NAME = re.compile(r"[a-z0-9-]{1,64}")
PART_S = 300.0  # for one piece: on a slow link it is one of several
ATTEMPTS = 3
LONGEST_PAUSE_S = 2.0

R = TypeVar("R")


class Store:
    """Bodies under places like `default/models/run-1`. Methods raise StoreFailed if the store cannot be reached or
    refuses; that is tried again some times before."""

    hands_over = False  # the bodies themselves: nobody may change them any more

    def __init__(self, objects: Objects, name: str) -> None:
        self.name = name  # for people
        self.keeps = objects.keeps
        self._objects = objects
        self._threads = ThreadPoolExecutor(WINDOW, "store")  # of its own: a share that hangs blocks nothing else

    @classmethod
    def at(cls, url: str, name: str = "") -> Store:
        """The store at a URL, shown as `name`. Raises ConfigError if there can be none."""
        return cls(open_objects(url), name or url)

    async def upload(
        self, place: str, where: Where, blob: Buffer, *, first: int = 0, after: Arrived = nothing
    ) -> None:
        """Stores all pieces of a body from piece `first` on; `after(n)` is told that the first n are there."""

        async def send(index: int, data: memoryview) -> None:
            await self._tried(self._objects.write, _path(place, where, index), data)

        await send_pieces(where, blob, send, first=first, after=after)

    async def fill(self, place: str, assembly: Assembly) -> None:
        """Fetches the pieces that still miss. Raises ChunksMissing if one is not there or not whole, and BadMessage
        if one is longer than it may be; pieces that came stay."""

        async def fetch(index: int) -> None:
            await self._tried(self._fetch, place, assembly, index)
            assembly.has(index)

        missing = sorted(assembly.missing)
        for start in range(0, len(missing), WINDOW):
            await tried_together(fetch(index) for index in missing[start : start + WINDOW])

    def handed_over(self, place: str, where: Where) -> Buffer | None:  # noqa: ARG002
        """The body itself, if it was stored by this process: nothing is copied, and nothing needs to be checked."""
        return None

    async def names(self, place: str) -> list[str]:
        """What lies at a place, by name; what no place can be called is left out."""
        return [name for name in await self._tried(self._objects.names, _checked(place)) if NAME.fullmatch(name)]

    async def delete(self, place: str) -> None:
        """Deletes whatever lies below a place, if anything does."""
        await self._tried(self._objects.delete, _checked(place))

    def close(self) -> None:
        """Lets its threads end."""
        self._threads.shutdown(wait=False)

    def _fetch(self, place: str, assembly: Assembly, index: int) -> None:
        where = assembly.where
        path, into = _path(place, where, index), assembly.buffer[piece(where, index)]
        try:
            size = self._objects.read(path, into)
        except FileNotFoundError:
            size = 0
        if size < len(into):
            raise ChunksMissing(
                f"part {index} of {where.chunks} of {where.sha256[:12]} is not in the store, or not whole"
            )
        if size > len(into):
            raise BadMessage(f"part {index} of {where.sha256[:12]} in the store is longer than {len(into)} bytes")

    async def _tried(self, work: Callable[..., R], *args: object) -> R:
        for failures in range(ATTEMPTS - 1):
            try:
                return await self._once(work, *args)
            except StoreFailed:
                await asyncio.sleep(Backoff(LONGEST_PAUSE_S, failures=failures).next_s())
        return await self._once(work, *args)

    async def _once(self, work: Callable[..., R], *args: object) -> R:
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._threads, partial(work, *args)), PART_S)
        except BadMessage:
            raise
        except Exception as error:  # each file system has errors of its own
            reason = f"{type(error).__name__}: {error}"
            raise StoreFailed(
                f"store {self.name}: {reason}: check that it can be reached and its rights"
            ) from error


class OwnMemory(Store):
    """The store of a process that has the aggregator and all workers in it: bodies are handed over as they are."""

    hands_over = True

    def __init__(self) -> None:
        super().__init__(_Nothing(), "the memory of this process")
        self._bodies: dict[str, memoryview] = {}

    async def upload(
        self, place: str, where: Where, blob: Buffer, *, first: int = 0, after: Arrived = nothing
    ) -> None:
        del first
        self._bodies[f"{_checked(place)}/{where.sha256}"] = memoryview(blob).toreadonly()
        await after(where.chunks)

    def handed_over(self, place: str, where: Where) -> Buffer | None:
        return self._bodies.get(f"{place}/{where.sha256}")

    async def fill(self, place: str, assembly: Assembly) -> None:
        """Comes only after it was not handed over."""
        raise ChunksMissing(f"{assembly.where.sha256[:12]} is not in the store at {place}")

    async def names(self, place: str) -> list[str]:
        below = (path.removeprefix(f"{place}/") for path in self._bodies if path.startswith(f"{place}/"))
        return sorted({path.partition("/")[0] for path in below})

    async def delete(self, place: str) -> None:
        for path in [path for path in self._bodies if path == place or path.startswith(f"{place}/")]:
            del self._bodies[path]


class _Nothing:
    """No file system is behind it."""

    keeps = True

    def write(self, path: str, data: memoryview) -> None:
        raise NotImplementedError

    def read(self, path: str, into: memoryview) -> int:
        raise NotImplementedError

    def names(self, folder: str) -> list[str]:
        raise NotImplementedError

    def delete(self, folder: str) -> None:
        raise NotImplementedError


def _path(place: str, where: Where, index: int) -> str:
    return f"{_checked(place)}/{where.sha256}/{index:05d}"


def _checked(place: str) -> str:
    """The place, if no part of it could lead elsewhere."""
    if not all(NAME.fullmatch(part) for part in place.split("/")):
        raise BadMessage(f"{place!r} is no place in a store")
    return place
