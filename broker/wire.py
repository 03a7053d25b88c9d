"""Frames: how a message becomes bytes and comes back, strictly and within bounds.

A frame is `FLF` and the schema version (4 bytes), the header's length (uint32, little endian), the header
(a msgpack map of the message's fields plus `kind`), and a raw payload that the header describes. Tensors
are never inside msgpack. What `decode` returns is well-formed; whether it is believed is for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
from pydantic import ValidationError

from broker.errors import BadMessage
from broker.head import HeadRecord
from broker.messages import (
    DIGEST_BYTES,
    MAX_ITEMS,
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
)
from broker.tensors import Buffer

SCHEMA = 1
MAGIC = b"FLF"
MAX_FRAME_BYTES = 15 << 20  # RabbitMQ 4 refuses messages above 16 MiB
MAX_HEADER_BYTES = 8 << 20
MOST_FAULTS = 200
REMEMBERED, REMEMBERED_BYTES = 8, 256 << 10  # headers, and how long one of them may be

KINDS: dict[str, type[Message]] = {
    m.kind: m
    for m in (
        Join, Heartbeat, Leave, UpdateReady, TrainFailed, TrainRound, Chunk, Barrier, Rejected, HeadRecord, Control,
        Answer,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a header may be, and how many items anything in it may have."""

    header_bytes: int = MAX_HEADER_BYTES
    items: int = MAX_ITEMS


FROM_AGGREGATOR = Limits()  # a line for everybody
FROM_PARTICIPANT = Limits(header_bytes=64 << 10, items=64)  # nobody makes us unpack much


def encode(message: Message, payload: Buffer = b"") -> bytes:
    """One frame. Raises BadMessage if it would exceed what the broker takes."""
    fields = message.model_dump(exclude_defaults=True)
    header: bytes = msgpack.packb({"kind": message.kind, **fields})
    frame = b"".join((MAGIC, bytes((SCHEMA,)), len(header).to_bytes(4, "little"), header, payload))
    if len(frame) > MAX_FRAME_BYTES or len(header) > MAX_HEADER_BYTES:
        raise BadMessage(
            f"{message.kind} message of {len(frame)} bytes (header {len(header)}) is above the limit of "
            f"{MAX_FRAME_BYTES} ({MAX_HEADER_BYTES}): send its payload in chunks"
        )
    return frame


def decode(frame: bytes, limits: Limits = FROM_AGGREGATOR) -> tuple[Message, memoryview]:
    """The message and a view of its payload. Raises BadMessage, before anything beyond `limits` is unpacked."""
    header, payload = _split(frame, limits)
    return _message(header, limits), payload


def decode_again(frame: bytes) -> tuple[Message, memoryview]:
    """As `decode`, for what the aggregator tells many participants who share a process: it is read once."""
    header, payload = _split(frame, FROM_AGGREGATOR)
    if len(header) > REMEMBERED_BYTES:
        return _message(header, FROM_AGGREGATOR), payload
    return _remembered(bytes(header)), payload


def _message(header: Buffer, limits: Limits) -> Message:
    try:
        _walk(header)
        fields = msgpack.unpackb(
            header,
            use_list=False,
            max_str_len=len(header),
            max_bin_len=DIGEST_BYTES,
            max_array_len=min(limits.items, len(header)),
            max_map_len=limits.items,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"header is not valid msgpack: {type(error).__name__} {error}") from None
    return _build(fields)


@lru_cache(REMEMBERED)
def _remembered(header: bytes) -> Message:
    return _message(header, FROM_AGGREGATOR)


def _walk(header: Buffer) -> None:
    """Raises unless all that lengths promise is there: unpacking makes room for it, nested promises included."""
    walker = msgpack.Unpacker(max_buffer_size=max(1, len(header)))
    walker.feed(header)
    walker.skip()


def _split(frame: bytes, limits: Limits) -> tuple[memoryview, memoryview]:
    view = memoryview(frame)
    if len(view) > MAX_FRAME_BYTES:
        raise BadMessage(f"frame of {len(view)} bytes is larger than the limit of {MAX_FRAME_BYTES}")
    if len(view) < 8 or view[:3] != MAGIC:
        raise BadMessage("not a Fluffle message: it does not begin with 'FLF'")
    if view[3] != SCHEMA:
        raise BadMessage(f"schema version {view[3]} is not supported: this side speaks version {SCHEMA}")
    length = int.from_bytes(view[4:8], "little")
    if length > min(limits.header_bytes, len(view) - 8):
        raise BadMessage(f"header length {length} exceeds the frame or the limit of {limits.header_bytes}")
    return view[8 : 8 + length], view[8 + length :]


def _build(fields: Any) -> Message:
    if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str):
        raise BadMessage("header is not a map with a 'kind'")
    kind = fields.pop("kind")
    if kind not in KINDS:
        raise BadMessage(f"unknown kind of message {kind[:40]!r}")
    try:
        return KINDS[kind](**fields)
    except (ValidationError, TypeError) as error:
        raise BadMessage(f"{kind} message: {_first_fault(error)}") from None


def _first_fault(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return "field names must be strings"
    if (count := error.error_count()) > MOST_FAULTS:  # to list them takes many times the memory of the message
        return f"{count} faults in its fields"
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"field {'.'.join(str(part)[:40] for part in fault['loc'])!r}: {fault['msg']}"
