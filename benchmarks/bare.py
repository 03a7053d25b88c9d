"""What one would write with aio-pika for the same flow of messages, if it need not be right when something breaks.

The reference of the benchmarks: the same bytes through the same exchanges, queues and streams, persistent and
confirmed, by as many processes and connections as a run of Fluffle has. It keeps no journal, writes no file, checks
nothing, adds nothing up, and a lost connection ends it.

    python -m benchmarks.bare aggregator amqp://HOST FEDERATION CHUNK DOWN UP HEAD BODY p01..p04 --rounds 6
    python -m benchmarks.bare workers amqp://HOST FEDERATION CHUNK DOWN UP HEAD BODY p01..p04
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import click
from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from yarl import URL

from broker.definitions import arguments_of
from broker.topology import AGGREGATOR, EVERYONE, Topology
from broker.transport import Binding, Declaration, Exchange
from fluffle.participate import participants as names_of
from fluffle.results import peak_rss_mb

PREFETCH = 64
WINDOW = 16  # chunks that wait for their confirm
INDEX_BYTES = 4


def password(user: str) -> str:
    return f"secret of {user}"


def tell(event: str, **fields: Any) -> None:
    """As Fluffle's processes tell what they do."""
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Flow:
    """The names and sizes of what goes round. `body` 0: there are no chunks."""

    url: URL
    topology: Topology
    chunk_bytes: int
    down: int
    up: int
    head: int
    body: int

    @property
    def chunks(self) -> int:
        return -(-self.body // self.chunk_bytes)

    @property
    def model_stream(self) -> str:
        return self.topology.model("bare")


async def connect(flow: Flow, user: str) -> AbstractConnection:
    return await aio_pika.connect(flow.url.with_user(user).with_password(password(user)).update_query(heartbeat=30))


async def publishing(connection: AbstractConnection) -> AbstractChannel:
    return await connection.channel(publisher_confirms=True, on_return_raises=True)


async def publish(exchange: AbstractExchange, key: str, body: bytes, user: str) -> None:
    await exchange.publish(Message(body, delivery_mode=DeliveryMode.PERSISTENT, user_id=user), key)


async def publish_chunks(exchange: AbstractExchange, key: str, body: memoryview, flow: Flow, user: str) -> None:
    """All chunks, some of them at once."""
    window = asyncio.Semaphore(WINDOW)

    async def one(index: int) -> None:
        async with window:
            chunk = body[index * flow.chunk_bytes : (index + 1) * flow.chunk_bytes]
            await publish(exchange, key, b"".join((index.to_bytes(INDEX_BYTES, "little"), chunk)), user)

    await asyncio.gather(*(one(index) for index in range(flow.chunks)))


@dataclass
class Collector:
    """Puts chunks from a stream into a buffer; `whole` counts the bodies that are there."""

    flow: Flow
    buffer: memoryview
    whole: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _arrived: int = 0

    async def take(self, message: AbstractIncomingMessage) -> None:
        start = int.from_bytes(message.body[:INDEX_BYTES], "little") * self.flow.chunk_bytes
        self.buffer[start : start + len(message.body) - INDEX_BYTES] = memoryview(message.body)[INDEX_BYTES:]
        self._arrived += 1
        if self._arrived == self.flow.chunks:
            self._arrived = 0
            self.whole.release()


async def read(connection: AbstractConnection, stream: str, take: Callable[[AbstractIncomingMessage], Any]) -> None:
    """Everything that comes into a stream from now on, one after the other, acked in batches."""
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    queue = await channel.get_queue(stream, ensure=False)
    came: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()

    async def work() -> None:
        count = 0
        while True:
            message = await came.get()
            await take(message)
            count += 1
            if count % (PREFETCH // 2) == 0 or came.empty():
                await message.channel.basic_ack(message.delivery_tag or 0, multiple=True)

    asyncio.create_task(work()).add_done_callback(_end_with_error)
    await queue.consume(came.put, arguments={"x-stream-offset": "next"})


def _end_with_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        raise error


# -- workers --------------------------------------------------------------------------------------------------


async def serve(flow: Flow, name: str) -> list[AbstractConnection]:
    """Answers each TrainRound of one participant."""
    topology = flow.topology
    reader, writer = await connect(flow, name), await connect(flow, name)
    channel, out = await reader.channel(), await publishing(writer)
    await channel.set_qos(prefetch_count=1)
    up = await out.get_exchange(topology.up, ensure=False)
    chunks = await out.get_exchange(topology.chunks(name), ensure=False)
    collector = Collector(flow, memoryview(bytearray(flow.body)))
    update = bytes(flow.up)

    async def answer(message: AbstractIncomingMessage) -> None:
        await message.ack()
        if flow.body:
            await collector.whole.acquire()
            await publish_chunks(chunks, f"{name}.chunk", collector.buffer, flow, name)
        await publish(up, f"{name}.update", update, name)

    if flow.body:
        await read(reader, flow.model_stream, collector.take)
    inbox = await channel.get_queue(topology.inbox(name), ensure=False)
    await inbox.consume(answer)
    return [reader, writer]


async def workers(flow: Flow, names: Sequence[str]) -> None:
    connections = [await serve(flow, name) for name in names]
    tell("ready", workers=len(names))
    await asyncio.wait([asyncio.ensure_future(connection.closed()) for pair in connections for connection in pair])


# -- the aggregator -------------------------------------------------------------------------------------------


async def lead(flow: Flow, names: Sequence[str], rounds: int) -> None:
    """Round after round: the model, a TrainRound for all, everybody's update, the head record."""
    topology = flow.topology
    reader, writer = await connect(flow, AGGREGATOR), await connect(flow, AGGREGATOR)
    out = await publishing(writer)
    down, default = await out.get_exchange(topology.down, ensure=False), out.default_exchange
    updates: asyncio.Queue[str] = asyncio.Queue()
    heads: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    model = memoryview(bytearray(flow.body))
    collectors = {name: Collector(flow, memoryview(bytearray(flow.body))) for name in names}

    async def note(message: AbstractIncomingMessage) -> None:
        updates.put_nowait((message.routing_key or "").partition(".")[0])

    await read(reader, topology.updates, note)
    for name in names if flow.body else ():
        await read(reader, topology.outbox(name), collectors[name].take)
    head = await (await reader.channel()).get_queue(topology.head, ensure=False)
    await head.consume(heads.put)
    held: AbstractIncomingMessage | None = None
    for number in range(1, rounds + 1):
        if flow.body:
            await publish_chunks(default, flow.model_stream, model, flow, AGGREGATOR)
        await publish(down, EVERYONE, bytes(flow.down), AGGREGATOR)
        for _ in names:
            name = await updates.get()
            if flow.body:
                await collectors[name].whole.acquire()
                model = collectors[name].buffer
        await publish(default, topology.head, bytes(flow.head), AGGREGATOR)
        held, before = await heads.get(), held
        if before is not None:
            await before.ack()
        tell("round_closed", round=number)
    tell("done", peak_mb=peak_rss_mb() * (1 << 20) / 1e6)
    await writer.close()
    await reader.close()


async def declare(flow: Flow, names: Sequence[str]) -> None:
    """The streams of large bodies, and everybody's inbox, as an aggregator and its workers would."""
    connection = await connect(flow, AGGREGATOR)
    channel = await connection.channel()
    things: list[Declaration] = [thing for name in names for thing in flow.topology.inbox_declarations(name)]
    if flow.body:
        things += flow.topology.model_declarations("bare", flow.body)
        things += [thing for name in names for thing in flow.topology.outbox_declarations(name, flow.body)]
    for thing in things:
        if isinstance(thing, Exchange):
            await channel.declare_exchange(thing.name, aio_pika.ExchangeType.TOPIC, durable=True)
        elif isinstance(thing, Binding):
            queue = await channel.get_queue(thing.destination, ensure=False)
            await queue.bind(thing.exchange, thing.pattern)
        else:
            await channel.declare_queue(thing.name, durable=True, arguments=arguments_of(thing))
    await connection.close()


# -- the command ----------------------------------------------------------------------------------------------


@click.command()
@click.argument("role", type=click.Choice(["declare", "aggregator", "workers"]))
@click.argument("url")
@click.argument("federation")
@click.argument("sizes", nargs=5, type=int, metavar="CHUNK DOWN UP HEAD BODY")
@click.argument("participants")
@click.option("--rounds", type=int, default=0)
def main(role: str, url: str, federation: str, sizes: tuple[int, ...], participants: str, rounds: int) -> None:
    """Plays one role of the pump, for PARTICIPANTS as p01..p10."""
    flow, names = Flow(URL(url), Topology(federation), *sizes), names_of(participants)
    match role:
        case "declare":
            asyncio.run(declare(flow, names))
        case "workers":
            asyncio.run(workers(flow, names))
        case "aggregator":
            asyncio.run(lead(flow, names, rounds))


if __name__ == "__main__":
    main()
