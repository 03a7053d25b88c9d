"""What a RabbitMQ 3.10 loses that is killed seconds after queues and streams were declared, and what mends it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from yarl import URL

from broker.errors import PublishFailed, QueueLost
from broker.rabbitmq import RabbitSettings
from broker.topology import AGGREGATOR
from broker.transport import Queue, Stream, Transport
from fluffle.chaos.node import Node
from tests.rabbit_node import Rabbit, node_definitions

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(300)]

QUEUE = "fl.t-000.queue"
STREAM = Stream("fl.t-000.stream", 1 << 20, 1 << 20)


@pytest.fixture
async def node(rabbit: Rabbit, tmp_path: Path) -> AsyncIterator[Node]:
    """One of its own, which never had a queue: `rabbit` is there to skip where there is no RabbitMQ."""
    if rabbit.node is None:
        pytest.skip("the broker that FLUFFLE_AMQP_URL names is not ours to kill")
    node = await asyncio.to_thread(Node.create, tmp_path, node_definitions())
    try:
        await asyncio.to_thread(node.start)
        yield node
    finally:
        await asyncio.to_thread(node.end)


async def connect(node: Node) -> Transport:
    url = URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/")
    return await Rabbit(url, node).broker(RabbitSettings(restart_s=2.0)).connect(AGGREGATOR, purpose="loss")


async def crash(node: Node) -> None:
    await asyncio.to_thread(node.kill)
    await asyncio.to_thread(node.start)


async def test_the_first_streams_of_a_broker(node: Node) -> None:
    """It forgets where all of them are. Nothing in AMQP mends that, but what the error says does."""
    transport = await connect(node)
    await transport.declare(STREAM)
    await transport.publish("", STREAM.name, b"lost")
    await crash(node)
    await transport.close()
    transport = await connect(node)
    with pytest.raises(QueueLost, match=STREAM.name):
        await transport.delete(STREAM.name)
    with pytest.raises(QueueLost, match=STREAM.name) as told:
        await transport.declare(STREAM)
    remedy = re.search(r"rabbitmqctl eval '(.*)'", str(told.value))
    assert remedy
    await asyncio.to_thread(node.evaluate, remedy[1])
    await transport.declare(STREAM)
    await transport.publish("", STREAM.name, b"new")
    delivery = await (await transport.read(STREAM.name, offset="first")).get(10)
    assert delivery is not None
    assert (delivery.body, delivery.offset) == (b"new", 0)
    await transport.close()


async def test_the_newest_quorum_queue(node: Node) -> None:
    """It is there and can be declared, but confirms nothing. `rabbitmqctl delete_queue` mends that."""
    transport = await connect(node)
    await transport.declare(Queue(QUEUE, replicated=True))
    await transport.publish("", QUEUE, b"lost")
    await crash(node)
    await transport.close()
    transport = await connect(node)
    await transport.declare(Queue(QUEUE, replicated=True))
    with pytest.raises(PublishFailed, match="lose that queue"):
        await transport.publish("", QUEUE, b"refused", timeout_s=3)
    await transport.close()
    await asyncio.to_thread(node.control, "delete_queue", QUEUE)
    transport = await connect(node)
    await transport.declare(Queue(QUEUE, replicated=True))
    await transport.publish("", QUEUE, b"new")
    delivery = await (await transport.consume(QUEUE)).get(10)
    assert delivery is not None
    assert delivery.body == b"new"
    await transport.close()


@pytest.mark.parametrize("tail", ["both files", "the index only", "data cut in the middle", "data never written"])
async def test_the_tail_of_a_stream(node: Node, tail: str) -> None:
    """It comes up with what is whole in both of its files, and gives the lost offsets again."""
    transport = await connect(node)
    await transport.declare(STREAM)
    await transport.publish("", STREAM.name, b"kept")
    await asyncio.to_thread(node.settle)
    copies = await asyncio.to_thread(node.copy_streams, [STREAM.name])
    await transport.publish("", STREAM.name, b"lost")
    await asyncio.to_thread(node.kill)
    await transport.close()
    await asyncio.to_thread(damage, copies, tail)
    await asyncio.to_thread(node.put_back, copies)
    await asyncio.to_thread(node.start)
    transport = await connect(node)
    await transport.declare(STREAM)
    await transport.publish("", STREAM.name, b"new")
    inbox = await transport.read(STREAM.name, offset="first")
    deliveries = [await inbox.get(10) for _ in range(2)]
    assert [(d.offset, d.body) for d in deliveries if d] == [(0, b"kept"), (1, b"new")]
    assert len({d.id for d in deliveries if d}) == 2
    await transport.close()


def damage(copies: Path, tail: str) -> None:
    """What else a loss of power may leave: the files are written page by page, in any order."""
    [copy] = copies.iterdir()
    [segment] = copy.glob("*.segment")
    [now] = copies.parent.glob(f"mnesia/*/stream/{copy.name}/{segment.name}")
    old, new = segment.read_bytes(), now.read_bytes()
    assert new.startswith(old)
    data = {
        "both files": old, "the index only": new, "data cut in the middle": new[:-3],
        "data never written": old.ljust(len(new), b"\0"),
    }  # fmt: skip
    segment.write_bytes(data[tail])


async def test_what_was_written_down_before_is_kept(node: Node) -> None:
    transport = await connect(node)
    await transport.declare(STREAM, Queue(QUEUE, replicated=True))
    for name in (STREAM.name, QUEUE):
        await transport.publish("", name, b"kept")
    await asyncio.to_thread(node.settle)
    await crash(node)
    await transport.close()
    transport = await connect(node)
    await transport.declare(STREAM, Queue(QUEUE, replicated=True))
    inboxes = [await transport.read(STREAM.name, offset="first"), await transport.consume(QUEUE)]
    for inbox in inboxes:
        delivery = await inbox.get(10)
        assert delivery is not None
        assert delivery.body == b"kept"
    await transport.close()
