"""What every transport promises about streams."""

from __future__ import annotations

import asyncio

import pytest
from contract_steps import KIB, SOON_S, Connect, bodies, is_quiet, numbered, receive, receive_all, send

from broker.errors import ConnectionLost, TransportError
from broker.topology import Topology
from broker.transport import Binding, Exchange, Queue, Stream, StreamOffset, Transport

MIB = KIB * KIB


@pytest.fixture
async def log(transport: Transport, stream: str) -> str:
    """A stream that holds b"0" ... b"9" at the offsets 0 ... 9."""
    await transport.declare(Stream(stream, max_bytes=64 * MIB, segment_bytes=MIB))
    await send(transport, stream, *numbered(10))
    return stream


async def test_a_stream_numbers_its_messages_from_zero(transport: Transport, log: str) -> None:
    deliveries = await receive_all(await transport.read(log, offset="first"), 10)
    assert [d.body for d in deliveries] == numbered(10)
    assert [d.offset for d in deliveries] == list(range(10))
    assert {(d.key, d.sender, d.delivery_count) for d in deliveries} == {(log, "aggregator", 0)}


@pytest.mark.parametrize("size_bytes", [1, 100 * MIB, 4 << 30, 1 << 40])
async def test_there_are_streams_for_bodies_of_any_size(
    transport: Transport, topology: Topology, size_bytes: int
) -> None:
    """RabbitMQ takes no segments above 3 GB."""
    streams = [*topology.model_declarations("run", size_bytes), *topology.outbox_declarations("p-1", size_bytes)]
    await transport.declare(*streams)
    for stream in (one for one in streams if isinstance(one, Stream)):
        assert stream.max_bytes - stream.segment_bytes >= 4 * size_bytes
        await send(transport, stream.name, b"it works")
        await transport.delete(stream.name)


@pytest.mark.parametrize(("offset", "first"), [(0, 0), (4, 4), (9, 9), ("first", 0)])
async def test_reading_begins_where_told(transport: Transport, log: str, offset: StreamOffset, first: int) -> None:
    inbox = await transport.read(log, offset=offset)
    assert await bodies(inbox, 10 - first) == numbered(10 - first, first)
    assert await is_quiet(inbox)
    await send(transport, log, b"10")
    assert (await receive(inbox)).offset == 10


async def test_next_is_only_what_comes_after(transport: Transport, log: str) -> None:
    inbox = await transport.read(log, offset="next")
    assert await is_quiet(inbox)
    await send(transport, log, b"new")
    delivery = await receive(inbox)
    assert (delivery.body, delivery.offset) == (b"new", 10)


async def test_beyond_the_end_waits_until_that_offset(transport: Transport, log: str) -> None:
    inbox = await transport.read(log, offset=12)
    await send(transport, log, b"10", b"11")
    assert await is_quiet(inbox)
    await send(transport, log, b"12")
    delivery = await receive(inbox)
    assert (delivery.body, delivery.offset) == (b"12", 12)


async def test_readers_are_independent_and_reading_is_repeatable(connect: Connect, log: str) -> None:
    first, second = await connect(), await connect()
    early = await first.read(log, offset="first", prefetch=1)
    assert await bodies(early, 3) == numbered(3)
    assert await bodies(await second.read(log, offset="first"), 10) == numbered(10)
    assert await bodies(early, 7) == numbered(7, 3)
    assert await bodies(await first.read(log, offset=8), 2) == [b"8", b"9"]


async def test_settling_a_streams_delivery_changes_nothing(transport: Transport, log: str) -> None:
    inbox = await transport.read(log, offset="first", prefetch=2)
    for delivery in await receive_all(inbox, 5):
        await delivery.ack()
    await (await receive(inbox)).reject(requeue=True)
    assert await bodies(inbox, 4) == numbered(4, 6)


async def test_a_stream_outlives_connections(connect: Connect, log: str) -> None:
    first, second = await connect(), await connect()
    inbox = await first.read(log, offset="first")
    await receive(inbox)
    await first.close()
    with pytest.raises(ConnectionLost):
        await inbox.get()
    assert await bodies(await second.read(log, offset=1), 9) == numbered(9, 1)


async def test_retention_drops_whole_segments_from_the_front(transport: Transport, stream: str) -> None:
    body = bytes(100 * KIB)
    await transport.declare(Stream(stream, max_bytes=3 * MIB, segment_bytes=MIB))
    for _ in range(100):
        await transport.publish("", stream, body)
    first = await receive(await transport.read(stream, offset=0))
    kept = (100 - first.offset) * len(body)
    assert MIB <= kept <= 5 * MIB, "an offset that is no longer kept starts at the oldest kept"
    assert (await receive(await transport.read(stream, offset="first"))).offset == first.offset
    assert (await receive(await transport.read(stream, offset=99))).offset == 99


async def test_exchanges_lead_to_streams(transport: Transport, topology: Topology, stream: str) -> None:
    await transport.declare(
        Exchange(topology.up), Stream(stream, 64 * MIB, MIB), Binding(topology.up, "*.join", stream)
    )
    await transport.publish(topology.up, "p-1.join", b"hello")
    delivery = await receive(await transport.read(stream, offset="first"))
    assert (delivery.body, delivery.key, delivery.offset) == (b"hello", "p-1.join", 0)


async def test_a_slow_reader_sees_everything_while_others_publish(connect: Connect, stream: str) -> None:
    writer, reader = await connect(), await connect()
    await writer.declare(Stream(stream, max_bytes=64 * MIB, segment_bytes=MIB))
    inbox = await reader.read(stream, offset="first", prefetch=2)
    publishing = asyncio.create_task(send(writer, stream, *numbered(300)))
    assert [d.offset for d in await receive_all(inbox, 300)] == list(range(300))
    await publishing


async def test_declaring_again_keeps_it_and_differently_is_an_error(transport: Transport, log: str) -> None:
    await transport.declare(Stream(log, max_bytes=64 * MIB, segment_bytes=MIB))
    with pytest.raises(TransportError, match=log):
        await transport.declare(Stream(log, max_bytes=32 * MIB, segment_bytes=MIB))
    assert await bodies(await transport.read(log, offset="first"), 10) == numbered(10)


async def test_a_deleted_stream_starts_again_at_zero(transport: Transport, log: str) -> None:
    await transport.delete(log)
    with pytest.raises(TransportError, match=log):
        await transport.read(log, offset="first")
    await transport.declare(Stream(log, max_bytes=MIB, segment_bytes=MIB))
    await send(transport, log, b"again")
    assert (await receive(await transport.read(log, offset="first"))).offset == 0


async def test_a_stream_cannot_be_consumed_nor_a_queue_read(transport: Transport, log: str, queue: str) -> None:
    await transport.declare(Queue(queue))
    await send(transport, queue, b"kept")

    async def consume(prefetch: int) -> None:
        inbox = await transport.consume(log, prefetch=prefetch)
        await send(transport, log, b"10")
        await inbox.get(SOON_S)

    async def read() -> None:
        inbox = await transport.read(queue, offset="first")
        await inbox.get(SOON_S)

    for wrong, name in ((consume(5), log), (consume(0), log), (read(), queue)):
        with pytest.raises(TransportError, match=name):
            await wrong


async def test_cancelling_a_get_loses_nothing(transport: Transport, log: str) -> None:
    inbox = await transport.read(log, offset="next")
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0.05)
    waiting.cancel()
    await send(transport, log, b"10")
    assert (await receive(inbox)).offset == 10
