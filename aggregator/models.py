"""Where bodies of global models and of strategies' states go, and where a leader gets them from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from aggregator.archive import Archive
from aggregator.ways import Ways
from broker.errors import BadMessage, ConnectionLost, ModelMissing, PublishFailed, TransportError
from broker.head import HeadRecord
from broker.messages import Chunk, Where
from broker.offload import off_loop
from broker.payloads import PREFETCH, Address, Assembly, collect, describe, upload, verify
from broker.tensors import Buffer, in_memory
from broker.topology import AGGREGATOR
from broker.transport import Inbox, Stream
from broker.wire import decode

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bodies:
    """What a version consists of: the global model, and the strategy's state, which is empty if it has none."""

    model: Buffer
    state: Buffer = b""


class Models:
    """Stores models for participants and for the next leader, and loads them back by digest.

    Large ones go to the claim-check store, if there is one, else into a stream.
    """

    def __init__(self, ways: Ways, archive: Archive) -> None:
        self._reader, self._writer, self._topology, self._store = (
            ways.reader,
            ways.writer,
            ways.topology,
            ways.store,
        )
        self._settings = ways.settings.broker
        self._part_bytes = ways.settings.store.part_bytes
        self._archive = archive

    async def put(self, run_id: str, blob: Buffer) -> Where:
        """Puts a model on the disk, and where others find it, before it is named; unless the record itself carries
        it."""
        return await self._put(run_id, blob, self._topology.model_declarations(run_id, len(blob)))

    async def put_state(self, run_id: str, blob: Buffer) -> Where | None:
        """As `put`, for what outlives a round beside the model. No state goes nowhere."""
        if not blob:
            return None
        return await self._put(run_id, blob, self._topology.state_declarations(run_id, len(blob)))

    async def _put(self, run_id: str, blob: Buffer, stream: Sequence[Stream]) -> Where:
        where = await off_loop(len(blob), self._describe, blob)
        if where.where == "inline":
            self._archive.keep(where.sha256, blob)
            return where
        if where.where == "stream":
            await self._writer.declare(*stream)
            where = await self._put_chunks(stream[0].name, where, blob)
        else:
            await self.put_again(run_id, where, blob)
        await self._archive.store(where.sha256, blob)
        return where

    async def put_difference(self, run_id: str, body: Buffer) -> Where:
        """Puts a difference where the models are. Nobody needs it for long, so it is not kept on the disk."""
        where = await off_loop(len(body), self._describe, body, 0)
        if where.where == "url":
            await self.put_again(run_id, where, body)
            return where
        return await self._put_chunks(self._topology.model(run_id), where, body)

    def is_large(self, blob: Buffer) -> bool:
        """Whether participants fetch such a model, rather than get it with every order."""
        return len(blob) > self._settings.inline_bytes

    def room(self, size_bytes: int) -> Buffer:
        """Where a model is to be written. For a thread."""
        is_large = size_bytes > self._settings.inline_bytes
        return self._archive.room(size_bytes) if is_large else in_memory(size_bytes)

    async def put_again(self, run_id: str, where: Where | None, blob: Buffer) -> None:
        """Makes sure that a model in the store is there: somebody may have deleted it."""
        if where is not None and where.where == "url" and self._store is not None:
            await self._store.upload(self._topology.model_place(run_id), where, blob)

    async def forget(self, old: HeadRecord, new: HeadRecord) -> None:
        """Deletes the models of a run that is over, and its strategy's state."""
        for stream in {body.stream for body in old.bodies} - {body.stream for body in new.bodies} - {""}:
            await self._writer.delete(stream)
        if old.model is not None and old.model.where == "url" and self._store is not None:
            await self._store.delete(self._topology.model_place(old.run_id))

    async def get(self, run_id: str, where: Where, payload: memoryview, what: str = "model") -> tuple[Buffer, bool]:
        """A body, and whether it is where others find it. Raises ModelMissing if it is neither there nor here."""
        try:
            return await self._fetch(run_id, where, payload), True
        except ConnectionLost:
            raise
        except (BadMessage, TransportError) as error:  # overwritten, lost with the broker's disk, or no such stream
            log.error("body_not_found", what=what, sha256=where.sha256, where=where.where, reason=str(error))
        blob = await self._archive.load(where.sha256)
        if blob is None:
            raise ModelMissing(
                f"{what} {where.sha256[:12]} is neither on the broker nor in a store nor among the checkpoints "
                "here: the lead goes to an aggregator that has it; start one where its run directory is"
            )
        return blob, False

    async def _fetch(self, run_id: str, where: Where, payload: memoryview) -> Buffer:
        if where.where == "inline":
            blob: Buffer = bytes(payload[: where.size_bytes])
        else:
            room = await asyncio.to_thread(self.room, where.size_bytes)
            blob, assembly = memoryview(room).toreadonly(), Assembly.into(room, where, AGGREGATOR)
            if where.where == "stream":
                await self._collect(assembly)
            elif self._store is None:
                raise BadMessage("it lies in a claim-check store, and this aggregator was given none")
            else:
                await self._store.fill(self._topology.model_place(run_id), assembly)
        await verify(blob, where)
        return blob

    async def _collect(self, assembly: Assembly) -> None:
        where = assembly.where
        stream = await self._reader.read(where.stream, offset=where.first_offset, prefetch=PREFETCH)
        await collect(stream, assembly, end=None, patience_s=self._settings.patience_s)
        await stream.close()

    def _describe(self, blob: Buffer, inline_bytes: int | None = None) -> Where:
        inline_bytes = self._settings.inline_bytes if inline_bytes is None else inline_bytes
        if self._store is not None:
            return describe(blob, inline_bytes, self._part_bytes, "url")
        return describe(blob, inline_bytes, self._settings.chunk_bytes)

    async def _put_chunks(self, stream: str, where: Where, blob: Buffer) -> Where:
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
