"""A TCP proxy between somebody and the broker, to break the network on purpose."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Literal

BLOCK = 1 << 16
SLOW_BLOCK = 1 << 10
BLOCKS_PER_S = 100  # of a slow link: shorter pauses than 10 ms are never kept
LISTENING_S = 30.0
FAREWELL_S = 5.0

Way = Literal["up", "down"]  # to the broker, and from it


@dataclass(eq=False)
class Link:
    """One connection: `up` is written to the broker, `down` to whoever connected."""

    up: asyncio.StreamWriter
    down: asyncio.StreamWriter
    closed: set[Way] = field(default_factory=set)


@dataclass
class Proxy:
    """Passes everything on to `target`, a port of `host`, while it is told to."""

    target: int
    port: int = 0
    host: str = "127.0.0.1"
    served: int = 0  # connections so far
    bytes_per_s: float = 0.0  # each way of each connection; 0: as fast as it goes
    sent: int = 0  # bytes that came from those who connected, all that the protocol costs included
    received: int = 0  # bytes for them
    _marks: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    _links: set[Link] = field(default_factory=set)
    _serving: set[asyncio.Task[Any]] = field(default_factory=set)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)

    def cut(self) -> None:
        """Every connection is closed at both ends; new ones can be made. What lies here unread was sent, too."""
        for link in self._links:
            if not link.down.is_closing():
                self.sent += unread(link.down.get_extra_info("socket"))
            link.up.transport.abort()
            link.down.transport.abort()

    def when_sent(self, count: int, happen: Callable[[], None]) -> None:
        """Calls that once so many bytes were sent."""
        self._marks = sorted([*self._marks, (count, happen)], key=lambda mark: mark[0])

    def close_way(self, way: Way) -> None:
        """Every connection ends in this direction; the other one goes on until somebody closes it, too."""
        for link in self._links:
            link.closed.add(way)
            with suppress(OSError):
                (link.up if way == "up" else link.down).write_eof()

    def freeze(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def slow(self, bytes_per_s: float) -> None:
        """0 ends it."""
        self.bytes_per_s = bytes_per_s

    async def end(self) -> None:
        """Cuts everything, and returns when nobody is served any more."""
        self.thaw()
        self.cut()
        if self._serving:
            await asyncio.wait(self._serving, timeout=FAREWELL_S)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the listening socket calls for each connection."""
        task = asyncio.current_task()
        assert task
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            broker_reader, broker_writer = await asyncio.open_connection(self.host, self.target)
        except OSError:
            return writer.transport.abort()
        self.served += 1
        link = Link(broker_writer, writer)
        self._links.add(link)
        ways = (self._pass(reader, link, "up"), self._pass(broker_reader, link, "down"))
        await asyncio.wait([asyncio.ensure_future(way) for way in ways])
        self._links.remove(link)
        return None

    async def _pass(self, reader: asyncio.StreamReader, link: Link, way: Way) -> None:
        writer = link.up if way == "up" else link.down
        with suppress(OSError):
            while data := await reader.read(self._block()):
                self._tally(way, len(data))
                await self._flowing.wait()
                if way not in link.closed:
                    with suppress(OSError):  # what had come before a cut is counted all the same
                        writer.write(data)
                        await writer.drain()
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
        await self._flowing.wait()  # an end is no news either while nothing passes
        writer.close()

    def _block(self) -> int:
        return max(SLOW_BLOCK, int(self.bytes_per_s) // BLOCKS_PER_S) if self.bytes_per_s else BLOCK

    def _tally(self, way: Way, count: int) -> None:
        if way == "down":
            self.received += count
            return
        self.sent += count
        while self._marks and self.sent >= self._marks[0][0]:
            self._marks.pop(0)[1]()


def unread(connection: socket.socket) -> int:
    """How many bytes have come that nobody has read."""
    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.FIONREAD, b"\0" * 4))[0])


@asynccontextmanager
async def proxied(target: int, host: str = "127.0.0.1") -> AsyncIterator[Proxy]:
    proxy = Proxy(target, host=host)
    proxy.thaw()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()


@dataclass(frozen=True)
class Proxies:
    """One for each name, on an event loop in a thread of its own. Any thread may tell them something."""

    by_name: dict[str, Proxy]
    loop: asyncio.AbstractEventLoop
    over: asyncio.Event

    @property
    def ports(self) -> dict[str, int]:
        return {name: proxy.port for name, proxy in self.by_name.items()}

    def tell(self, name: str, what: Callable[[Proxy], None]) -> None:
        """Returns once it is done."""
        done: Future[None] = Future()

        def tell() -> None:
            what(self.by_name[name])
            done.set_result(None)

        self.loop.call_soon_threadsafe(tell)
        done.result(LISTENING_S)


@contextmanager
def proxies(names: Sequence[str], target: int, host: str) -> Iterator[Proxies]:
    """They serve until the block ends."""
    ready: Future[Proxies] = Future()
    thread = Thread(target=lambda: asyncio.run(_serve(names, target, host, ready)), name="proxies", daemon=True)
    thread.start()
    found = ready.result(LISTENING_S)
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(found.over.set)
        thread.join()


@contextmanager
def proxied_aside(target: int) -> Iterator[Proxy]:
    """One in a thread of its own, for whoever waits without an event loop. What marks call is called there."""
    with proxies(("one",), target, "127.0.0.1") as found:
        yield found.by_name["one"]


async def _serve(names: Sequence[str], target: int, host: str, ready: Future[Proxies]) -> None:
    async with AsyncExitStack() as stack:
        by_name = {name: await stack.enter_async_context(proxied(target, host)) for name in names}
        found = Proxies(by_name, asyncio.get_running_loop(), asyncio.Event())
        ready.set_result(found)
        await found.over.wait()
