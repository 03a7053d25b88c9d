"""What the proxy does to those who talk through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from fluffle.chaos.proxy import SLOW_BLOCK, Proxy, proxied, proxies

BRIEFLY_S = 0.2


@dataclass(frozen=True)
class End:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def hears(self, size: int = 4) -> bytes:
        return await asyncio.wait_for(self.reader.read(size), 10)


@dataclass(frozen=True)
class Talk:
    proxy: Proxy
    here: End
    there: End


@asynccontextmanager
async def talk() -> AsyncIterator[Talk]:
    """Two ends with a proxy between them."""
    arrived: asyncio.Queue[End] = asyncio.Queue()
    server = await asyncio.start_server(lambda *ways: arrived.put_nowait(End(*ways)), "127.0.0.1", 0)
    async with proxied(server.sockets[0].getsockname()[1]) as proxy:
        here = End(*await asyncio.open_connection("127.0.0.1", proxy.port))
        there = await asyncio.wait_for(arrived.get(), 10)
        yield Talk(proxy, here, there)
        for end in (here, there):
            end.writer.close()
            with suppress(ConnectionError):
                await end.writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_everything_passes_both_ways() -> None:
    async with talk() as it:
        it.here.writer.write(b"ping")
        assert await it.there.hears() == b"ping"
        it.there.writer.write(b"pong")
        assert await it.here.hears() == b"pong"


async def test_one_way_ends_and_the_other_goes_on() -> None:
    async with talk() as it:
        it.proxy.close_way("up")
        assert await it.there.hears() == b""
        it.here.writer.write(b"lost")
        it.there.writer.write(b"pong")
        assert await it.here.hears() == b"pong"


async def test_what_was_held_up_arrives_later_and_so_does_the_end() -> None:
    async with talk() as it:
        it.proxy.freeze()
        it.here.writer.write(b"ping")
        it.here.writer.close()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.there.reader.read(4), BRIEFLY_S)
        it.proxy.thaw()
        assert await it.there.hears() == b"ping"
        assert await it.there.hears() == b""


async def test_a_slow_way_gives_everything_in_small_pieces() -> None:
    async with talk() as it:
        it.proxy.slow(1e5)
        it.here.writer.write(b"x")
        await it.there.hears()  # a read that had begun before takes more at once
        it.here.writer.write(bytes(4 * SLOW_BLOCK))
        first = await it.there.hears(4 * SLOW_BLOCK)
        assert len(first) < 4 * SLOW_BLOCK
        rest = await asyncio.wait_for(it.there.reader.readexactly(4 * SLOW_BLOCK - len(first)), 10)
        assert first + rest == bytes(4 * SLOW_BLOCK)


async def test_a_cut_connection_ends_at_both_ends() -> None:
    async with talk() as it:
        it.proxy.cut()
        assert await it.here.hears() == await it.there.hears() == b""


def test_proxies_in_a_thread_of_their_own_are_told_things() -> None:
    with proxies(("p01", "p02"), target=1, host="127.0.0.1") as found:
        assert len(set(found.ports.values())) == 2
        found.tell("p02", lambda proxy: proxy.slow(7.0))
        assert [proxy.bytes_per_s for proxy in found.by_name.values()] == [0.0, 7.0]
    with pytest.raises(RuntimeError):
        found.tell("p02", lambda proxy: proxy.cut())
