"""Learning tasks that a process of its own can do: without torch, so that it starts in well under a second.

`--task fluffle.chaos.task:make` (or `:make_large`, `:make_stepwise`), and in `--data` what `Pace.as_data` says.
"""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from broker.tensors import Arrays
from workers.task import Evaluation, TrainConfig, TrainResult

TASK = f"{__name__}:make"
LARGE_TASK = f"{__name__}:make_large"
STEPWISE_TASK = f"{__name__}:make_stepwise"
STEPS = 8  # of that task in a round
LARGE = 20_000  # numbers in that task's model: 80 kB


@dataclass(frozen=True, slots=True)
class Pace:
    """How long training takes: so many seconds in every round, and from one round on until a gate is open.

    Every round waits for the `first_gate`.
    """

    seconds: float = 0.0
    gate: str = ""
    from_round: int = 1
    first_gate: str = ""

    @property
    def as_data(self) -> str:
        return json.dumps(asdict(self))

    def keep(self, round: int) -> None:  # noqa: A002 - the design's word
        time.sleep(self.seconds)
        for gate in (self.first_gate, self.gate if round >= self.from_round else ""):
            if gate:
                with Path(gate).open() as file:
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

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


class Pull:
    """Each participant pulls the model halfway towards a point of its own, with noise from the given seed: one
    step of size 1/2 down half the squared distance."""

    def __init__(self, name: str, size: int = 7, examples: int = 10) -> None:
        self.name = "pull"
        self.num_examples = examples
        rng = np.random.default_rng(abs(hash(name)) % 1000 if not name[-2:].isdigit() else int(name[-2:]))
        self.point = rng.normal(size=size).astype(np.float32)
        self.trained: list[int] = []

    def initial(self) -> Arrays:
        return {"w": np.zeros(self.point.shape, np.float32), "steps": np.zeros((), np.int64)}

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        self.trained.append(config.round)
        noise = np.random.default_rng(config.seed).normal(scale=0.01, size=self.point.shape).astype(np.float32)
        w = arrays["w"] + (self.point - arrays["w"]) / 2 + noise
        if config.correction:
            w -= config.correction["w"] / 2
        loss = float(np.square(w - self.point).mean())
        return TrainResult(
            {"w": w, "steps": arrays["steps"] + 1}, self.num_examples, {"loss": loss}, step_sum=0.5,
            start_loss=self.evaluate(arrays).metrics["loss"] if config.wants == "delta+loss" else None,
        )  # fmt: skip

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({"loss": float(np.square(arrays["w"] - self.point).mean())}, self.num_examples)


class Paced(Pull):
    """Pulls as ever, and takes its time."""

    def __init__(self, name: str, pace: Pace, size: int = 7) -> None:
        super().__init__(name, size)
        self.pace = pace

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        self.pace.keep(config.round)
        return super().train(arrays, config)


def make(participant: str, data: str) -> Paced:
    return Paced(participant, Pace(**json.loads(data or "{}")))


def make_large(participant: str, data: str) -> Paced:
    """The same with a model that can go in chunks."""
    return Paced(participant, Pace(**json.loads(data or "{}")), LARGE)


class Stepwise(Paced):
    """Pulls in `STEPS` small steps and saves its progress after each. After half of them it takes its time."""

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        done = config.resume or {"w": arrays["w"], "step": np.array(0)}
        w = done["w"].copy()
        for step in range(int(done["step"]), STEPS):
            noise = np.random.default_rng([config.seed, step]).normal(scale=0.01, size=w.shape).astype(np.float32)
            w += (self.point - w) / STEPS + noise
            config.save({"w": w, "step": np.array(step + 1)})
            if step + 1 == STEPS // 2:
                self.pace.keep(config.round)
        return TrainResult({"w": w, "steps": arrays["steps"] + 1}, self.num_examples)


def make_stepwise(participant: str, data: str) -> Stepwise:
    return Stepwise(participant, Pace(**json.loads(data or "{}")))
