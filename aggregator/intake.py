"""How what participants send is checked before anything believes it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from pathlib import Path

import structlog

from aggregator.ways import Ways
from broker import codecs
from broker.codecs import NONE, SPARE_BYTES
from broker.errors import BadMessage, ConnectionLost, StoreFailed, TransportError
from broker.lora import largest_rank, of_rank
from broker.mapped import draft
from broker.messages import Barrier, FromParticipant, Message, UpdateReady, Wants, Where
from broker.offload import off_loop
from broker.payloads import MIN_CHUNK_BYTES, MIN_PART_BYTES, PREFETCH, Assembly, collect, is_possible, verify
from broker.retry import publish
from broker.tensors import Arrays, Buffer, Named
from broker.transport import Delivery
from broker.travelling import beside
from broker.wire import encode

log = structlog.get_logger(__name__)


def check_sender(message: Message, delivery: Delivery) -> FromParticipant:
    """The message, if the broker vouches that its sender and address are those that it names."""
    if not isinstance(message, FromParticipant):
        raise BadMessage(f"a {message.kind} message is nothing that a participant sends")
    if message.participant != delivery.sender or delivery.key != f"{message.participant}.{message.kind}":
        raise BadMessage(
            f"{message.kind} message in the name of {message.participant!r} "
            f"came from {delivery.sender!r} with key {delivery.key!r}"
        )
    return message


class Intake:
    """Fetches an update's arrays: from behind its header, from its participant's outbox, or from the store."""

    def __init__(self, ways: Ways, scratch: Path) -> None:
        self._reader, self._writer, self._topology = ways.reader, ways.writer, ways.topology
        self._settings, self._codecs, self._store = ways.settings.broker, ways.settings.codec.allowed, ways.store
        self._scratch = scratch
        self._like: Arrays = {}
        self._of_rank: dict[int, Arrays] = {}
        self._ranks = ways.settings.strategy.name == "lora-stack"
        self._beside: Arrays = {}
        self._read_to: dict[str, int] = {}
        self._forgotten: set[str] = set()

    def expect(self, travels: Arrays, wants: Wants) -> None:
        """What updates are like: those tensors of the model that travel."""
        self._like, self._of_rank = travels, {}
        self._beside = beside(self._like, wants)

    def _like_of(self, update: UpdateReady) -> Arrays:
        """What its arrays must be like. Raises BadMessage for a rank that nobody can have."""
        rank = update.lora_rank
        if not rank:
            return self._like
        if not self._ranks or rank > largest_rank(self._like):
            most = largest_rank(self._like)
            raise BadMessage(f"adapters of rank {rank}: the model's have {most}, and only lora-stack takes lower")
        if rank not in self._of_rank:
            self._of_rank[rank] = of_rank(self._like, rank)
        return self._of_rank[rank]

    def _most_bytes(self, model_bytes: int) -> int:
        return model_bytes + sum(values.nbytes for values in self._beside.values())

    async def prepare(self, participant: str, model: Where | None) -> None:
        """Makes sure that a participant has somewhere to put large updates: they go the way that the model came."""
        if model is not None and model.where == "stream" and participant not in self._read_to:
            outbox = self._topology.outbox_declarations(
                participant, self._most_bytes(model.size_bytes) + SPARE_BYTES
            )
            try:
                await self._writer.declare(*outbox)
            except ConnectionLost:
                raise
            except TransportError as error:  # left by a run with a model of another size
                log.info("outbox_replaced", participant=participant, reason=str(error))
                await self._writer.delete(self._topology.outbox(participant))
                await self._writer.declare(*outbox)
            self._read_to[participant] = 0
            self._forgotten.discard(participant)

    async def forget(self, removed: Iterable[str]) -> None:
        """Deletes the outboxes of the removed, once nothing that lies there may be read again."""
        for participant in set(removed) - self._forgotten:
            await self._writer.delete(self._topology.outbox(participant))
            self._read_to.pop(participant, None)
            self._forgotten.add(participant)

    async def arrays(self, update: UpdateReady, payload: memoryview, model_bytes: int) -> tuple[Named, Arrays]:
        """The update's arrays: whole, genuine, decoded, and shaped like the model; and what travels beside them.
        Raises BadMessage."""
        most_bytes, like = self._most_bytes(model_bytes), self._like_of(update)
        if update.body is None:
            raise BadMessage("the update has no body")
        if update.codec not in (NONE, *self._codecs):
            raise BadMessage(
                f"codec {update.codec!r} is none that this run allows: {', '.join((NONE, *self._codecs))}"
            )
        if update.body.size_bytes > most_bytes + SPARE_BYTES:
            raise BadMessage(f"body of {update.body.size_bytes} bytes is above the model's {most_bytes}")
        blob = self._handed_over(update, update.body)
        if blob is None:
            blob = await self._body(update, update.body, payload)
            await verify(blob, update.body)
        size_bytes = 0 if update.codec == NONE else most_bytes  # without a codec they are views
        return await off_loop(size_bytes, codecs.packing(update.codec).unpack_both, blob, like, self._beside)

    def _handed_over(self, update: UpdateReady, where: Where) -> Buffer | None:
        if self._store is None or where.where != "url":
            return None
        return self._store.handed_over(self._place(update), where)

    def _place(self, update: UpdateReady) -> str:
        return self._topology.update_place(update.participant, update.run_id, str(update.task))

    async def _body(self, update: UpdateReady, where: Where, payload: memoryview) -> Buffer:
        match where.where:
            case "inline":
                return payload
            case "stream":
                return await self._from_outbox(update.participant, where)
            case "url":
                return await self._from_store(update, where)

    async def _from_outbox(self, participant: str, where: Where) -> Buffer:
        """All chunks were confirmed before the update was announced, so a barrier ends the search for them."""
        if participant not in self._read_to:
            raise BadMessage(f"{participant} has no outbox: large updates go the way that the model came")
        _check_pieces(where, MIN_CHUNK_BYTES)
        outbox = self._topology.outbox(participant)
        buffer = await asyncio.to_thread(draft, self._scratch, where.size_bytes)
        barrier = Barrier(nonce=secrets.token_hex(8))
        stream = await self._reader.read(outbox, offset=self._read_to[participant], prefetch=PREFETCH)
        try:
            await publish(self._writer, "", outbox, encode(barrier), timeout_s=self._settings.patience_s)
            assembly = Assembly.into(buffer, where, participant)
            await collect(stream, assembly, end=barrier, patience_s=self._settings.patience_s)
            self._read_to[participant] = assembly.read_to
        finally:
            await stream.close()
        return buffer

    async def _from_store(self, update: UpdateReady, where: Where) -> Buffer:
        """It was stored before it was announced, where nobody else may write."""
        if self._store is None:
            raise BadMessage("the update is in a claim-check store, and this aggregator was given none")
        _check_pieces(where, MIN_PART_BYTES)
        room = await asyncio.to_thread(draft, self._scratch, where.size_bytes)
        assembly = Assembly.into(room, where, update.participant)
        try:
            await self._store.fill(self._place(update), assembly)
        except StoreFailed as failed:
            await self._store.names(self._topology.model_place(update.run_id))  # or the store is at fault
            raise BadMessage(f"its body cannot be read: {failed}") from failed
        return assembly.buffer


def _check_pieces(where: Where, min_piece_bytes: int) -> None:
    if not is_possible(where, min_piece_bytes):
        raise BadMessage(f"{where.size_bytes} bytes in {where.chunks} pieces are impossible")
