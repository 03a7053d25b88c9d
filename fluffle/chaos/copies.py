"""Messages that travelled, published again: later, in another order, under their own user and key.

A network may do that to any message, and so may a client that was never told that its publish arrived. Whoever does
it here knows every user's password; the broker verifies senders all the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from broker.head import HeadRecord
from broker.retry import publish
from broker.topology import AGGREGATOR, EVERYONE, Topology
from broker.transport import Binding, Broker, Stream, Transport
from broker.wire import encode
from fluffle.chaos.streams import read_all

KEPT_BYTES = 64 << 20  # of TrainRounds
RECENT = 40  # of what participants sent last: half of what is repeated is among that
MOST_ORDERS, MOST_CHUNKS, MOST_RECORDS = 6, 12, 3  # at once

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Copy:
    """A message as it was published."""

    user: str
    exchange: str
    key: str
    frame: bytes


@dataclass(frozen=True)
class Copies:
    """Knows what travelled in a federation. `run_dirs` have head records; if `large`, there are outboxes."""

    broker: Broker
    topology: Topology
    participants: Sequence[str]
    run_dirs: Sequence[Path]
    large: bool = False

    async def keep_orders(self) -> None:
        """From now on a TrainRound also goes where it can be read again: an inbox holds the newest alone."""
        bindings = [Binding(self.topology.down, key, self._orders) for key in (EVERYONE, *self.participants)]
        connection = await self._connect()
        await connection.declare(Stream(self._orders, KEPT_BYTES, KEPT_BYTES // 8), *bindings)
        await connection.close()

    async def forget_orders(self) -> None:
        connection = await self._connect()
        await connection.delete(self._orders)
        await connection.close()

    async def of_updates(self) -> list[Copy]:
        """Everything that lies in `updates`."""
        connection = await self._connect()
        found = await self._published(connection, self.topology.updates, self.topology.up)
        await connection.close()
        return found

    async def repeat(self, count: int, lost: Sequence[Copy], dice: Random) -> int:
        """Publishes so many of the participants' messages again, among them `lost` ones, and a few of each other
        kind; returns how many in all."""
        updates, records = await self.of_updates(), await asyncio.to_thread(self._old_records)
        connection = await self._connect()
        chosen = [
            *_some(updates[-RECENT:], count // 2, dice),
            *_some([*updates, *lost], count // 4, dice),
            *_some(lost, count // 4, dice),
            *await self._old_orders(connection, dice),
            *await self._old_chunks(connection, dice),
            *_some(records, MOST_RECORDS, dice),
        ]
        await connection.close()
        dice.shuffle(chosen)
        await self._publish(chosen)
        return len(chosen)

    @property
    def _orders(self) -> str:
        return self.topology.check("orders")

    async def _connect(self) -> Transport:
        return await self.broker.connect(AGGREGATOR, purpose="copies")

    async def _published(self, connection: Transport, stream: str, exchange: str) -> list[Copy]:
        """What participants sent through that exchange, and what the aggregator put into the stream itself."""
        return [
            Copy(d.sender, "", stream, d.body)
            if d.sender == AGGREGATOR
            else Copy(d.sender, exchange, d.key, d.body)
            for d in await read_all(connection, stream)
        ]

    async def _old_orders(self, connection: Transport, dice: Random) -> list[Copy]:
        """Each for one participant: in its inbox an old one takes the place of the newest."""
        orders = _some(await read_all(connection, self._orders), MOST_ORDERS, dice)
        return [Copy(AGGREGATOR, self.topology.down, dice.choice(self.participants), d.body) for d in orders]

    async def _old_chunks(self, connection: Transport, dice: Random) -> list[Copy]:
        if not self.large:
            return []
        whose = dice.choice(self.participants)
        chunks = await self._published(connection, self.topology.outbox(whose), self.topology.chunks(whose))
        return _some(chunks, MOST_CHUNKS, dice)

    def _old_records(self) -> list[Copy]:
        found = []
        for manifest in (path for directory in self.run_dirs for path in directory.glob("checkpoints/v*.json")):
            with suppress(FileNotFoundError):  # only the newest few are kept
                found.append(Copy(AGGREGATOR, "", self.topology.head, _record(manifest)))
        return found

    async def _publish(self, copies: Sequence[Copy]) -> None:
        async with AsyncExitStack() as stack:
            connections: dict[str, Transport] = {}
            for copy in copies:
                if copy.user not in connections:
                    connections[copy.user] = await self.broker.connect(copy.user, purpose="copies")
                    stack.push_async_callback(connections[copy.user].close)
                await publish(connections[copy.user], copy.exchange, copy.key, copy.frame)


def _record(manifest: Path) -> bytes:
    """The head record that a manifest has, as it lay in the queue."""
    found = json.loads(manifest.read_bytes())
    record = HeadRecord.model_validate_json(json.dumps(found["head"]))
    inline = record.model is not None and record.model.where == "inline"
    return encode(record, manifest.with_name(found["file"]).read_bytes() if inline else b"")


def _some(of: Sequence[Item], most: int, dice: Random) -> list[Item]:
    return dice.sample(of, min(most, len(of)))
