"""Payloads of any size: pieces that cover exactly, whatever order they come in, and nothing that was not sent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import BadMessage, ChunksMissing, ConnectionLost
from broker.faults import Fault, FaultyBroker, Operation, When
from broker.memory import MemoryBroker
from broker.messages import Barrier, Chunk, Where
from broker.payloads import WINDOW, Address, Assembly, collect, describe, piece, upload, verify
from broker.transport import Delivery, Inbox, Stream, Transport
from broker.wire import encode

BLOB = bytes(range(200)) * 5
WHERE = describe(BLOB, inline_bytes=0, chunk_bytes=130)
END = Barrier(nonce="end")
OUTBOX = Address("", "outbox")


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def sender(broker: MemoryBroker) -> AsyncIterator[Transport]:
    connection = await broker.connect("p01", purpose="publish")
    await connection.declare(Stream("outbox", max_bytes=1 << 20, segment_bytes=1 << 20))
    yield connection
    await connection.close()


def chunks(blob: bytes = BLOB, where: Where = WHERE) -> list[bytes]:
    """The frames of every piece, in order."""
    pieces = [blob[piece(where, index)] for index in range(where.chunks)]
    return [encode(Chunk(of=where.sha256, index=i), p) for i, p in enumerate(pieces)]


async def send(sender: Transport, frames: Sequence[bytes]) -> None:
    for frame in frames:
        await sender.publish("", "outbox", frame)


async def received(reader: Transport, where: Where = WHERE, patience_s: float = 5.0) -> tuple[bytes, int]:
    """What the stream holds of the payload, up to the barrier; and the offset after what was read."""
    buffer = bytearray(where.size_bytes)
    inbox = await reader.read("outbox", offset="first")
    try:
        assembly = Assembly.into(buffer, where, "p01")
        await collect(inbox, assembly, end=END, patience_s=patience_s)
    finally:
        await inbox.close()
    return bytes(buffer), assembly.read_to


@given(size=st.integers(0, 5000), inline=st.integers(0, 5000), chunk=st.integers(1, 5000))
def test_what_is_not_inline_is_cut_into_pieces_that_cover_it_exactly(size: int, inline: int, chunk: int) -> None:
    blob = b"\x07" * size
    where = describe(blob, inline, chunk)
    assert (where.size_bytes, where.sha256) == (size, hashlib.sha256(blob).hexdigest())
    assert where.where == ("inline" if size <= inline else "stream")
    if where.where == "stream":
        lengths = [len(blob[piece(where, index)]) for index in range(where.chunks)]
        assert where.chunks == -(-size // chunk)
        assert max(lengths) <= chunk


@given(size=st.integers(1, 1 << 40), count=st.integers(1, 300))
def test_pieces_follow_one_another_whatever_a_header_claims(size: int, count: int) -> None:
    where = Where(where="stream", size_bytes=size, sha256="a" * 64, chunks=count)
    pieces = [piece(where, index) for index in range(count)]
    assert (pieces[0].start, pieces[-1].stop) == (0, size)
    assert all(one.stop == next_one.start for one, next_one in pairwise(pieces))


async def test_an_uploaded_payload_arrives(sender: Transport) -> None:
    confirmed: list[int] = []

    async def after(count: int) -> None:
        confirmed.append(count)

    await upload(sender, OUTBOX, WHERE, BLOB, after=after)
    await send(sender, [encode(END)])
    assert await received(sender) == (BLOB, WHERE.chunks)
    assert confirmed == [4, 8]


@given(order=st.permutations(range(WHERE.chunks)), again=st.lists(st.integers(0, WHERE.chunks - 1), max_size=5))
def test_pieces_in_any_order_and_again_make_the_payload(order: list[int], again: list[int]) -> None:
    buffer = bytearray(len(BLOB))
    assembly = Assembly.into(buffer, WHERE, "p01")
    for place, index in enumerate([*again, *order]):
        data = memoryview(BLOB)[piece(WHERE, index)]
        assembly.add(Chunk(of=WHERE.sha256, index=index), data)
        assert bool(assembly.missing) == (len({*[*again, *order][: place + 1]}) < WHERE.chunks)
    assert buffer == BLOB


async def test_pieces_come_through_the_stream_in_any_order(sender: Transport) -> None:
    frames = chunks()
    await send(sender, [*frames[3:], frames[5], *frames[:3], frames[0], encode(END)])
    blob, offset = await received(sender)
    assert (blob, offset) == (BLOB, len(frames) + 1)  # it stops at the last missing piece


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b""],
    ids=["shorter", "longer", "empty"],
)
async def test_a_piece_of_another_length_is_refused(sender: Transport, damage: object) -> None:
    data = BLOB[piece(WHERE, 2)]
    chunk = encode(Chunk(of=WHERE.sha256, index=2), damage(data))  # type: ignore[operator]
    await send(sender, [chunk, *chunks(), encode(END)])
    with pytest.raises(BadMessage, match=r"chunk 2 of .* is damaged"):
        await received(sender)


async def test_a_piece_that_was_changed_is_found_by_the_digest_of_the_whole(sender: Transport) -> None:
    data = BLOB[piece(WHERE, 2)]
    changed = encode(Chunk(of=WHERE.sha256, index=2), b"\xff" + data[1:])
    await send(sender, [changed, *chunks(), encode(END)])
    blob, _ = await received(sender)
    with pytest.raises(BadMessage, match="does not match its sha256"):
        await verify(blob, WHERE)


async def test_pieces_that_miss_at_the_barrier_are_counted(sender: Transport) -> None:
    await send(sender, [*chunks()[2:], encode(END)])
    with pytest.raises(BadMessage, match=r"2 of 8 chunks of .* are missing"):
        await received(sender)


async def test_pieces_that_do_not_come_end_the_wait(sender: Transport) -> None:
    await send(sender, chunks()[1:])
    with pytest.raises(BadMessage, match=r"1 of 8 chunks of .* are missing"):
        await received(sender, patience_s=0.05)


async def test_another_barrier_does_not_end_the_search(sender: Transport) -> None:
    await send(sender, [encode(Barrier(nonce="a former leader's")), *chunks(), encode(END)])
    assert (await received(sender))[0] == BLOB


async def test_pieces_from_somebody_else_are_not_looked_at(broker: MemoryBroker, sender: Transport) -> None:
    forged = bytes(len(BLOB))
    intruder = await broker.connect("p-bad", purpose="publish")
    data = [forged[piece(WHERE, index)] for index in range(WHERE.chunks)]
    await send(intruder, [encode(Chunk(of=WHERE.sha256, index=i), d) for i, d in enumerate(data)])
    await send(sender, [*chunks(), encode(END)])
    assert (await received(sender))[0] == BLOB


async def test_what_is_no_piece_of_this_payload_is_not_looked_at(sender: Transport) -> None:
    """Garbage, another version's frames, another payload's pieces, pieces beyond the end."""
    other = b"x" * len(BLOB)
    last = encode(Chunk(of=WHERE.sha256, index=WHERE.chunks))
    noise = [b"garbage", b"FLF\x02" + chunks()[0][4:], *chunks(other, describe(other, 0, 130)), last]
    await send(sender, [*noise, *chunks(), encode(END)])
    assert (await received(sender))[0] == BLOB


async def test_what_was_put_together_must_have_the_digest() -> None:
    await verify(BLOB, WHERE)
    with pytest.raises(BadMessage, match="payload has 999 bytes, its header says 1000"):
        await verify(BLOB[:-1], WHERE)
    with pytest.raises(BadMessage, match="does not match its sha256"):
        await verify(BLOB[::-1], WHERE)


# -- broken transfers -----------------------------------------------------------------------------------------


@dataclass
class Cuts:
    """Cuts the connection before the n-th publish or after the n-th that arrived, and counts both."""

    at: dict[int, When]
    slow: int = -1  # this publish takes its time
    sent: int = 0
    arrived: int = 0

    def __call__(self, operation: Operation) -> Fault | None:
        if operation.name != "publish":
            return None
        place = self.sent if operation.when == "before" else self.arrived
        self.sent += operation.when == "before"
        self.arrived += operation.when == "after"
        if operation.when == "before" and place == self.slow:
            return Fault("delay", 0.2)
        return Fault("disconnect") if self.at.get(place) == operation.when else None


async def uploaded_in_pieces(broker: MemoryBroker, where: Where, blob: bytes, cuts: Cuts) -> list[int]:
    """Connects and goes on until all is there; returns what was confirmed, each time that was told."""
    told = [0]

    async def after(count: int) -> None:
        told.append(count)

    faulty = FaultyBroker(broker, cuts)
    while told[-1] < where.chunks:
        connection = await faulty.connect("p01", purpose="publish")
        with suppress(ConnectionLost):
            await upload(connection, OUTBOX, where, blob, first=told[-1], after=after)
        await connection.close()
    return told


@settings(deadline=None)  # many connections
@given(
    chunk_bytes=st.integers(8, 300),
    at=st.dictionaries(st.integers(0, 150), st.sampled_from(["before", "after"]), max_size=20),
)
def test_a_broken_upload_goes_on_after_its_last_confirmed_chunk(chunk_bytes: int, at: dict[int, When]) -> None:
    async def check() -> None:
        broker, where, cuts = MemoryBroker(), describe(BLOB, 0, chunk_bytes), Cuts(at)
        aggregator = await broker.connect("aggregator", purpose="lead")
        await aggregator.declare(Stream("outbox", max_bytes=1 << 20, segment_bytes=1 << 20))
        told = await uploaded_in_pieces(broker, where, BLOB, cuts)
        await aggregator.publish("", "outbox", encode(END))
        assert (await received(aggregator, where))[0] == BLOB
        assert told == sorted(set(told)), "it never goes back"
        struck = sum(place < cuts.sent for place in at)
        assert cuts.sent <= where.chunks + struck * WINDOW

    asyncio.run(check())


async def test_what_arrived_of_a_broken_window_does_not_travel_again(
    sender: Transport, broker: MemoryBroker
) -> None:
    """Chunk 6 is slower than the others of its window, and the connection is cut before its confirm."""
    cuts = Cuts({7: "after"}, slow=6)
    assert await uploaded_in_pieces(broker, WHERE, BLOB, cuts) == [0, 4, 6, 8]
    assert cuts.sent == 8 + 2


async def test_an_upload_that_nobody_wants_any_more_ends(sender: Transport) -> None:
    async def after(count: int) -> None:
        raise WorkIsOver

    with pytest.raises(WorkIsOver):
        await upload(sender, OUTBOX, WHERE, BLOB, after=after)
    await send(sender, [encode(END)])
    with pytest.raises(ChunksMissing, match="4 of 8 chunks of"):
        await received(sender)


class WorkIsOver(Exception):
    """The test says so."""


async def test_chunks_of_a_broken_upload_may_lie_between_those_of_others(sender: Transport) -> None:
    """What remained of an upload that was given up, and a window that came twice."""
    other = b"x" * len(BLOB)
    given_up, frames = chunks(other, describe(other, 0, 130)), chunks()
    await send(sender, [*given_up[:3], *frames[:4], given_up[2], *frames[2:6], *frames[4:], encode(END)])
    assert (await received(sender))[0] == BLOB


@settings(deadline=None)
@given(breaks=st.lists(st.integers(0, WHERE.chunks), max_size=6))
def test_a_broken_download_goes_on_where_it_was(breaks: list[int]) -> None:
    """Nothing is read twice, wherever the reading ends."""

    async def check() -> None:
        broker = MemoryBroker()
        connection = await broker.connect("p01", purpose="publish")
        await connection.declare(Stream("outbox", max_bytes=1 << 20, segment_bytes=1 << 20))
        await send(connection, chunks())
        buffer, read = bytearray(len(BLOB)), 0
        assembly = Assembly.into(buffer, WHERE, "p01")
        for most in [*breaks, WHERE.chunks]:
            inbox = Limited(await connection.read("outbox", offset=assembly.read_to), most)
            with suppress(ConnectionLost):
                await collect(inbox, assembly, end=END, patience_s=5)
            read += inbox.taken
            await inbox.inner.close()
        assert buffer == BLOB
        assert read == WHERE.chunks

    asyncio.run(check())


@dataclass
class Limited:
    """An inbox whose connection is lost after so many deliveries."""

    inner: Inbox
    most: int
    taken: int = 0

    async def get(self, timeout_s: float | None = None) -> Delivery | None:
        if self.taken == self.most:
            raise ConnectionLost("cut")
        self.taken += 1
        return await self.inner.get(timeout_s)

    async def close(self) -> None:
        await self.inner.close()
