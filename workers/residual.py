"""What a codec with error feedback still owes: of which run and round, and when it is of no use any more."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from broker import tensors
from broker.codecs.feedback import check_residual
from broker.errors import BadMessage
from broker.messages import TrainRound
from broker.tensors import Arrays, Buffer


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual after an update of `round`: arrays as a safetensors file; without any, nothing is owed."""

    run_id: str
    round: int
    blob: Buffer

    @classmethod
    def of(cls, told: TrainRound, arrays: Arrays) -> Residual:
        return cls(told.run_id, told.round, tensors.encode(arrays))

    def missed(self, told: TrainRound) -> int:
        """How many rounds passed between without this participant."""
        return told.round - self.round - 1

    def arrays(self, told: TrainRound, model: Arrays) -> Arrays:
        """What is owed to an update that answers `told`. Raises BadMessage with the reason why that is nothing."""
        if told.run_id != self.run_id:
            raise BadMessage(f"it is of run {self.run_id!r}")
        if told.round <= self.round:
            raise BadMessage(f"the run went back: round {told.round} comes after round {self.round}")
        arrays = tensors.decode(self.blob)
        check_residual(arrays, model)
        return arrays

    def to_bytes(self) -> bytes:
        """For a file: run, round and digest in one line, then the arrays."""
        return f"{self.run_id} {self.round} {hashlib.sha256(self.blob).hexdigest()}\n".encode() + bytes(self.blob)

    @classmethod
    def from_bytes(cls, content: bytes) -> Residual:
        """What `to_bytes` wrote. Raises BadMessage if it is damaged."""
        line, _, blob = content.partition(b"\n")
        match line.decode(errors="replace").split(" "):
            case [run_id, number, sha256] if number.isdecimal() and sha256 == hashlib.sha256(blob).hexdigest():
                return cls(run_id, int(number[:18]), blob)
        raise BadMessage("it does not match its sha256")
