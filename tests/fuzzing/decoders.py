"""Targets that are pure: frames, messages, tensors, chunks, sums. On success they check what must then hold."""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine
from typing import Any

import numpy as np

from aggregator.sums import FixedPointSum
from broker import tensors, wire
from broker.errors import BadMessage
from broker.head import Best, ClosedRound, Decision, HeadRecord, Obeyed, OpenRound
from broker.messages import (
    MAX_COUNT,
    Answer,
    Barrier,
    Chunk,
    Control,
    Heartbeat,
    Join,
    Leave,
    Message,
    Rejected,
    TrainFailed,
    TrainRound,
    UpdateReady,
    Where,
)
from broker.payloads import MIN_CHUNK_BYTES, Assembly, collect, describe, piece
from broker.transport import Delivery
from tests.fuzzing import mutate
from tests.fuzzing.engine import Target

REASON_BYTES = 20_000
SHA = "ab" * 32
INLINE = Where(where="inline", size_bytes=3, sha256=SHA)
CHUNKED = Where(where="stream", size_bytes=9, sha256=SHA, stream="fl.default.model", first_offset=1, chunks=2)
UPDATE = UpdateReady(
    participant="p01", run_id="run-1", epoch=1, task=1, base_sha256=SHA, arrays="delta", num_examples=10,
    metrics={"loss": 0.5}, seconds=1.5, body=INLINE,
)  # fmt: skip
HEAD = HeadRecord(
    run_id="run-1", epoch=2, seq=3, by="1-aa", started=1.0, version=1, round=1, task=2, model=INLINE, state=INLINE,
    previous=CHUNKED, lineage=((1, 0, SHA), (2, 1, SHA)), updates_from=7, members=("p01", "p02"),
    open=OpenRound(
        work="train", round=2, attempt=1, task=2, epoch=2, cohort=("p01", "p02"), opened=1.0, deadline=9.0,
        allowed_s=8.0
    ),
    closed=ClosedRound(work="train", round=1, attempt=1, task=1, cohort=2, opened=0.0, closed=1.0, bytes_up=9),
    settled={"p01": (1, "counted")}, metrics={"loss": 0.1},
    decided=(Decision(epoch=1, offset=1, participant="p01", task=1, verdict="late", staleness=1, reason="late"),),
    best=Best(version=1, round=1, value=0.1, sha256=SHA), wanted="pause", removed=("p09",),
    obeyed=Obeyed(nonces=("n",), removed=("p09",)), finished="",
)  # fmt: skip
EXAMPLES: tuple[Message, ...] = (
    Join(participant="p01", run_id="run-1", epoch=1, phase="holding", task=1, software="0.1"),
    Heartbeat(participant="p01", run_id="run-1", epoch=1, phase="training", task=1),
    Leave(participant="p01", reason="stopped"),
    UPDATE,
    UPDATE.model_copy(update={"arrays": "none", "body": None}),
    UPDATE.model_copy(update={"body": CHUNKED}),
    TrainFailed(participant="p01", run_id="run-1", task=1, error="no"),
    TrainRound(
        run_id="run-1", epoch=1, seq=1, task=1, round=1, attempt=1, work="train", asked=("p01", "p02"), version=0,
        model=INLINE, learning_task="digits", data={"participants": 2}, settings={"lr": 0.1, "on": True},
        seed=7, deadline_s=9.0, late_counts=True, fates={"p01": (1, "late")},
    ),
    Chunk(of=SHA, index=1),
    Barrier(nonce="n"),
    Rejected(offset=1, participant="p01", reason="no"),
    HEAD,
    Control(command="remove", participant="p01", run_id="run-1", nonce="n"),
    Control(command="pause", nonce="n"),
    Answer(nonce="n", done=True, text="paused"),
)  # fmt: skip
FRAMES = tuple(wire.encode(message, b"abc") for message in EXAMPLES)


# -- frames ---------------------------------------------------------------------------------------------------


def check_frame(data: bytes) -> None:
    """Both limits; what participants may say, the aggregator may say too, and it means the same."""
    found = _decoded(data, wire.FROM_PARTICIPANT)
    if found is not None:
        assert _decoded(data, wire.FROM_AGGREGATOR) == found
    message, payload = wire.decode(data)
    assert len(payload) <= len(data) - 8
    assert wire.decode(wire.encode(message, payload)) == (message, payload)


def _decoded(data: bytes, limits: wire.Limits) -> tuple[Message, memoryview] | None:
    try:
        return wire.decode(data, limits)
    except BadMessage as bad:
        check_reason(bad)
        return None


def check_reason(bad: BadMessage) -> None:
    """A refusal can be written down, and is not the message itself again."""
    assert len(bad.reason.encode()) < REASON_BYTES


def frames() -> Target:
    anyhow = mutate.raw([*mutate.PACKED, *mutate.TOKENS])
    return Target(check_frame, FRAMES, mutate.either(anyhow, mutate.frame), (BadMessage,))


def message(kind: str) -> Target:
    """One kind of message: its header changed, its length right."""
    seeds = tuple(f for f, example in zip(FRAMES, EXAMPLES, strict=True) if example.kind == kind)
    return Target(check_frame, seeds, mutate.frame, (BadMessage,))


# -- tensors --------------------------------------------------------------------------------------------------

LIKE = {
    "w": np.arange(4, dtype=np.float32),
    "n": np.arange(2),
    "h": np.ones((2, 1), np.float16),
    "empty": np.zeros((0, 3)),
    "scalar": np.zeros((), np.int8),
}
BLOBS = (
    tensors.encode(LIKE),
    tensors.encode({"w": LIKE["w"]}),
    tensors.encode({}),
    tensors.encode({"flags": np.ones(3, np.bool_), "bytes": np.arange(3, dtype=np.uint8)}),
)


def check_tensors(data: bytes) -> None:
    try:
        arrays = tensors.decode(data)
        tensors.encode(arrays)
        again = tensors.decode(tensors.encode(arrays))
        specs = tensors.manifest_of(data)
        for spec in specs:
            assert arrays[spec.name].tobytes() == data[spec.begin : spec.end] == again[spec.name].tobytes()
        assert sum(array.nbytes for array in arrays.values()) <= len(data)
        tensors.check_like(again, arrays)
        tensors.check_like(arrays, LIKE)
    except BadMessage as bad:
        check_reason(bad)
        raise


def blobs() -> Target:
    ways = mutate.either(mutate.safetensors, mutate.safetensors, mutate.raw(mutate.TOKENS))
    return Target(check_tensors, BLOBS, ways, (BadMessage,))


# -- chunks ---------------------------------------------------------------------------------------------------

BODY = bytes(range(256)) * 12
MOST_BODY_BYTES = 64 << 10
END = Barrier(nonce="the end")


class Pile:
    """An inbox of what lies there already; the barrier is the last of it."""

    def __init__(self, frames: list[bytes]) -> None:
        self._left = [Delivery(f, "p01.chunk", "p01", _settled, n) for n, f in enumerate(frames)][::-1]

    async def get(self, timeout_s: float | None = None) -> Delivery | None:
        return self._left.pop() if self._left else None

    async def close(self) -> None:
        self._left.clear()


async def _settled(*, accept: bool, requeue: bool) -> None:
    pass


def check_chunks(data: bytes) -> None:
    """The first part announces a body, the others lie in the outbox; the aggregator's own bounds come first."""
    announced, *pieces = mutate.unpack(data) or [b""]
    update, _ = wire.decode(announced, wire.FROM_PARTICIPANT)
    where = update.body if isinstance(update, UpdateReady) else None
    if where is None or not where.chunks or not 0 < where.size_bytes <= MOST_BODY_BYTES:
        return
    if where.chunks > -(-where.size_bytes // MIN_CHUNK_BYTES):
        return
    buffer = bytearray(where.size_bytes)
    assembly = Assembly.into(buffer, where, "p01")
    now(collect(Pile([*pieces, wire.encode(END)]), assembly, end=END, patience_s=1.0))
    assert not assembly.missing
    assert assembly.read_to <= len(pieces)
    assert sum(len(buffer[piece(where, index)]) for index in range(where.chunks)) == len(buffer)
    if update == SENT and len(pieces) == where.chunks and hashlib.sha256(buffer).hexdigest() != where.sha256:
        raise BadMessage("what `verify` refuses")


def now(what: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        what.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def chunk(where: Where, index: int, data: bytes) -> bytes:
    return wire.encode(Chunk(of=where.sha256, index=index), data)


def chunked(blob: bytes, where: Where, announced: bytes) -> bytes:
    return mutate.pack([announced, *(chunk(where, i, blob[piece(where, i)]) for i in range(where.chunks))])


IN_CHUNKS = describe(BODY, 0, MIN_CHUNK_BYTES)
SENT = UPDATE.model_copy(update={"body": IN_CHUNKS})


def chunks() -> Target:
    seed = chunked(BODY, IN_CHUNKS, wire.encode(SENT))
    ways = mutate.each_part(mutate.frame, mutate.either(mutate.frame, mutate.raw(mutate.PACKED)))
    return Target(check_chunks, (seed,), ways, (BadMessage,))


# -- sums -----------------------------------------------------------------------------------------------------

MODEL: tensors.Arrays = {
    "f32": np.array([0.0, -1.5, 1e3], np.float32),
    "f16": np.array([6e4, -1.0], np.float16),
    "f64": np.array([1e-300, -7.0]),
    "i8": np.array([100, -128], np.int8),
    "i16": np.array([32_000], np.int16),
    "i64": np.array([1 << 20], np.int64),
}
VALUES_BYTES = sum(values.nbytes for values in MODEL.values())
MOST_WEIGHT, MOST_WEIGHTS = 1 << 20, 1 << 24


def check_sums(data: bytes) -> None:
    """A weight, then values for every tensor, as often as there are bytes: each is refused, or stays in bounds."""
    total = FixedPointSum(MOST_WEIGHT, MOST_WEIGHTS)
    total.start(MODEL)
    exact = {name: [0] * values.size for name, values in MODEL.items()}
    refused = None
    for start in range(0, min(len(data), 4 * (8 + VALUES_BYTES)), 8 + VALUES_BYTES):
        weight, arrays = _update_of(data[start : start + 8 + VALUES_BYTES])
        try:
            total.add(arrays, weight)
        except BadMessage as bad:
            refused = bad
            continue
        for name, values in arrays.items():
            factor = float(weight) * 2.0 ** total._scales[name].bits
            exact[name] = [e + int(np.rint(float(v) * factor)) for e, v in zip(exact[name], values, strict=True)]
    for name, expected in exact.items():
        assert total._sums[name].tolist() == expected, name
        assert max(map(abs, expected)) <= 1 << 62
    if total.weight:
        _check_step(total)
    if refused:
        raise refused


def _update_of(data: bytes) -> tuple[int, tensors.Arrays]:
    data = data.ljust(8 + VALUES_BYTES, b"\0")
    arrays, at = {}, 8
    for name, values in MODEL.items():
        arrays[name] = np.frombuffer(data, values.dtype, values.size, at)
        at += values.nbytes
    return int.from_bytes(data[:8], "little", signed=True), arrays


def _check_step(total: FixedPointSum) -> None:
    """Nothing turns over or becomes infinite: not even the narrowest types."""
    for name, values in total.step(MODEL, 1.0).items():
        assert values.dtype == MODEL[name].dtype
        mean = total._sums[name] / (float(total.weight) * 2.0 ** total._scales[name].bits)
        kind = np.finfo(values.dtype) if values.dtype.kind == "f" else np.iinfo(values.dtype)
        expected = np.clip(MODEL[name].astype(np.float64) + mean, float(kind.min), float(kind.max))
        assert np.isfinite(values).all(), name
        assert np.allclose(values.astype(np.float64), expected, rtol=1e-3, atol=0.51), name


def sums() -> Target:
    one = (7).to_bytes(8, "little") + b"".join(np.full_like(v, 3).tobytes() for v in MODEL.values())
    large = (MOST_WEIGHT).to_bytes(8, "little") + b"".join(np.full_like(v, 100).tobytes() for v in MODEL.values())
    values = [np.float16(v).tobytes() for v in ("inf", "nan", "-inf", 65504)]
    values += [np.float32(v).tobytes() for v in ("inf", "nan", 1024, 16384, -1e38)]
    values += [np.float64(v).tobytes() for v in ("inf", "nan", 1024, 1e308)]
    values += [b"\x80", b"\x7f", b"\xff" * 8, b"\0" * 7 + b"\x80", (MAX_COUNT).to_bytes(8, "little")]
    return Target(check_sums, (one, one + large, large * 4), mutate.raw(values), (BadMessage,))
