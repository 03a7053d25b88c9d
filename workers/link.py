"""A worker's way to the broker: connected whenever the broker can be reached, and silent about it otherwise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog

from broker import tensors
from broker.codecs.difference import advanced
from broker.errors import AccessRefused, BadMessage, ChunksMissing, ConfigError, ConnectionLost, TransportError
from broker.messages import Difference, FromParticipant, TrainRound, UpdateReady, Where
from broker.offload import off_loop
from broker.payloads import PREFETCH, Address, Arrived, Assembly, collect, upload, verify
from broker.retry import Backoff, publish
from broker.store import Store
from broker.tensors import Buffer, Room
from broker.topology import AGGREGATOR, CHUNK, Topology
from broker.transport import Broker, Delivery, Inbox, Transport
from broker.wire import encode
from workers.journal import Held
from workers.trainer import Sizes
from workers.transfer import Transfer, TransferStatus, What

NO_ARRAYS = tensors.encode({})

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Waits, sizes, time, and who is told what the worker does. `lag_s` adds seconds to the work on an order, which
    came to this update: to study slow machines. `stopwatch` measures how long work takes."""

    heartbeat_s: float = 10.0
    patience_s: float = 30.0
    retry_s: float = 10.0  # at the most, between attempts to connect
    sizes: Sizes = field(default_factory=Sizes)
    lag_s: Callable[[TrainRound, UpdateReady], float] = lambda told, update: 0.0  # noqa: ARG005
    on_notice: Callable[..., object] = field(default_factory=lambda: _whisper())  # an event's word, and its fields
    on_transfer: Callable[[str, TransferStatus], object] = lambda participant, status: None  # noqa: ARG005
    clock: Callable[[], float] = time.time
    stopwatch: Callable[[], float] = time.monotonic


def _whisper() -> Callable[..., object]:
    """For a worker among many: what it does is only of interest when something is searched for."""
    whisper: Callable[..., object] = log.bind().debug  # bound once: else most of a small round goes into this
    return whisper


class Listener(Protocol):
    """What the link calls, one call at a time."""

    async def on_connected(self) -> None: ...

    async def on_delivery(self, delivery: Delivery) -> None: ...

    async def on_heartbeat(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole model that was fetched."""

    sha256: str
    blob: Buffer


@dataclass(frozen=True, slots=True)
class Means:
    """The way to the claim-check store, if there is one, and `room` for a large body that arrives: it is asked
    for in a thread."""

    store: Store | None = None
    room: Room = tensors.in_memory


class Link:
    """One connection to consume and one to publish, made again whenever either is lost.

    While there is none, everything that needs one raises ConnectionLost at once. Who is refused before it ever was
    connected has the wrong name or password: that is raised.
    """

    def __init__(
        self, participant: str, broker: Broker, topology: Topology, settings: WorkerSettings, means: Means
    ) -> None:
        self.participant = participant
        self.trouble = "it is being connected to"  # why there is no connection; empty while there is
        self.transfer: Transfer | None = None  # the large body that is on its way now
        self._broker, self._topology, self._settings = broker, topology, settings
        self._store, self._room = means.store, means.room
        self._backoff = Backoff(settings.retry_s)
        self._reader: Transport | None = None
        self._writer: Transport | None = None
        self._welcome = False
        self._kept: Kept | None = None  # the model that a difference may begin with
        self._partial: Assembly | None = None  # what came of a model before the connection was lost

    @property
    def blocked(self) -> str:
        """Why the broker takes nothing that is published; empty if it does."""
        return self._writer.blocked if self._writer is not None else ""

    async def run(self, listener: Listener) -> None:
        """Connects, listens, sends heartbeats, and begins again when the connection is lost; for ever."""
        while True:
            try:
                await self._converse(listener)
            except TransportError as lost:
                if isinstance(lost, AccessRefused) and not self._welcome:
                    raise
                self.trouble, pause_s = str(lost), self._backoff.next_s()
                log.warning(
                    "not_connected", participant=self.participant, reason=str(lost), next_try_s=round(pause_s, 2)
                )
                await asyncio.sleep(pause_s)

    async def send(self, message: FromParticipant, payload: Buffer = b"") -> None:
        """Publishes one message and returns once it is confirmed. Raises TransportError."""
        key = f"{self.participant}.{message.kind}"
        await publish(_connected(self._writer), self._topology.up, key, encode(message, payload))

    async def deliver(self, held: Held, arrived: Arrived) -> None:
        """Publishes an update: the pieces of its body first, from the first that is not confirmed on, so that
        whoever reads of it finds them all. `arrived` is told how many are confirmed; what it raises ends it."""
        body = held.update.body
        if body is None or body.where == "inline":
            await self.send(held.update, held.blob if body is not None else b"")
            return
        with self._on_its_way("update", body, held.confirmed) as transfer:

            async def came(count: int) -> None:
                transfer.arrived(count)
                await arrived(count)

            await self._upload(held, body, came)
        await self.send(held.update)

    async def _upload(self, held: Held, body: Where, arrived: Arrived) -> None:
        update = held.update
        if body.where == "stream":
            outbox = Address(self._topology.chunks(self.participant), f"{self.participant}.{CHUNK}")
            writer = _connected(self._writer)
            await upload(writer, outbox, body, held.blob, first=held.confirmed, after=arrived)
        else:
            place = self._topology.update_place(self.participant, update.run_id, str(update.task))
            await self._known_store().upload(place, body, held.blob, first=held.confirmed, after=arrived)

    @contextmanager
    def _on_its_way(self, what: What, where: Where, first: int) -> Iterator[Transfer]:
        tell = partial(self._settings.on_transfer, self.participant)
        self.transfer = Transfer.begin(what, where, first, self._settings.stopwatch, tell)
        try:
            yield self.transfer
        finally:
            self.transfer = None

    async def fetch(self, told: TrainRound, payload: memoryview) -> Buffer:
        """The bytes of a run's global model. Raises TransportError, or BadMessage if they are not there or damaged;
        ConfigError if they are in a claim-check store and this site names none.

        Whoever has the version before fetches the difference, if there is one; and all of it, if that does not
        lead to the model.
        """
        if told.model is None:
            raise BadMessage("the order names no model")
        if (handed_over := self._handed_over(told.run_id, told.model)) is not None:
            return handed_over
        if self._kept is not None and self._kept.sha256 == told.model.sha256:
            return self._kept.blob
        blob = await self._advance(told.run_id, told.model, told.difference)
        if blob is None:
            blob = (
                payload[: told.model.size_bytes]
                if told.model.where == "inline"
                else await self._download(told.run_id, told.model)
            )
            await verify(blob, told.model)
        self._kept = Kept(told.model.sha256, blob) if told.difference else None
        return blob

    async def fetch_state(self, told: TrainRound, payload: memoryview) -> Buffer:
        """The bytes of the strategy's state, if participants need it; of no arrays if there is none. Raises as
        `fetch` does."""
        where = told.state
        if where is None:
            return NO_ARRAYS
        if where.where == "inline":
            begin = told.model.size_bytes if told.model is not None and told.model.where == "inline" else 0
            blob: Buffer = payload[begin : begin + where.size_bytes]
        elif (handed_over := self._handed_over(told.run_id, where)) is not None:
            return handed_over
        else:
            blob = await self._download(told.run_id, where)
        await verify(blob, where)
        return blob

    def _handed_over(self, run_id: str, where: Where) -> Buffer | None:
        if where.where != "url":
            return None
        return self._known_store().handed_over(self._topology.model_place(run_id), where)

    async def _advance(self, run_id: str, model: Where, step: Difference | None) -> Buffer | None:
        """The model by way of the difference to the version that is here; None if that is not to be had."""
        kept = self._kept
        if kept is None or step is None or step.base != kept.sha256:
            return None
        try:
            body = await self._download(run_id, step.body)
            await verify(body, step.body)
            blob = await off_loop(len(kept.blob), _advanced, kept.blob, step.codec, body)
            await verify(blob, model)
        except BadMessage as bad:
            self._settings.on_notice("difference_not_used", participant=self.participant, reason=bad.reason)
            return None
        self._settings.on_notice(
            "difference_applied", participant=self.participant, bytes=len(body), of=model.size_bytes
        )
        return blob

    async def _download(self, run_id: str, where: Where) -> Buffer:
        """Goes on where the last attempt was cut off, if that was to fetch the same."""
        if self._partial is None or self._partial.where != where:
            blob = await asyncio.to_thread(self._room, where.size_bytes)
            self._partial = Assembly.into(blob, where, AGGREGATOR)
        assembly = self._partial
        missed = len(assembly.missing)
        try:
            with self._on_its_way("model", where, where.chunks - len(assembly.missing)) as transfer:
                assembly.on_piece = transfer.arrived
                if where.where == "url":
                    await self._known_store().fill(self._topology.model_place(run_id), assembly)
                else:
                    await self._collect(assembly)
        except ChunksMissing:
            if len(assembly.missing) == missed:
                assembly.read_to = 0  # no link that hangs: what a broker lost comes again, at old offsets
            raise
        except BadMessage:  # nothing that came is trusted: it is fetched from the beginning
            self._partial = None
            raise
        self._partial = None
        return assembly.buffer

    async def _collect(self, assembly: Assembly) -> None:
        offset = max(assembly.where.first_offset, assembly.read_to)
        stream = await _connected(self._reader).read(assembly.where.stream, offset=offset, prefetch=PREFETCH)
        try:
            await collect(stream, assembly, end=None, patience_s=self._settings.patience_s)
        finally:
            await stream.close()

    def _known_store(self) -> Store:
        if self._store is None:
            raise ConfigError(
                "this run's large bodies are in a claim-check store, and this site names none: set store.url to "
                "where the site reaches it"
            )
        return self._store

    async def _converse(self, listener: Listener) -> None:
        reader = await self._broker.connect(self.participant, purpose="consume")
        try:
            writer = await self._broker.connect(self.participant, purpose="publish")
            try:
                await self._declare_inbox(reader)
                inbox = await reader.consume(self._topology.inbox(self.participant), prefetch=1)
                self._reader, self._writer, self.trouble = reader, writer, ""
                await listener.on_connected()
                self._backoff.reset()
                self._welcome = True
                self._settings.on_notice("connected", participant=self.participant)
                await self._listen(inbox, listener)
            finally:
                self._reader = self._writer = None
                self.trouble = self.trouble or "the connection was lost"
                await writer.close()
        finally:
            await reader.close()

    async def _declare_inbox(self, reader: Transport) -> None:
        try:
            await reader.declare(*self._topology.inbox_declarations(self.participant))
        except (ConnectionLost, AccessRefused):
            raise
        except TransportError as error:
            raise TransportError(
                f"federation {self._topology.federation!r} is not set up yet ({error}): waiting for its aggregator"
            ) from error

    async def _listen(self, inbox: Inbox, listener: Listener) -> None:
        clock = asyncio.get_running_loop().time
        next_beat = clock() + self._settings.heartbeat_s
        while True:
            delivery = await inbox.get(max(0.0, next_beat - clock()))
            if delivery is not None:
                await listener.on_delivery(delivery)
            elif clock() >= next_beat:
                await listener.on_heartbeat()
                next_beat = clock() + self._settings.heartbeat_s


def _connected(transport: Transport | None) -> Transport:
    if transport is None:
        raise ConnectionLost("not connected now: this is tried again once it is")
    return transport


def _advanced(blob: Buffer, codec: str, body: Buffer) -> Buffer:
    return tensors.encode(advanced(codec, tensors.decode(blob), body))
