"""A TCP proxy between a client and its broker, to break the network on purpose."""

from __future__ import annotations

import asyncio
import fcntl
import queue
import socket
import struct
import termios
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

BLOCK = 1 << 16


@dataclass
class Proxy:
    """Passes everything on to `target`, a port of this machine, while it is told to."""

    target: int
    port: int = 0
    served: int = 0  # connections so far
    sent: int = 0  # bytes that came from clients, all that the protocol costs included
    received: int = 0  # bytes for them
    _marks: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    _links: set[asyncio.StreamWriter] = field(default_factory=set)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)

    def cut(self) -> None:
        """Every connection is reset; new ones can be made. What lies here unread was sent all the same."""
        for writer in self._links:
            if writer.get_extra_info("sockname")[1] == self.port and not writer.is_closing():
                self.sent += unread(writer.get_extra_info("socket"))
            writer.transport.abort()

    def when_sent(self, count: int, happen: Callable[[], None]) -> None:
        """Calls that once so many bytes were sent."""
        self._marks = sorted([*self._marks, (count, happen)], key=lambda mark: mark[0])

    def freeze(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            others = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return writer.transport.abort()
        self.served += 1
        ends = {writer, others[1]}
        self._links |= ends
        await asyncio.wait(
            [
                asyncio.ensure_future(self._pass(reader, others[1], self._count_sent)),
                asyncio.ensure_future(self._pass(others[0], writer, self._count_received)),
            ]
        )
        self._links -= ends
        return None

    def _count_sent(self, count: int) -> None:
        self.sent += count
        while self._marks and self.sent >= self._marks[0][0]:
            self._marks.pop(0)[1]()

    def _count_received(self, count: int) -> None:
        self.received += count

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Callable[[int], None]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(BLOCK):
                tally(len(data))
                await self._flowing.wait()
                with suppress(OSError):  # what had come before a cut is counted all the same
                    writer.write(data)
                    await writer.drain()
        writer.close()


@asynccontextmanager
async def proxied(target: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(target)
    proxy.thaw()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.thaw()
        proxy.cut()


@contextmanager
def proxied_aside(target: int) -> Iterator[Proxy]:
    """The same in a thread of its own, for whoever waits without an event loop. What marks call is called there."""
    proxies: queue.Queue[tuple[Proxy, Callable[[], object]]] = queue.Queue()

    async def serve() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        async with proxied(target) as proxy:
            proxies.put((proxy, lambda: loop.call_soon_threadsafe(over.set)))
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="proxy")
    thread.start()
    proxy, end = proxies.get(timeout=10)
    try:
        yield proxy
    finally:
        end()
        thread.join()


def unread(connection: socket.socket) -> int:
    """How many bytes have come that nobody has read."""
    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.FIONREAD, b"\0" * 4))[0])
