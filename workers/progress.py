"""How far a piece of training has come, on the disk: a worker that was killed goes on from there.

It changes no bit: progress is of one piece of work alone, and whatever that depends on is part of its name.
Progress of anything else is not used, and the next that is saved takes its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import structlog

from broker import tensors
from broker.errors import BadMessage, StateError
from broker.messages import TrainRound
from broker.tensors import Arrays, Buffer
from workers.own import Own

TOLD = {
    "run_id",
    "task",
    "round",
    "turn",
    "wants",
    "learning_task",
    "data",
    "settings",
    "local",
    "ditto",
    "fragments",
    "seed",
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """`of`: which work's, in three words: run, task and a digest (`Work.name`). `seconds`: how long it trained.
    `arrays`: what the learning task saved."""

    of: str
    seconds: float
    arrays: Arrays

    def to_pieces(self) -> Sequence[Buffer]:
        """For a file: one line with a digest, then the arrays, of which nothing is copied. Raises BadMessage for
        arrays that could not be read again."""
        if long := [name for name in self.arrays if len(name) > tensors.MAX_NAME]:
            raise BadMessage(f"its array {long[0]!r} has too long a name")
        pieces = tensors.encode_buffers(self.arrays)
        said = f"{self.of} {self.seconds!r}"
        return [f"{said} {_digest([said.encode(), *pieces])}\n".encode(), *pieces]

    @classmethod
    def from_bytes(cls, content: bytes) -> Progress:
        """What `to_pieces` wrote. Raises BadMessage if it is damaged."""
        line, _, blob = content.partition(b"\n")
        said, _, sha256 = line.rpartition(b" ")
        of, _, seconds = said.decode(errors="replace").rpartition(" ")
        if sha256 != _digest([said, blob]).encode() or len(of.split(" ")) != 3:
            raise BadMessage("it does not match its sha256")
        return cls(of, float(seconds), tensors.decode(blob))


@dataclass(frozen=True)
class Work:
    """One piece of training, for whom, what is the participant's own, and the rank of its adapters."""

    told: TrainRound
    participant: str
    own: Own
    lora_rank: int = 0

    @cached_property
    def name(self) -> str:
        """Run, task, and a digest of everything that the training depends on, but for the participant's data and
        code, which the learning task must know. Not the attempt, nor the leader's epoch: whoever asks again asks
        for the same."""
        told, own = self.told, self.own
        said = told.model_dump(mode="json", include=TOLD)
        bodies = [body and body.sha256 for body in (told.model, told.state)]
        words = json.dumps([self.participant, said, bodies, own.lost, self.lora_rank], sort_keys=True).encode()
        return f"{told.run_id} {told.task} {_digest([words, *tensors.encode_buffers(own.kept)])}"


class Saving:
    """The progress of one piece of work: what there is already, and what is still to come. Used in one thread."""

    def __init__(
        self, work: Work, found: Progress | None, keep: Callable[[Progress], bool], clock: Callable[[], float]
    ) -> None:
        """`found`: what is on the disk, perhaps of another."""
        self._work, self._keep, self._clock, self._began = work, keep, clock, clock()
        self._log = log.bind(participant=work.participant, task=work.told.task)
        fits = found is not None and found.of == work.name
        self.resume: Arrays = found.arrays if found and fits else {}
        self.seconds_before = found.seconds if found and fits else 0.0
        if found is not None and fits:
            self._log.info("training_resumed", seconds=round(found.seconds, 3))
        elif found is not None:
            self._log.info("progress_dropped", reason=f"it is of other work: {found.of}")

    def save(self, arrays: Arrays) -> None:
        """Replaces what was saved before. What cannot be saved costs time after a crash, and nothing now."""
        seconds = self.seconds_before + self._clock() - self._began
        try:
            kept = self._keep(Progress(self._work.name, seconds, arrays))
        except (BadMessage, StateError) as error:
            self._log.warning("progress_not_saved", reason=str(error))
        else:
            if kept:
                self._log.info("progress_saved", seconds=round(seconds, 3))


def _digest(pieces: Sequence[Buffer]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
