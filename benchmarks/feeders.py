"""Participants that all send the same update from one file, whatever they are told: they hold no model.

    python -m benchmarks.feeders URL FEDERATION p01..p12 BODY

So that an aggregator's memory can be measured with many participants on a machine that could not hold all of them.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import click

from benchmarks.fleet import password
from broker.messages import Join, TrainRound, UpdateReady
from broker.payloads import Address, describe, upload
from broker.rabbitmq import RabbitBroker
from broker.topology import Topology
from broker.transport import Transport
from broker.wire import decode, encode
from fluffle.participate import participants
from workers.trainer import Sizes

HEARTBEAT_S = 2.0


@dataclass(frozen=True, slots=True)
class Feed:
    """What everybody sends, and its digest."""

    body: memoryview
    sha256: str


async def serve(broker: RabbitBroker, topology: Topology, name: str, feed: Feed) -> None:
    """Answers every TrainRound that asks for something, until the run is finished."""
    reader, writer = await broker.connect(name, purpose="consume"), await broker.connect(name, purpose="publish")
    await reader.declare(*topology.inbox_declarations(name))
    inbox = await reader.consume(topology.inbox(name), prefetch=1)
    done, run_id, finished = 0, "", False
    while not finished:
        if (delivery := await inbox.get(HEARTBEAT_S)) is None:  # nobody knows of it yet
            await writer.publish(topology.up, f"{name}.join", encode(Join(participant=name, run_id=run_id)))
            continue
        told, _ = decode(delivery.body)
        await delivery.ack()
        assert isinstance(told, TrainRound)
        if told.run_id != run_id:
            run_id = told.run_id
            await writer.publish(topology.up, f"{name}.join", encode(Join(participant=name, run_id=run_id)))
        if name in told.asked and told.task > done:
            done = told.task
            await answer(writer, topology, name, told, feed)
        finished = told.finished
    await writer.close()
    await reader.close()


async def answer(writer: Transport, topology: Topology, name: str, told: TrainRound, feed: Feed) -> None:
    sizes = Sizes()
    where = describe(b"", sizes.inline_bytes, sizes.chunk_bytes).model_copy(
        update={"size_bytes": len(feed.body), "sha256": feed.sha256}
    )
    if len(feed.body) > sizes.inline_bytes:
        where = where.model_copy(update={"where": "stream", "chunks": -(-len(feed.body) // sizes.chunk_bytes)})
        await upload(writer, Address(topology.chunks(name), f"{name}.chunk"), where, feed.body)
    update = UpdateReady(
        participant=name, run_id=told.run_id, epoch=told.epoch, task=told.task, arrays="delta", num_examples=10,
        base_sha256=told.model.sha256 if told.model else "", body=where,
    )  # fmt: skip
    inline = b"" if where.where == "stream" else feed.body
    await writer.publish(topology.up, f"{name}.update", encode(update, inline))


async def serve_all(url: str, federation: str, names: list[str], feed: Feed) -> None:
    broker, topology = RabbitBroker(url, password), Topology(federation)
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(serve(broker, topology, name, feed))


@click.command()
@click.argument("url")
@click.argument("federation")
@click.argument("named")
@click.argument("body", type=click.Path(exists=True, path_type=Path))
def main(url: str, federation: str, named: str, body: Path) -> None:
    """Serves the participants NAMED (as p01..p12) until their run is finished."""
    with body.open("rb") as file:
        view = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
    feed = Feed(view, hashlib.sha256(view).hexdigest())
    asyncio.run(serve_all(url, federation, participants(named), feed))


if __name__ == "__main__":
    main()
