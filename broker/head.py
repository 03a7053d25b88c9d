"""The head record: the one message that is the whole truth of a run, and its parts."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from broker.messages import (
    MAX_ITEMS,
    Count,
    Difference,
    Fate,
    Message,
    Metrics,
    Part,
    Participant,
    RunId,
    Sha256,
    Text,
    Verdict,
    Where,
    Word,
)


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
    allowed_s: float  # for the first attempt

    def asks(self, participant: str) -> bool:
        """Whether that one is of the cohort."""
        return participant in self._cohort

    @cached_property
    def _cohort(self) -> frozenset[str]:
        return frozenset(self.cohort)


class Decision(Part):
    """What became of one message in `updates`: one line of the ledger.

    A broker that lost the tail of a stream gives its offsets again, but that costs the leader its connection: so
    within the `epoch` of the leader that decided, an offset names one message.
    """

    epoch: Count
    offset: Count
    participant: Word
    task: Count
    verdict: Verdict
    weight: Count = 0  # integer weight in the sum; 0 was not summed
    version: Count = 0  # of the model that it went into; 0: none
    staleness: Count = 0
    reason: Text = ""


class ClosedRound(Part):
    """What the history says of the last piece of work that closed. Bytes are those of its messages and chunks."""

    work: Literal["train", "evaluate"]
    round: Count
    attempt: Count
    task: Count
    cohort: Count
    opened: float
    closed: float
    bytes_up: Count = 0
    bytes_down: Count = 0
    unlisted: Count = 0  # refused and duplicate messages beyond those that `decided` lists


class Best(Part):
    """The best version so far by the metric that the run is judged by."""

    version: Count
    round: Count
    value: float
    sha256: Sha256


class Obeyed(Part):
    """Controls that are in the record already and will be read again, and who was removed before the first."""

    nonces: Annotated[tuple[Word, ...], Field(max_length=MAX_ITEMS)] = ()
    removed: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)] = ()


class HeadRecord(Message):
    """The whole truth of a run: it is replaced as one message, so nothing in it can disagree.

    `lineage`: which version the tasks from a number on depart from. `marks` are messages that were read, by offset,
    to know a stream that lost its tail (aggregator/marks.py).
    `settled` holds each participant's last decided task; `decided` what was decided since the record before.
    `wanted` and `removed` are what operators said last. The payload is the model, then the strategy's state, as
    far as they are inline.
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
    difference: Difference | None = None
    lineage: Annotated[tuple[tuple[Count, Count, Sha256], ...], Field(max_length=1000)] = ()
    open: OpenRound | None = None
    closed: ClosedRound | None = None
    updates_from: Count = 0
    marks: Annotated[tuple[tuple[Count, Word], ...], Field(max_length=64)] = ()
    members: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)] = ()
    settled: Annotated[dict[Participant, tuple[Count, Fate]], Field(max_length=MAX_ITEMS)] = {}
    decided: Annotated[tuple[Decision, ...], Field(max_length=MAX_ITEMS)] = ()
    metrics: Metrics = {}
    best: Best | None = None
    pace: Annotated[tuple[float, ...], Field(max_length=1000)] = ()  # seconds that participants took lately
    wanted: Literal["run", "pause", "stop"] = "run"
    removed: Annotated[tuple[Participant, ...], Field(max_length=MAX_ITEMS)] = ()
    obeyed: Obeyed | None = None  # since `updates_from`
    finished: Word = ""  # why the run ended; empty while it runs

    @property
    def rank(self) -> tuple[int, int]:
        return (self.epoch, self.seq)

    @property
    def bodies(self) -> tuple[Where, ...]:
        """What its version consists of: the model and, if there is one, the strategy's state."""
        return tuple(where for where in (self.model, self.state) if where is not None)

    def base_of(self, task: int) -> tuple[int, str] | None:
        """Version and sha256 of the model that a task departs from; None if that is older than any remembered one.

        A line of `lineage` holds from its task to that before the next line's.
        """
        lines = ((version, sha256) for first, version, sha256 in reversed(self.lineage) if first <= task)
        return next(lines, None)

    def with_(self, **changes: Any) -> Self:
        """A copy with these fields replaced. It is checked when it is committed (`checked`)."""
        return self.model_copy(update=changes)

    def checked(self, **changes: Any) -> Self:
        """A copy with these fields replaced and all fields checked again."""
        return type(self)(**{**dict(self), **changes})
