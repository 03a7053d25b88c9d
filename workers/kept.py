"""Arrays that a worker keeps from one counted update to the next: of which run and round they are.

Two kinds are kept, each by itself: what a codec with error feedback still owes, and what is the participant's own
(`own.py`). Both are in force only once the update that they came with was counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from broker import tensors
from broker.errors import BadMessage, TaskError
from broker.messages import TrainRound
from broker.tensors import MAX_NAME, Arrays, Buffer


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept after an update of `round`: arrays as a safetensors file, perhaps of none."""

    run_id: str
    round: int
    blob: Buffer

    @classmethod
    def of(cls, told: TrainRound, arrays: Arrays) -> Kept:
        """Raises TaskError if it could not be read again."""
        if long := [name for name in arrays if len(name) > MAX_NAME]:
            raise TaskError(f"tensor {long[0]!r}: what is kept of it has no name that short: shorten the model's")
        return cls(told.run_id, told.round, tensors.encode(arrays))

    def missed(self, told: TrainRound) -> int:
        """How many rounds passed between without this participant."""
        return told.round - self.round - 1

    def arrays(self, told: TrainRound) -> Arrays:
        """What an order's work begins with. Raises BadMessage with the reason why that is nothing."""
        if told.run_id != self.run_id:
            raise BadMessage(f"it is of run {self.run_id!r}")
        if told.round < self.round or (told.round == self.round and told.work == "train"):
            raise BadMessage(f"the run went back: round {told.round} comes after round {self.round}")
        return tensors.decode(self.blob)

    def to_bytes(self) -> bytes:
        """For a file: run, round and digest in one line, then the arrays."""
        return f"{self.run_id} {self.round} {hashlib.sha256(self.blob).hexdigest()}\n".encode() + bytes(self.blob)

    @classmethod
    def from_bytes(cls, content: bytes) -> Kept:
        """What `to_bytes` wrote. Raises BadMessage if it is damaged."""
        line, _, blob = content.partition(b"\n")
        match line.decode(errors="replace").split(" "):
            case [run_id, number, sha256] if number.isdecimal() and sha256 == hashlib.sha256(blob).hexdigest():
                return cls(run_id, int(number[:18]), blob)
        raise BadMessage("it does not match its sha256")
