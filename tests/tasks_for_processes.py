"""Learning tasks that a process of its own can do: without torch, so that it starts in well under a second.

`--task tests.tasks_for_processes:make`, and in `--data` what `Pace.as_data` says.
"""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from broker.tensors import Arrays
from tests.federation import Pull
from workers.task import TrainConfig, TrainResult

TASK = f"{__name__}:make"


@dataclass(frozen=True, slots=True)
class Pace:
    """How long training takes: so many seconds in every round, and from one round on until a gate is open."""

    seconds: float = 0.0
    gate: str = ""
    from_round: int = 1

    @property
    def as_data(self) -> str:
        return json.dumps(asdict(self))

    def keep(self, round: int) -> None:  # noqa: A002 - the design's word
        time.sleep(self.seconds)
        if self.gate and round >= self.from_round:
            with Path(self.gate).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH)


class Gate:
    """A file that is locked until `open`: training in other processes waits for it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self.path = path
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def pace(self, from_round: int) -> Pace:
        return Pace(gate=str(self.path), from_round=from_round)

    def open(self) -> None:
        """Lets everybody pass. May be called twice."""
        self._file.close()


class Paced(Pull):
    """Pulls as ever, and takes its time."""

    def __init__(self, name: str, pace: Pace) -> None:
        super().__init__(name)
        self.pace = pace

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        self.pace.keep(config.round)
        return super().train(arrays, config)


def make(participant: str, data: str) -> Paced:
    return Paced(participant, Pace(**json.loads(data or "{}")))
