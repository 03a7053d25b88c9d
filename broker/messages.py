"""Everything that travels, and the one record that is the truth.

A frame is `FLF` and the schema version (4 bytes), the header's length (uint32, little endian), the header
(a msgpack map of a message's fields plus `kind`), and a raw payload that the header describes. Tensors
are never inside msgpack. `decode` is strict and bounded: what it returns is well-formed, not yet believed.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from broker.errors import BadMessage
from broker.topology import FEDERATION, PARTICIPANT

SCHEMA = 1
MAGIC = b"FLF"
MAX_FRAME_BYTES = 15 << 20  # RabbitMQ 4 refuses messages above 16 MiB
MAX_HEADER_BYTES = 8 << 20
MAX_MODEL_BYTES = 1 << 40
MAX_COUNT = 1 << 53  # integers that survive every language
MAX_ITEMS = 1 << 20

Participant = Annotated[str, StringConstraints(pattern=f"^{PARTICIPANT}$")]
Federation = Annotated[str, StringConstraints(pattern=f"^{FEDERATION}$")]
RunId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,60}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Text = Annotated[str, StringConstraints(max_length=2000)]
Word = Annotated[str, StringConstraints(max_length=200)]
Metrics = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], float], Field(max_length=64)]
Scalar = bool | int | float | Annotated[str, StringConstraints(max_length=1000)]
Settings = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], Scalar], Field(max_length=256)]

Work = Literal["train", "evaluate", "none"]
Arrays = Literal["delta", "gradient", "none"]
Verdict = Literal["counted", "late", "refused", "duplicate"]
Fate = Literal["counted", "late", "refused", "missing"]
Phase = Literal["idle", "training", "holding"]


class Part(BaseModel):
    """A frozen record that refuses unknown fields, wrong types, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Where(Part):
    """Where a payload is: behind this header (`inline`), or in a stream as numbered chunks."""

    where: Literal["inline", "stream"]
    size_bytes: Annotated[int, Field(ge=0, le=MAX_MODEL_BYTES)]
    sha256: Sha256
    stream: Word = ""
    first_offset: Count = 0
    chunks: Annotated[int, Field(ge=0, le=MAX_ITEMS)] = 0


class Message(Part):
    """Anything with a `kind` that travels in a frame."""

    kind: ClassVar[str]


class FromParticipant(Message):
    participant: Participant


class Status(FromParticipant):
    """What a worker is doing: it trains `task`, or holds its finished update until it knows its fate."""

    run_id: RunId | Literal[""] = ""
    epoch: Count = 0
    phase: Phase = "idle"
    task: Count = 0


class Join(Status):
    """A worker is there, for the first time or again."""

    kind: ClassVar[str] = "join"
    learning_task: Word = ""
    num_examples: Count = 0
    software: Word = ""


class Heartbeat(Status):
    kind: ClassVar[str] = "heartbeat"


class Leave(FromParticipant):
    """A worker stopped in good order; nobody needs to wait for it."""

    kind: ClassVar[str] = "leave"
    reason: Text = ""


class UpdateReady(FromParticipant):
    """The answer to a task: arrays (inline or in the outbox), or only metrics for `evaluate`."""

    kind: ClassVar[str] = "update"
    run_id: RunId
    epoch: Count  # of the TrainRound that it answers
    task: Count
    base_sha256: Sha256  # of the model that it started from
    arrays: Arrays
    num_examples: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    metrics: Metrics = {}
    seconds: Annotated[float, Field(ge=0)] = 0.0
    body: Where | None = None


class TrainFailed(FromParticipant):
    kind: ClassVar[str] = "failed"
    run_id: RunId
    task: Count
    error: Text


class TrainRound(Message):
    """The whole of what a participant should know now; an inbox holds only the newest.

    `asked` names who shall do `work`; `fates` tells participants what became of their last update.
    """

    kind: ClassVar[str] = "round"
    run_id: RunId
    epoch: Count
    seq: Count
    task: Count
    round: Count
    attempt: Count
    work: Work
    asked: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)]
    version: Count
    model: Where | None
    settings: Settings = {}
    deadline_s: Annotated[float, Field(ge=0)] = 0.0  # seconds left when this was sent
    late_counts: bool = False
    fates: Annotated[dict[Participant, tuple[Count, Fate]], Field(max_length=MAX_ITEMS)] = {}
    finished: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        return (self.epoch, self.seq)


class Chunk(Message):
    """Piece `index` of a payload; `of` says which: `update:<run>:<task>` or `model:<epoch>:<version>`."""

    kind: ClassVar[str] = "chunk"
    of: Word
    index: Annotated[int, Field(ge=0, lt=MAX_ITEMS)]
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]


class Barrier(Message):
    """Published by whoever reads, to know when it has read everything that was there before."""

    kind: ClassVar[str] = "barrier"
    nonce: Word


class Rejected(Message):
    """A refused message (payload: its first bytes) and why."""

    kind: ClassVar[str] = "rejected"
    offset: Count
    participant: Word
    reason: Text


class OpenRound(Part):
    """The piece of work that is open. `deadline` and `opened` are Unix seconds of the aggregator's clock."""

    work: Literal["train", "evaluate"]
    round: Count
    attempt: Annotated[int, Field(ge=1)]
    task: Count
    epoch: Count  # in which the task was first offered
    cohort: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)]
    opened: float
    deadline: float


class Decision(Part):
    """What became of one message in `updates`: one line of the ledger."""

    offset: Count
    participant: Word
    task: Count
    verdict: Verdict
    weight: Count = 0  # integer weight in the sum; 0 was not summed
    staleness: Count = 0
    reason: Text = ""


class Best(Part):
    """The best version so far by the metric that the run is judged by."""

    version: Count
    round: Count
    value: float
    sha256: Sha256


class HeadRecord(Message):
    """The whole truth of a run: it is replaced as one message, so nothing in it can disagree.

    `settled` holds each participant's last decided task; `decided` what was decided since the record before.
    The payload is the model, then the strategy's state, as far as they are inline.
    """

    kind: ClassVar[str] = "head"
    run_id: RunId | Literal[""] = ""
    epoch: Count = 0
    seq: Count = 0
    by: Word = ""
    started: float = 0.0
    version: Count = 0
    round: Count = 0  # last closed
    task: Count = 0  # last offered
    model: Where | None = None
    state: Where | None = None
    previous: Where | None = None
    lineage: Annotated[tuple[tuple[Count, Count, Sha256], ...], Field(max_length=1000)] = ()
    open: OpenRound | None = None
    updates_from: Count = 0
    members: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)] = ()
    settled: Annotated[dict[Participant, tuple[Count, Verdict]], Field(max_length=MAX_ITEMS)] = {}
    decided: Annotated[tuple[Decision, ...], Field(max_length=MAX_ITEMS)] = ()
    metrics: Metrics = {}
    best: Best | None = None
    finished: Word = ""  # why the run ended; empty while it runs

    @property
    def rank(self) -> tuple[int, int]:
        return (self.epoch, self.seq)

    def with_(self, **changes: Any) -> Self:
        """A copy with these fields replaced and checked again."""
        return type(self)(**{**dict(self), **changes})


KINDS: dict[str, type[Message]] = {
    m.kind: m
    for m in (
        Join, Heartbeat, Leave, UpdateReady, TrainFailed, TrainRound, Chunk, Barrier, Rejected, HeadRecord,
    )
}  # fmt: skip


def encode(message: Message, payload: bytes | memoryview = b"") -> bytes:
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


def decode(frame: bytes) -> tuple[Message, memoryview]:
    """The message and a view of its payload. Raises BadMessage; allocates no more than the frame's size."""
    header, payload = _split(frame)
    try:
        fields = msgpack.unpackb(
            header,
            use_list=False,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"header is not valid msgpack: {type(error).__name__} {error}") from None
    return _build(fields), payload


def _split(frame: bytes) -> tuple[memoryview, memoryview]:
    view = memoryview(frame)
    if len(view) > MAX_FRAME_BYTES:
        raise BadMessage(f"frame of {len(view)} bytes is larger than the limit of {MAX_FRAME_BYTES}")
    if len(view) < 8 or view[:3] != MAGIC:
        raise BadMessage("not a Fluffle message: it does not begin with 'FLF'")
    if view[3] != SCHEMA:
        raise BadMessage(f"schema version {view[3]} is not supported: this side speaks version {SCHEMA}")
    length = int.from_bytes(view[4:8], "little")
    if length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise BadMessage(f"header length {length} exceeds the frame or the limit of {MAX_HEADER_BYTES}")
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
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"field {'.'.join(str(part)[:40] for part in fault['loc'])!r}: {fault['msg']}"
