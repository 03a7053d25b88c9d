"""Everything that travels between participants and the aggregator, as frozen records that check themselves.

Unknown fields, wrong types, NaN and infinity are refused. `broker/wire.py` turns them into frames and back;
`broker/head.py` holds the aggregator's own record.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    model_validator,
)

from broker.topology import FEDERATION, PARTICIPANT, RESERVED

MAX_MODEL_BYTES = 1 << 40
MAX_COUNT = 1 << 53  # integers that survive every language
MAX_ITEMS = 1 << 20

Participant = Annotated[str, StringConstraints(pattern=f"^{PARTICIPANT}$")]
Federation = Annotated[str, StringConstraints(pattern=f"^{FEDERATION}$")]
RunId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,60}$")]
DIGEST_BYTES = 32
Sha256 = Annotated[  # in hexadecimal; as bytes in a frame, where it is half of what a small message is
    str,
    BeforeValidator(lambda digest: digest.hex() if isinstance(digest, bytes) else digest),
    StringConstraints(pattern=r"^[0-9a-f]{64}$"),
    PlainSerializer(lambda digest, info: digest if info.mode_is_json() else bytes.fromhex(digest)),
]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Text = Annotated[str, StringConstraints(max_length=2000)]
Word = Annotated[str, StringConstraints(max_length=200)]
Names = Annotated[tuple[Word, ...], Field(max_length=256)]
Codecs = Annotated[tuple[Word, ...], Field(max_length=16)]
Metrics = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], float], Field(max_length=64)]
Scalar = bool | int | float | Annotated[str, StringConstraints(max_length=1000)]
Settings = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], Scalar], Field(max_length=256)]

Work = Literal["train", "evaluate", "none"]
Wants = Literal["delta", "gradient", "model", "delta+loss", "delta+control"]
Arrays = Wants | Literal["none"]
Verdict = Literal["counted", "late", "refused", "duplicate"]
Fate = Literal["counted", "late", "refused", "missing"]
Phase = Literal["idle", "training", "holding"]
Command = Literal["pause", "resume", "stop", "remove", "admit"]
ABOUT_ONE = ("remove", "admit")  # commands that name a participant


class Part(BaseModel):
    """A frozen record that refuses unknown fields, wrong types, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with these fields replaced, unchecked. What was worked out from the fields is not copied."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


class Where(Part):
    """Where a payload is: behind this header (`inline`), in a stream as numbered chunks, or in the claim-check
    store (`url`) as numbered parts, at a place under its root that follows from the rest of the message."""

    where: Literal["inline", "stream", "url"] = "inline"
    size_bytes: Annotated[int, Field(ge=0, le=MAX_MODEL_BYTES)]
    sha256: Sha256
    stream: Word = ""
    first_offset: Count = 0
    chunks: Annotated[int, Field(ge=0, le=MAX_ITEMS)] = 0


class Difference(Part):
    """How whoever has the model `base` comes to the next version: encoded by `codec`, at `body`."""

    base: Sha256
    codec: Word
    body: Where


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
    software: Word = ""


class Heartbeat(Status):
    kind: ClassVar[str] = "heartbeat"


class Leave(FromParticipant):
    """A worker stopped in good order; nobody needs to wait for it."""

    kind: ClassVar[str] = "leave"
    reason: Text = ""


class UpdateReady(FromParticipant):
    """The answer to a task: arrays (inline or in the outbox, as `codec` encodes them), or only metrics for
    `evaluate`."""

    kind: ClassVar[str] = "update"
    run_id: RunId
    epoch: Count  # of the TrainRound that it answers
    task: Count
    base_sha256: Sha256  # of the model that it started from
    arrays: Arrays = "delta"
    num_examples: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    metrics: Metrics = {}
    seconds: Annotated[float, Field(ge=0)] = 0.0
    effective_steps: Annotated[float, Field(ge=0)] = 0.0
    start_loss: Annotated[float, Field(ge=0)] | None = None  # of the model that it started from
    lora_rank: Annotated[int, Field(ge=0, le=1 << 16)] = 0  # of adapters below the model's; 0: as the model
    codec: Word = "none"
    body: Where | None = None


class TrainFailed(FromParticipant):
    kind: ClassVar[str] = "failed"
    run_id: RunId
    task: Count
    error: Text


class TrainRound(Message):
    """The whole of what a participant should know now; an inbox holds only the newest.

    `asked` names who shall do `work`; `fates` tells participants what became of their last update. A worker that
    was not given a learning task of its own does `learning_task` on its share of the task's data: `data` says how
    that is shared out.
    """

    kind: ClassVar[str] = "round"
    run_id: RunId
    epoch: Count
    seq: Count
    task: Count
    round: Count
    attempt: Count
    turn: Count = 0  # how many tasks of this version whoever is asked has done already
    work: Work
    asked: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)]
    version: Count
    model: Where | None
    difference: Difference | None = None  # another way to that model, for who has the one before
    learning_task: Word = ""
    data: Settings = {}
    settings: Settings = {}
    wants: Wants = "delta"
    state: Where | None = None  # of the strategy, if participants need it; inline it follows the model
    local: Names = ()  # patterns of tensors that stay with each participant
    ditto: Annotated[float, Field(ge=0)] = 0.0
    fragments: Annotated[int, Field(ge=1, le=MAX_ITEMS)] = 1  # of the model; an update has the one that is due
    codecs: Codecs = ()  # that an update may use besides none, the most faithful first
    seed: Count = 0  # the run's
    deadline_s: Annotated[float, Field(ge=0)] = 0.0  # seconds left when this was sent
    late_counts: bool = False
    fates: Annotated[dict[Participant, tuple[Count, Fate]], Field(max_length=MAX_ITEMS)] = {}
    finished: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        return (self.epoch, self.seq)

    def asks(self, participant: str) -> bool:
        """Whether that one shall do the work."""
        return participant in self._asked

    @cached_property
    def _asked(self) -> frozenset[str]:
        return frozenset(self.asked)


class Chunk(Message):
    """Piece `index` of the payload whose sha256 is `of`."""

    kind: ClassVar[str] = "chunk"
    of: Sha256
    index: Annotated[int, Field(ge=0, lt=MAX_ITEMS)]


class Barrier(Message):
    """Published by whoever reads, to know when it has read everything that was there before."""

    kind: ClassVar[str] = "barrier"
    nonce: Word


class Control(Message):
    """What an operator wants. It lies in `updates` like everything else, so whoever leads obeys, in that order."""

    kind: ClassVar[str] = "control"
    command: Command
    run_id: RunId | Literal[""] = ""  # empty: whichever is the current one
    participant: Participant | Literal[""] = ""
    nonce: Word

    @model_validator(mode="after")
    def _names_whom_it_is_about(self) -> Self:
        if (self.command in ABOUT_ONE) != bool(self.participant) or self.participant in RESERVED:
            raise ValueError(f"{self.command} {self.participant!r}: only {', '.join(ABOUT_ONE)} name a participant")
        return self


class Answer(Message):
    """What the leader says to the operator whose Control has that nonce."""

    kind: ClassVar[str] = "answer"
    nonce: Word
    done: bool
    text: Text


class Rejected(Message):
    """A refused message (payload: its first bytes) and why."""

    kind: ClassVar[str] = "rejected"
    offset: Count
    participant: Word
    reason: Text
