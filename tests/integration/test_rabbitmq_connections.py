"""What only a network and a real broker can do to a connection."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from broker.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    MessageTooLarge,
    PublishFailed,
    TransportError,
)
from broker.rabbitmq import CLOSE_S, RabbitBroker, RabbitSettings, check_broker
from broker.retry import publish
from broker.topology import AGGREGATOR, Topology
from broker.transport import Queue, Stream, Transport
from fluffle.chaos.node import Node
from fluffle.chaos.proxy import proxied
from tests.rabbit_node import Rabbit, password

pytestmark = pytest.mark.xdist_group("rabbitmq")


@pytest.fixture
def topology(rabbit: Rabbit) -> Topology:
    return rabbit.topology()


def pending(transport: Transport, topology: Topology, inbox_of: str) -> list[asyncio.Task[object]]:
    """One call of every kind, none of which a dead network lets finish."""
    calls = (
        transport.publish("", inbox_of, b"", timeout_s=60), transport.declare(Queue(f"{inbox_of}.2")),
        transport.consume(inbox_of), transport.read(topology.updates, offset="first"), transport.delete(inbox_of),
    )  # fmt: skip
    return [asyncio.ensure_future(call) for call in calls]


@pytest.mark.parametrize("how", ["cut", "freeze", "close"])
async def test_whoever_waits_is_told_that_the_connection_is_lost(
    rabbit: Rabbit, topology: Topology, how: str
) -> None:
    """A reset is noticed at once, a network that goes silent after three heartbeats."""
    async with proxied(rabbit.url.port or 5672) as proxy:
        broker = rabbit.broker(RabbitSettings(heartbeat_s=1), port=proxy.port)
        transport = await broker.connect(AGGREGATOR, purpose=how)
        await transport.declare(*topology.aggregator_declarations())
        inboxes = [await transport.consume(topology.head), await transport.read(topology.updates, offset="first")]
        proxy.freeze()
        waiting = pending(transport, topology, topology.rejected)
        waiting += [asyncio.ensure_future(inbox.get()) for inbox in inboxes]
        await asyncio.sleep(0.2)
        if how == "cut":
            proxy.cut()
        elif how == "close":
            await transport.close()
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ConnectionLost] * 7
        with pytest.raises(ConnectionLost):
            await transport.declare(Queue(topology.rejected))
        await transport.close()


async def test_a_publish_that_is_not_confirmed_in_time_fails_and_the_connection_goes_on(
    rabbit: Rabbit, topology: Topology
) -> None:
    async with proxied(rabbit.url.port or 5672) as proxy:
        transport = await rabbit.broker(port=proxy.port).connect(AGGREGATOR, purpose="publish")
        await transport.declare(Queue(topology.rejected))
        inbox = await transport.consume(topology.rejected)
        await transport.publish("", topology.rejected, b"0")
        proxy.freeze()
        with pytest.raises(PublishFailed):
            await transport.publish("", topology.rejected, b"1", timeout_s=0.3)
        proxy.thaw()
        await transport.publish("", topology.rejected, b"2")
        received = [await inbox.get(5) for _ in range(3)]
        assert [d.body for d in received if d] == [b"0", b"1", b"2"], (
            "what failed may have arrived, and here it did"
        )
        await transport.close()


async def test_a_refused_publish_does_not_spoil_those_beside_it(rabbit: Rabbit, topology: Topology) -> None:
    aggregator = await rabbit.broker().connect(AGGREGATOR, purpose="setup")
    await aggregator.declare(*topology.aggregator_declarations())
    participant = await rabbit.broker().connect("p-1", purpose="publish")
    keys = [f"{who}.heartbeat" for who in ("p-1", "p-2", "p-1", "p-1")]
    outcomes = await asyncio.gather(
        *(participant.publish(topology.up, key, b"") for key in keys), return_exceptions=True
    )
    assert isinstance(outcomes[1], AccessRefused)
    others = {type(outcome) for outcome in (outcomes[0], *outcomes[2:])}
    assert others <= {type(None), PublishFailed}, "they are told to try again, not that they may not"
    await participant.publish(topology.up, keys[0], b"")
    await participant.close()
    await aggregator.close()


async def test_a_deleted_queue_ends_its_inbox(rabbit: Rabbit, topology: Topology) -> None:
    transport = await rabbit.broker().connect(AGGREGATOR, purpose="delete")
    await transport.declare(Queue(topology.rejected), Stream(topology.updates, 1 << 20, 1 << 20))
    inboxes = [await transport.consume(topology.rejected), await transport.read(topology.updates, offset="first")]
    waiting = [asyncio.ensure_future(inbox.get(10)) for inbox in inboxes]
    await transport.delete(topology.rejected)
    await transport.delete(topology.updates)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ConnectionLost] * 2
    await transport.declare(Queue(topology.rejected))
    await transport.close()


async def test_nothing_overtakes(rabbit: Rabbit, topology: Topology) -> None:
    """Bodies of one and of many frames, pushed without pause into an inbox that nobody empties yet."""
    transport = await rabbit.broker().connect(AGGREGATOR, purpose="order")
    await transport.declare(Queue(topology.rejected), Stream(topology.updates, 1 << 26, 1 << 24))
    bodies = [b"%d" % i + bytes(300_000 if i % 7 == 0 else 10) for i in range(200)]
    inboxes = [await transport.consume(topology.rejected), await transport.read(topology.updates, offset="first")]
    for body in bodies:
        await transport.publish("", topology.rejected, body)
        await transport.publish("", topology.updates, body)
    for inbox in inboxes:
        received = [await inbox.get(10) for _ in bodies]
        assert [d.body for d in received if d] == bodies
    await transport.close()


async def test_requests_leave_nothing_behind(rabbit: Rabbit, topology: Topology) -> None:
    """A leader makes some in every round, at one connection, for weeks."""
    transport = await rabbit.broker().connect(AGGREGATOR, purpose="requests")
    await transport.declare(*topology.aggregator_declarations())

    async def in_every_round() -> None:
        await transport.declare(Queue(topology.rejected, max_length=10_000))
        await (await transport.read(topology.updates, offset="next", prefetch=1)).close()
        await (await transport.consume(topology.rejected)).close()
        await transport.publish("", topology.updates, b"hello")

    held: list[int] = []
    for _ in range(3):
        for _ in range(30):
            await in_every_round()
        gc.collect()
        held.append(sum(type(thing).__name__ not in ("TimerHandle", "Context") for thing in gc.get_objects()))
    await transport.close()
    assert held[2] - held[1] < 30, "less than one for each round; timers that are not needed end with their time"


async def test_readers_of_streams_take_turns_on_one_channel(rabbit: Rabbit, topology: Topology) -> None:
    """RabbitMQ 3.10.8 keeps something for every channel that ever read a stream, until it is started again."""
    if rabbit.node is None:
        pytest.skip("a broker of our own tells what it keeps")
    kept = partial(asyncio.to_thread, rabbit.node.evaluate, "maps:size(seshat:overview(osiris)).")
    transport = await rabbit.broker().connect(AGGREGATOR, purpose="readers")
    await transport.declare(*topology.aggregator_declarations())
    for number in range(100):
        await transport.publish("", topology.updates, b"%d" % number)

    async def read_one(offset: int) -> bytes:
        inbox = await transport.read(topology.updates, offset=offset)
        delivery = await inbox.get(5.0)
        await inbox.close()
        assert delivery
        return delivery.body

    assert await read_one(0) == b"0"
    before = await kept()
    assert [await read_one(number) for number in range(60)] == [b"%d" % number for number in range(60)]
    together = await asyncio.gather(read_one(7), read_one(8))
    assert (together, await read_one(9)) == ([b"7", b"8"], b"9")
    await transport.close()
    assert int(await kept()) <= int(before) + 1


async def test_closing_ends_although_nothing_passes(rabbit: Rabbit, topology: Topology) -> None:
    """What was to be sent fills every buffer on the way, so even the farewell cannot leave."""
    async with proxied(rabbit.url.port or 5672) as proxy:
        transport = await rabbit.broker(port=proxy.port).connect(AGGREGATOR, purpose="close")
        await transport.declare(Queue(topology.rejected))
        await transport.publish("", topology.rejected, b"")
        proxy.freeze()
        publishing = asyncio.ensure_future(transport.publish("", topology.rejected, bytes(50 << 20), timeout_s=60))
        await asyncio.sleep(0.2)
        async with asyncio.timeout(2 * CLOSE_S):
            await transport.close()
        with pytest.raises(ConnectionLost):
            await publishing


class Counting:
    """Counts how often something is published."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.calls = 0

    async def publish(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        await self.transport.publish(*args, **kwargs)


class TestLimits:
    """Of RabbitMQ itself. Whoever meets one is told which, and what can be done."""

    @pytest.fixture
    def node(self, rabbit: Rabbit) -> Node:
        if rabbit.node is None:
            pytest.skip("the broker that FLUFFLE_AMQP_URL names is not ours to change")
        return rabbit.node

    @pytest.fixture
    def small(self, node: Node) -> Iterator[None]:
        with node.changed(max_message_size=1000):
            yield

    @pytest.mark.usefixtures("small")
    async def test_a_message_that_is_too_large(self, rabbit: Rabbit, topology: Topology) -> None:
        transport = await rabbit.broker().connect(AGGREGATOR, purpose="size")
        await transport.declare(Queue(topology.rejected))
        with pytest.raises(MessageTooLarge, match=r"1001 bytes.* 1000 .*max_message_size.*broker.chunk_bytes"):
            await transport.publish("", topology.rejected, bytes(1001))
        outcomes = await asyncio.gather(
            *(transport.publish("", topology.rejected, bytes(n)) for n in (10, 2000, 1000)), return_exceptions=True
        )
        assert isinstance(outcomes[1], MessageTooLarge)
        assert {type(outcomes[0]), type(outcomes[2])} <= {type(None), PublishFailed}, "they may be tried again"
        await transport.publish("", topology.rejected, bytes(1000))
        await transport.close()

    @pytest.mark.usefixtures("small")
    async def test_it_is_not_tried_again(self, rabbit: Rabbit, topology: Topology) -> None:
        transport = await rabbit.broker().connect(AGGREGATOR, purpose="size")
        await transport.declare(Queue(topology.rejected, max_length=1))
        counting = Counting(transport)
        with pytest.raises(MessageTooLarge):
            await publish(counting, "", topology.rejected, bytes(2000))
        assert counting.calls == 1
        await transport.close()

    @pytest.fixture
    def impatient(self, node: Node) -> Iterator[None]:
        with node.changed(consumer_timeout=1000, channel_tick_interval=200):
            yield

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("replicated", [False, True])
    async def test_a_delivery_that_is_held_too_long(
        self, rabbit: Rabbit, topology: Topology, *, replicated: bool
    ) -> None:
        transport = await rabbit.broker().connect(AGGREGATOR, purpose="hold")
        await transport.declare(Queue(topology.rejected, replicated=replicated))
        inbox = await transport.consume(topology.rejected)
        await transport.publish("", topology.rejected, b"held")
        delivery = await inbox.get(5)
        assert delivery is not None
        told = r"longer than the 1 s .*consumer_timeout in rabbitmq.conf.* broker.refresh_s"
        with pytest.raises(ConnectionLost, match=told):
            await inbox.get(10)
        with pytest.raises(ConnectionLost, match=told):
            await delivery.ack()
        again = await (await transport.consume(topology.rejected)).get(5)
        assert again is not None
        assert again.delivery_count > 0
        await transport.close()

    @pytest.fixture
    def one_connection(self, node: Node) -> Iterator[str]:
        """A user that may have one connection."""
        node.control("set_user_limits", "p04", '{"max-connections": 1}')
        yield "p04"
        node.control("clear_user_limits", "p04", "max-connections")

    async def test_too_many_connections(self, rabbit: Rabbit, one_connection: str) -> None:
        broker = rabbit.broker()
        transport = await broker.connect(one_connection, purpose="first")
        with pytest.raises(ConnectionLost, match=r"p04.*too many connections.*list_user_limits"):
            await broker.connect(one_connection, purpose="second")
        await transport.close()


class TestConnecting:
    async def test_wrong_password(self, rabbit: Rabbit) -> None:
        broker = RabbitBroker(str(rabbit.url), lambda user: "wrong")
        with pytest.raises(AccessRefused, match="password"):
            await broker.connect(AGGREGATOR, purpose="test")

    async def test_an_address_of_somebody_else(self, rabbit: Rabbit) -> None:
        broker = RabbitBroker(str(rabbit.url.with_user("p-1").with_password(password("p-1"))))
        with pytest.raises(ConfigError, match=r"p-1.*aggregator"):
            await broker.connect(AGGREGATOR, purpose="test")
        transport = await broker.connect("p-1", purpose="test")
        assert transport.user == "p-1"
        await transport.close()

    async def test_an_address_without_a_name_is_that_of_whoever_connects(self, rabbit: Rabbit) -> None:
        url = rabbit.url.with_user(None)
        with_password = str(url.with_password(password("p-1")))
        for broker in (RabbitBroker(str(url), password), RabbitBroker(with_password)):
            transport = await broker.connect("p-1", purpose="test")
            assert transport.user == "p-1"
            await transport.close()
        with pytest.raises(AccessRefused, match=r"p-2.*password"):
            await RabbitBroker(with_password).connect("p-2", purpose="test")

    async def test_nobody_there_and_an_unknown_virtual_host(self, rabbit: Rabbit) -> None:
        with pytest.raises(ConnectionLost, match="is RabbitMQ running"):
            await RabbitBroker("amqp://p-1:x@127.0.0.1:1").connect("p-1", purpose="test")
        elsewhere = RabbitBroker(str(rabbit.url.with_path("/nowhere")), password)
        with pytest.raises(TransportError, match="nowhere"):
            await elsewhere.connect("p-1", purpose="test")


@pytest.mark.parametrize(
    ("product", "version", "fit"),
    [("RabbitMQ", "3.10.8", True), ("RabbitMQ", "4.1.0-rc.1", True), ("RabbitMQ", "3.9.29", False),
     ("LavinMQ", "4.0.0", False), (None, None, False)],
)  # fmt: skip
def test_only_brokers_that_can_do_it(product: str | None, version: str | None, *, fit: bool) -> None:
    if fit:
        return check_broker({"product": product, "version": version})
    with pytest.raises(ConfigError, match=r"3\.10"):
        check_broker({"product": product, "version": version})
    return None
