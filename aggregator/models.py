"""Where bodies of global models go, and where a leader gets them from."""

from __future__ import annotations

import structlog

from aggregator.archive import Archive
from aggregator.settings import BrokerSettings
from broker.errors import BadMessage, ConnectionLost, ModelMissing, PublishFailed, TransportError
from broker.messages import Chunk, Where
from broker.offload import off_loop
from broker.payloads import Address, Assembly, collect, describe, upload, verify
from broker.tensors import Buffer
from broker.topology import AGGREGATOR, Topology
from broker.transport import Inbox, Transport
from broker.wire import decode

log = structlog.get_logger(__name__)


class Models:
    """Stores models for participants and for the next leader, and loads them back by digest."""

    def __init__(
        self, reader: Transport, writer: Transport, topology: Topology, archive: Archive, settings: BrokerSettings
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._topology = topology
        self._archive = archive
        self._settings = settings

    async def put(self, run_id: str, blob: Buffer) -> Where:
        """Puts a body on the disk, and on the broker if it is too large to travel inline, before it is named."""
        where = await off_loop(len(blob), describe, blob, self._settings.inline_bytes, self._settings.chunk_bytes)
        if where.where == "stream":
            where = await self._put_chunks(run_id, where, blob)
        await self._archive.store(where.sha256, blob)
        return where

    async def _put_chunks(self, run_id: str, where: Where, blob: Buffer) -> Where:
        stream = self._topology.model(run_id)
        await self._writer.declare(*self._topology.model_declarations(run_id, where.size_bytes))
        tail = await self._reader.read(stream, offset="next", prefetch=1)
        await upload(self._writer, Address("", stream), where, blob)
        first_offset = await self._offset_of(tail, where)
        await tail.close()
        return where.model_copy(update={"stream": stream, "first_offset": first_offset})

    async def _offset_of(self, tail: Inbox, where: Where) -> int:
        """Where the body begins; a former leader may have written between, so its digest is compared."""
        while (delivery := await tail.get(self._settings.patience_s)) is not None:
            message, _ = decode(delivery.body)
            if isinstance(message, Chunk) and message.of == where.sha256:
                return delivery.offset
        raise PublishFailed(f"the model's chunks were confirmed but cannot be read back from {where.stream}")

    async def get(self, where: Where, payload: memoryview) -> tuple[Buffer, bool]:
        """A body, and whether it came from the broker. Raises ModelMissing if it is neither there nor here."""
        try:
            return await self._from_broker(where, payload), True
        except ConnectionLost:
            raise
        except (BadMessage, TransportError) as error:  # overwritten, lost with the broker's disk, or no such stream
            log.error("model_not_on_broker", sha256=where.sha256, reason=str(error))
        blob = await self._archive.load(where.sha256)
        if blob is None:
            raise ModelMissing(
                f"model {where.sha256[:12]} is neither on the broker nor among the checkpoints here: the lead goes "
                "to an aggregator that has it; start one where its run directory is"
            )
        return blob, False

    async def _from_broker(self, where: Where, payload: memoryview) -> Buffer:
        if where.where == "inline":
            blob: Buffer = bytes(payload[: where.size_bytes])
        else:
            blob = bytearray(where.size_bytes)
            stream = await self._reader.read(where.stream, offset=where.first_offset)
            assembly = Assembly.into(blob, where, AGGREGATOR)
            await collect(stream, assembly, end=None, patience_s=self._settings.patience_s)
            await stream.close()
        await verify(blob, where)
        return blob
