"""A broker that is short of memory or disk takes nothing more, says so, and goes on when it can."""

from __future__ import annotations

import asyncio

import pytest
from contract_steps import LOW, Connect, Shortage, bodies, is_quiet, receive, send

from broker.errors import ConnectionLost, PublishFailed
from broker.transport import Queue, Transport

pytestmark = pytest.mark.timeout(120)


async def publish_until_blocked(transport: Transport, queue: str) -> tuple[list[bytes], str]:
    """What was confirmed, and why no more is. A broker may take a little before it blocks."""
    confirmed: list[bytes] = []
    while True:
        body = b"%d" % len(confirmed)
        try:
            await transport.publish("", queue, body, timeout_s=2.0)
        except PublishFailed as failed:
            return confirmed, str(failed)
        confirmed.append(body)


async def test_who_publishes_is_told_why_it_is_blocked_and_goes_on_after(
    connect: Connect, transport: Transport, queue: str, short_of_memory: Shortage
) -> None:
    await transport.declare(Queue(queue))
    await send(transport, queue, b"before")
    assert transport.blocked == ""
    reader = await connect()
    inbox = await reader.consume(queue)
    async with short_of_memory():
        confirmed, why = await publish_until_blocked(transport, queue)
        assert f"blocks publishers: {LOW}" in why
        assert transport.blocked == LOW
        assert reader.blocked == ""
        assert await bodies(inbox, 1 + len(confirmed)) == [b"before", *confirmed]
        waiting = [asyncio.create_task(transport.publish("", queue, b, timeout_s=60.0)) for b in (b"a", b"b", b"c")]
        assert await is_quiet(inbox)
    await asyncio.gather(*waiting)
    assert transport.blocked == ""
    while (await receive(inbox)).body != b"c":  # before it may come what failed, for it may have arrived
        pass
    await send(transport, queue, b"after")
    assert await bodies(inbox, 1) == [b"after"]


async def test_a_new_connection_is_blocked_too(
    connect: Connect, transport: Transport, queue: str, short_of_memory: Shortage
) -> None:
    await transport.declare(Queue(queue))
    await send(transport, queue, b"before")
    async with short_of_memory():
        late = await connect()
        await publish_until_blocked(late, queue)
        assert late.blocked == LOW
        assert transport.blocked == "", "it published before, and nothing since"


async def test_who_waits_is_told_that_the_connection_is_lost(
    transport: Transport, queue: str, short_of_memory: Shortage
) -> None:
    await transport.declare(Queue(queue))
    async with short_of_memory():
        await publish_until_blocked(transport, queue)
        waiting = asyncio.create_task(transport.publish("", queue, b"never", timeout_s=60.0))
        await asyncio.sleep(0)
        await transport.close()
        with pytest.raises(ConnectionLost):
            await waiting
