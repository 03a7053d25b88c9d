"""Payloads of any size. Small ones travel inline; larger ones in numbered pieces: as chunks in a stream, or as
parts in a claim-check store (`broker/store.py`).

A payload of `size_bytes` in `chunks` pieces is cut evenly, so every piece's place follows from its index:
duplicates and reordering do no harm, and a broken transfer goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from broker.errors import BadMessage, ChunksMissing
from broker.messages import Barrier, Chunk, Message, Where
from broker.offload import off_loop
from broker.retry import publish
from broker.tensors import Buffer, give_back
from broker.transport import Delivery, Inbox, Transport
from broker.wire import FROM_PARTICIPANT, decode, encode

MIN_CHUNK_BYTES = 1024  # nobody may cut finer
MIN_PART_BYTES = 64 << 10
# Pieces in flight: a cut repeats as many. 200 MB cut five times cost 1.1 times the bytes with 4, 1.4 with 16.
WINDOW = 4
PREFETCH = 16  # chunks that may wait to be looked at
HASHED_BYTES = 8 << 20  # between two times that a mapped file is given back
CONFIRM_S = 30.0  # for a chunk: on a slow link it waits for those before it


@dataclass(frozen=True, slots=True)
class Address:
    """Where to publish: an exchange and a routing key, or "" and a stream's name."""

    exchange: str
    key: str


Way = Literal["stream", "url"]


def describe(blob: Buffer, inline_bytes: int, chunk_bytes: int, way: Way = "stream", name: str = "") -> Where:
    """How `blob` travels: inline if it is small, else in pieces (the sender fills in the stream).

    One that is handed over in memory needs no digest: that of its `name` stands for it.
    """
    sha256 = sha256_of(name.encode() if name and len(blob) > inline_bytes else blob)
    if len(blob) <= inline_bytes:
        return Where(where="inline", size_bytes=len(blob), sha256=sha256)
    return Where(where=way, size_bytes=len(blob), sha256=sha256, chunks=-(-len(blob) // chunk_bytes))


def piece(where: Where, index: int) -> slice:
    """The bytes of the payload that piece `index` holds."""
    step = -(-where.size_bytes // where.chunks)
    return slice(min(index * step, where.size_bytes), min((index + 1) * step, where.size_bytes))


def bytes_of(where: Where, pieces: int) -> int:
    """How many bytes so many pieces hold, if the last is not among them or all are."""
    return min(pieces * -(-where.size_bytes // max(where.chunks, 1)), where.size_bytes)


def is_possible(where: Where, min_piece_bytes: int) -> bool:
    """Whether a payload can be cut like that: no finer, and no piece is empty."""
    return 1 <= where.chunks <= -(-where.size_bytes // min_piece_bytes) and (
        piece(where, where.chunks - 1).start < where.size_bytes
    )


Arrived = Callable[[int], Awaitable[None]]
Send = Callable[[int, memoryview], Awaitable[None]]


async def nothing(count: int) -> None:
    """Nobody wants to know."""


async def send_pieces(where: Where, blob: Buffer, send: Send, *, first: int = 0, after: Arrived = nothing) -> None:
    """Sends all pieces of a payload from piece `first` on, some at a time.

    `after(n)` is told that the first n pieces have arrived, also before a failure ends the upload; what it raises
    ends the upload, too.
    """
    view = memoryview(blob)
    for start in range(first, where.chunks, WINDOW):
        window = range(start, min(start + WINDOW, where.chunks))
        outcomes = await asyncio.gather(
            *(send(index, view[piece(where, index)]) for index in window), return_exceptions=True
        )
        give_back(view[piece(where, window[0]).start : piece(where, window[-1]).stop])
        failures = [(place, error) for place, error in enumerate(outcomes) if error is not None]
        arrived = failures[0][0] if failures else len(window)
        if arrived:
            await after(start + arrived)
        if failures:
            raise failures[0][1]


async def upload(
    transport: Transport, to: Address, where: Where, blob: Buffer, *, first: int = 0, after: Arrived = nothing
) -> None:
    """Publishes all chunks of a payload from chunk `first` on; `after(n)` is told that n are confirmed."""

    async def send(index: int, data: memoryview) -> None:
        await publish(transport, to.exchange, to.key, _chunk(where, index, data), timeout_s=CONFIRM_S)

    await send_pieces(where, blob, send, first=first, after=after)


def _chunk(where: Where, index: int, data: memoryview) -> bytes:
    return encode(Chunk(of=where.sha256, index=index), data)


@dataclass(slots=True)
class Assembly:
    """Puts the chunks of one payload into its buffer, each once, if `sender` published them.

    `read_to` is the offset after the last chunk that was looked at: whoever was interrupted goes on there.
    `on_piece` is told after each new one how many are there.
    """

    where: Where
    sender: str
    buffer: memoryview
    missing: set[int]
    read_to: int = 0
    on_piece: Callable[[int], object] = lambda _: None

    @classmethod
    def into(cls, buffer: Buffer, where: Where, sender: str) -> Assembly:
        if len(buffer) != where.size_bytes:
            raise ValueError(f"buffer of {len(buffer)} bytes for a payload of {where.size_bytes}")
        return cls(where, sender, memoryview(buffer), set(range(where.chunks)))

    def add(self, chunk: Chunk, data: memoryview) -> None:
        """Takes a chunk of this payload. Raises BadMessage if it has the wrong length; the digest of the whole
        finds all other damage."""
        if chunk.of != self.where.sha256 or chunk.index not in self.missing:
            return
        place = piece(self.where, chunk.index)
        if len(data) != place.stop - place.start:
            raise BadMessage(f"chunk {chunk.index} of {chunk.of[:12]} is damaged: it has {len(data)} bytes")
        self.buffer[place] = data
        give_back(self.buffer[place])
        self.has(chunk.index)

    def has(self, index: int) -> None:
        """That piece is in the buffer."""
        self.missing.discard(index)
        self.on_piece(self.where.chunks - len(self.missing))


async def collect(inbox: Inbox, assembly: Assembly, *, end: Barrier | None, patience_s: float) -> None:
    """Reads a stream until the payload is whole.

    Raises ChunksMissing once `end` was read, or nothing came for `patience_s`, and pieces still miss.
    """
    while assembly.missing:
        delivery = await inbox.get(patience_s)
        message, data = _read(delivery) if delivery else (None, memoryview(b""))
        if delivery is None or (message is not None and message == end):
            many = f"{len(assembly.missing)} of {assembly.where.chunks}"
            raise ChunksMissing(f"{many} chunks of {assembly.where.sha256[:12]} are missing")
        if delivery.sender == assembly.sender and isinstance(message, Chunk):
            assembly.add(message, data)
            assembly.read_to = delivery.offset + 1


def _read(delivery: Delivery) -> tuple[Message | None, memoryview]:
    """What cannot be read is no piece of anything: another program's, or another version's."""
    try:
        return decode(delivery.body, FROM_PARTICIPANT)
    except BadMessage:
        return None, memoryview(b"")


async def tried_together(work: Iterable[Awaitable[None]]) -> None:
    """Waits for all of it, and then raises the first failure, if there is one."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for error in filter(None, outcomes):
        raise error


async def verify(blob: Buffer, where: Where) -> None:
    """Raises BadMessage unless size and sha256 are what `where` says."""
    if len(blob) != where.size_bytes:
        raise BadMessage(f"payload has {len(blob)} bytes, its header says {where.size_bytes}")
    if await off_loop(len(blob), sha256_of, blob) != where.sha256:
        raise BadMessage("payload does not match its sha256: it was damaged or replaced on the way")


def sha256_of(blob: Buffer) -> str:
    """The sha256 of a body, as hexadecimal digits."""
    digest, view = hashlib.sha256(), memoryview(blob)
    for start in range(0, len(view), HASHED_BYTES):
        digest.update(view[start : start + HASHED_BYTES])
        give_back(view[start : start + HASHED_BYTES])
    return digest.hexdigest()
