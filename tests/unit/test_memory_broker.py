"""What only the embedded broker offers: cut connections, restarts, lost tails, statistics, its clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.errors import ConnectionLost, TransportError, Unroutable
from broker.memory import MemoryBroker, MemoryTransport
from broker.transport import Binding, Delivery, Exchange, Inbox, Queue, Stream

MIB = 1 << 20


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def a(broker: MemoryBroker) -> AsyncIterator[MemoryTransport]:
    """A connection; the queue "q" and the stream "s" exist."""
    transport = await broker.connect("a", purpose="test")
    await transport.declare(Queue("q"), Stream("s", max_bytes=10 * MIB, segment_bytes=MIB))
    yield transport
    await transport.close()


@pytest.fixture
async def b(broker: MemoryBroker) -> AsyncIterator[MemoryTransport]:
    transport = await broker.connect("b", purpose="test")
    yield transport
    await transport.close()


async def now(inbox: Inbox) -> Delivery:
    """What waits in the inbox already."""
    delivery = await inbox.get(0)
    assert delivery is not None
    return delivery


class TestAbort:
    async def test_everything_pending_and_later_is_lost(self, a: MemoryTransport) -> None:
        inbox = await a.consume("q")
        pending = [asyncio.create_task(inbox.get()), asyncio.create_task(a.publish("", "q", b""))]
        await asyncio.sleep(0)
        a.abort()
        outcomes = await asyncio.gather(*pending, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ConnectionLost, ConnectionLost]
        with pytest.raises(ConnectionLost, match="cut"):
            await a.publish("", "q", b"")

    async def test_an_ack_after_it_fails_and_the_message_comes_again(
        self, a: MemoryTransport, b: MemoryTransport
    ) -> None:
        await b.publish("", "q", b"1")
        held = await now(await a.consume("q"))
        a.abort()
        with pytest.raises(ConnectionLost):
            await held.ack()
        again = await now(await b.consume("q"))
        assert (again.body, again.delivery_count) == (b"1", 1)

    async def test_two_consumers_of_one_connection_go_together(
        self, a: MemoryTransport, b: MemoryTransport
    ) -> None:
        await a.consume("q")
        await a.consume("q")
        await b.publish("", "q", b"1")
        a.abort()
        assert (await now(await b.consume("q"))).delivery_count == 1

    async def test_connections_shows_who_is_there(
        self, broker: MemoryBroker, a: MemoryTransport, b: MemoryTransport
    ) -> None:
        assert [(c.user, c.purpose) for c in broker.connections] == [("a", "test"), ("b", "test")]
        a.abort()
        assert broker.connections == (b,)


class TestRestart:
    async def test_what_the_broker_holds_survives(self, broker: MemoryBroker, a: MemoryTransport) -> None:
        await a.declare(Exchange("e"), Binding("e", "#", "q"))
        for body in (b"0", b"1", b"2"):
            await a.publish("e", "k", body)
            await a.publish("", "s", body)
        await (await now(await a.consume("q"))).ack()
        broker.stop()
        assert broker.connections == ()
        with pytest.raises(ConnectionLost, match="stopped"):
            await broker.connect("a", purpose="again")
        broker.start()
        again = await broker.connect("a", purpose="again")
        await again.publish("e", "k", b"3")
        queue, stream = await again.consume("q"), await again.read("s", offset="first")
        assert [(d.body, d.delivery_count) for d in [await now(queue) for _ in range(3)]] == [
            (b"1", 1), (b"2", 1), (b"3", 0),
        ]  # fmt: skip
        assert [(await now(stream)).offset for _ in range(3)] == [0, 1, 2]

    async def test_it_counts_one_delivery_however_many_consume(
        self, broker: MemoryBroker, a: MemoryTransport, b: MemoryTransport
    ) -> None:
        await a.consume("q")
        await b.consume("q")
        await a.publish("", "q", b"1")
        broker.stop()
        broker.start()
        again = await broker.connect("a", purpose="again")
        assert (await now(await again.consume("q"))).delivery_count == 1

    async def test_a_stream_may_lose_its_tail(self, broker: MemoryBroker, a: MemoryTransport) -> None:
        await a.declare(Stream("small", max_bytes=100, segment_bytes=2))
        for body in (b"0", b"1", b"2", b"3", b"4"):
            await a.publish("", "small", body)
        broker.lose_stream_tail("small", 3)
        beyond = await a.read("small", offset=4)
        for body in (b"5", b"6", b"7"):
            await a.publish("", "small", body)
        whole = await a.read("small", offset="first")
        assert [(await now(whole)).body for _ in range(5)] == [b"0", b"1", b"5", b"6", b"7"]
        assert (await now(beyond)).body == b"7"
        broker.lose_stream_tail("small", 99)
        assert broker.stats().streams["small"].depth == 0

    async def test_retention_goes_on_after_a_loss(self, broker: MemoryBroker, a: MemoryTransport) -> None:
        await a.declare(Stream("small", max_bytes=4, segment_bytes=2))
        for _ in range(5):
            await a.publish("", "small", b"x")
        broker.lose_stream_tail("small", 3)
        for _ in range(20):
            await a.publish("", "small", b"x")
        inbox = await a.read("small", offset="first")
        offsets = [(await now(inbox)).offset for _ in range(broker.stats().streams["small"].depth)]
        assert offsets == list(range(22 - len(offsets), 22))
        assert 4 <= len(offsets) <= 6


class TestWaiting:
    async def test_what_waits_already_is_got_without_waiting(self, a: MemoryTransport) -> None:
        inbox = await a.consume("q")
        await a.publish("", "q", b"1")
        assert (await now(inbox)).body == b"1"
        assert await inbox.get(0) is None

    async def test_a_get_cancelled_as_the_message_comes_leaves_it(self, a: MemoryTransport) -> None:
        inbox = await a.consume("q")
        waiting = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        await a.publish("", "q", b"1")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        assert (await now(inbox)).body == b"1"

    async def test_several_getters_share_what_comes(self, a: MemoryTransport) -> None:
        inbox = await a.consume("q")
        getters = [asyncio.create_task(inbox.get(5)) for _ in range(3)]
        for body in (b"0", b"1", b"2"):
            await a.publish("", "q", body)
        got = [d.body for d in await asyncio.gather(*getters) if d is not None]
        assert sorted(got) == [b"0", b"1", b"2"]

    async def test_a_publisher_leaves_others_their_turn(self, a: MemoryTransport, b: MemoryTransport) -> None:
        inbox = await b.consume("q", prefetch=1)
        got = 0

        async def consume() -> None:
            nonlocal got
            while delivery := await inbox.get(5):
                got += 1
                await delivery.ack()

        consumer = asyncio.create_task(consume())
        for _ in range(100):
            await a.publish("", "q", b"")
        assert got >= 98
        consumer.cancel()

    async def test_a_long_backlog_leaves_others_their_turn(self, a: MemoryTransport) -> None:
        for _ in range(1000):
            await a.publish("", "s", b"")
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        inbox = await a.read("s", offset="first")
        for _ in range(1000):
            await now(inbox)
        task.cancel()
        assert turns >= 10

    async def test_deleting_a_queue_tells_its_consumers(self, a: MemoryTransport, b: MemoryTransport) -> None:
        for inbox in (await a.consume("q"), await a.read("s", offset="next")):
            waiting = asyncio.create_task(inbox.get())
            await asyncio.sleep(0)
            await b.delete("q")
            await b.delete("s")
            with pytest.raises(ConnectionLost, match="deleted"):
                await waiting
            await b.declare(Stream("s", MIB, MIB))


class TestClock:
    async def test_expiry_follows_the_loops_clock(
        self, a: MemoryTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [0.0]
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock[0])
        await a.declare(Queue("short", expires_s=10))
        clock[0] = 9
        await a.declare(Queue("short", expires_s=10))
        clock[0] = 18
        inbox = await a.consume("short")
        clock[0] = 100
        await a.publish("", "short", b"still there: it is used")
        await inbox.close()
        clock[0] = 109
        await a.publish("", "short", b"still there: its time began when the consumer left")
        clock[0] = 110
        with pytest.raises(Unroutable):
            await a.publish("", "short", b"")
        await a.declare(Queue("short"))
        assert await (await a.consume("short")).get(0) is None

    async def test_a_restart_gives_unused_queues_their_time_again(
        self, broker: MemoryBroker, a: MemoryTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [0.0]
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock[0])
        await a.declare(Queue("short", expires_s=10))
        broker.stop()
        clock[0] = 50
        broker.start()
        again = await broker.connect("a", purpose="again")
        clock[0] = 59
        await again.publish("", "short", b"")


async def test_statistics(broker: MemoryBroker, a: MemoryTransport) -> None:
    await a.declare(
        Exchange("e"), Queue("newest", max_length=1), Queue("strict", replicated=True, delivery_limit=0),
        Binding("e", "*", "newest"), Binding("e", "#", "s"), Binding("e", "strict", "strict"),
    )  # fmt: skip
    for key in ("x", "y", "strict"):
        await a.publish("e", key, b"12345")
    inbox = await a.consume("newest")
    await (await now(await a.consume("strict"))).reject(requeue=True)
    await now(await a.read("s", offset=2))
    stats = broker.stats()
    assert stats.exchanges["e"].published_bytes == 15
    assert (stats.exchanges["e"].published, stats.exchanges["e"].delivered) == (3, 7)
    newest, strict, stream = stats.queues["newest"], stats.queues["strict"], stats.streams["s"]
    assert (newest.published, newest.delivered, newest.evicted) == (3, 1, 2)
    assert (newest.depth, newest.unacked) == (0, 1)
    assert (strict.delivered, strict.given_up, strict.depth) == (1, 1, 0)
    assert (stream.published, stream.delivered, stream.delivered_bytes, stream.depth) == (3, 1, 5, 3)
    await inbox.close()
    assert broker.stats().queues["newest"].depth == 1


async def test_a_reader_overtaken_by_retention_goes_on_with_the_oldest_kept(a: MemoryTransport) -> None:
    await a.declare(Stream("small", max_bytes=4, segment_bytes=2))
    inbox = await a.read("small", offset="first")
    await a.publish("", "small", b"x")
    assert (await now(inbox)).offset == 0
    for _ in range(20):
        await a.publish("", "small", b"x")
    rest = [(await now(inbox)).offset for _ in range(5)]
    assert rest == list(range(16, 21))
    assert await inbox.get(0) is None


async def test_bodies_are_not_copied(a: MemoryTransport) -> None:
    body = bytes(MIB)
    queue, stream = await a.consume("q"), await a.read("s", offset="first")
    await a.publish("", "q", body)
    await a.publish("", "s", body)
    assert (await now(queue)).body is body
    assert (await now(stream)).body is body


async def test_a_queue_is_no_stream(a: MemoryTransport) -> None:
    with pytest.raises(TransportError, match="consume it"):
        await a.read("q", offset="first")
    with pytest.raises(TransportError, match="read it"):
        await a.consume("s")
    with pytest.raises(TransportError, match="prefetch"):
        await a.read("s", offset="first", prefetch=0)


async def test_an_empty_routing_key_has_no_words(a: MemoryTransport) -> None:
    await a.declare(Exchange("e"), Binding("e", "*", "q"))
    with pytest.raises(Unroutable):
        await a.publish("e", "", b"")
    await a.declare(Binding("e", "#", "q"))
    await a.publish("e", "", b"")
