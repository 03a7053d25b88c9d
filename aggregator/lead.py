"""The baton: whoever holds the newest head record unacked leads, and nobody else can commit.

The record lies in a queue with one active consumer. Being handed anything from it means to lead; everyone
else waits and needs to know nothing. A leader that lost its connection may still publish, but its record is
never delivered back to it, so it commits nothing. docs/architecture.md walks through every crash.
"""

from __future__ import annotations

from typing import Self

import structlog

from broker.errors import BadMessage, LeadershipLost
from broker.head import HeadRecord
from broker.messages import MAX_COUNT, Barrier
from broker.retry import publish
from broker.tensors import Buffer
from broker.topology import Topology
from broker.transport import Delivery, Inbox, Transport
from broker.wire import decode, encode

log = structlog.get_logger(__name__)


class Lead:
    """Leadership over one federation. `record` and `payload` are what was committed last.

    `reader` consumes the head queue, `writer` publishes: two plain connections, for a blocked publisher must
    not stop deliveries. `name` tells this process from all others. Every wait but the standby's own ends
    after `patience_s` with LeadershipLost; a lost connection raises ConnectionLost. Both mean: start again.
    """

    def __init__(
        self, reader: Transport, writer: Transport, topology: Topology, name: str, patience_s: float
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.name = name
        self.record = HeadRecord(by=name)
        self.payload = memoryview(b"")
        self._queue = topology.head
        self._patience_s = patience_s
        self._inbox: Inbox
        self._baton: Delivery

    async def acquire(self) -> Self:
        """Waits, as a standby, until this process leads; then claims the newest record for a new epoch."""
        await self._publish(self.record)  # the genesis record: lowest rank, and there is something to be handed
        self._inbox = await self.reader.consume(self._queue)
        log.info("standing_by", queue=self._queue)
        held = [await self._first()]
        held += await self._read_to_barrier()
        newest, payload = max((_record(d) for d in held), key=lambda found: found[0].rank)
        claim = newest.with_(epoch=newest.epoch + 1, seq=0, by=self.name)
        self._baton = await self._publish_and_see(claim, payload)
        self.record, self.payload = claim, payload
        for older in held:
            await older.ack()
        log.info("leading", epoch=claim.epoch, run_id=claim.run_id, version=claim.version)
        return self

    async def commit(self, record: HeadRecord, payload: Buffer) -> None:
        """Replaces the record: published, confirmed, delivered back, and only then the previous one acked."""
        record = record.checked(by=self.name)
        if record.rank <= self.record.rank:
            raise ValueError(f"record {record.rank} does not follow {self.record.rank}")
        returned = await self._publish_and_see(record, payload)
        await self._baton.ack()
        self._baton, self.record, self.payload = returned, record, memoryview(payload)

    async def refresh(self) -> None:
        """Publishes the same record again, because brokers take back what is held for too long."""
        await self.commit(self.record.with_(seq=self.record.seq + 1), self.payload)

    async def _first(self) -> Delivery:
        while (first := await self._inbox.get(self._patience_s)) is None:
            log.debug("still_standing_by", queue=self._queue)
        return first

    async def _read_to_barrier(self) -> list[Delivery]:
        barrier = Barrier(nonce=self.name)
        await publish(self.writer, "", self._queue, encode(barrier), timeout_s=self._patience_s)
        held: list[Delivery] = []
        while not held or _parse(held[-1])[0] != barrier:
            held.append(await self._next("the barrier"))
        return held

    async def _publish_and_see(self, record: HeadRecord, payload: Buffer) -> Delivery:
        frame = await self._publish(record, payload)
        while True:
            delivery = await self._next(f"record {record.rank}")
            if delivery.body == frame:
                return delivery
            found, _ = _record(delivery)
            if found.rank > record.rank:
                raise LeadershipLost(f"record {found.rank} by {found.by} outranks {record.rank}: another one leads")
            await delivery.ack()  # a standby's genesis, or a former leader's record that nobody waits for
            log.info("foreign_record_dropped", rank=found.rank, by=found.by)

    async def _publish(self, record: HeadRecord, payload: Buffer = b"") -> bytes:
        frame = encode(record, payload)
        await publish(self.writer, "", self._queue, frame, timeout_s=self._patience_s)
        return frame

    async def _next(self, awaited: str) -> Delivery:
        delivery = await self._inbox.get(self._patience_s)
        if delivery is None:
            raise LeadershipLost(f"{awaited} was not delivered back within {self._patience_s:g} s")
        return delivery


def _parse(delivery: Delivery) -> tuple[object, memoryview]:
    try:
        return decode(delivery.body)
    except BadMessage as bad:
        log.error("head_record_unreadable", reason=bad.reason, size_bytes=len(delivery.body))
        return None, memoryview(b"")


def _record(delivery: Delivery) -> tuple[HeadRecord, memoryview]:
    """The record of a delivery; what is no record, or has no epoch after it, ranks as low as genesis."""
    message, payload = _parse(delivery)
    if isinstance(message, HeadRecord) and message.epoch < MAX_COUNT:
        return message, payload
    return HeadRecord(), memoryview(b"")
