"""A large model goes round: one aggregator and four workers as processes, over a RabbitMQ of their own.

    python -m benchmarks.large_model
    python -m benchmarks.large_model --mb 10 --rounds 2 --out /tmp/small.json

It checks that the model comes out with the bits that the same sums give in one process, and writes the seconds of
each round and the most memory that each process held.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from yarl import URL

from aggregator.judge import weight_of
from aggregator.settings import RunSettings
from aggregator.strategies import make_strategy
from benchmarks.probe import KIB_PER_MIB, beam, fields
from broker import tensors
from broker.tensors import Arrays
from fluffle.chaos.node import PROGRAMS, Node
from fluffle.chaos.processes import Deployment, Process
from tests.federation import names, settings
from tests.processes import deployment
from tests.rabbit_node import Rabbit, node_definitions
from workers.task import Evaluation, TrainConfig, TrainResult

TASK = "benchmarks.large_model:Drift"
RESULTS = Path(__file__).parent / "results"
BYTES_PER_MB = 1_000_000
LONGEST_S = 600.0  # for the whole run


class Drift:
    """Halves the values of whatever model it is given and moves them by what its name says. Costs one pass."""

    name = "drift"
    num_examples = 10

    def __init__(self, participant: str, data: str) -> None:
        self._step = np.float32(sum(participant.encode()) % 97 / 97)

    def initial(self) -> Arrays:
        raise NotImplementedError("the initial model is a file: run.initial")

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        values = arrays["w"] * np.float32(0.5)
        values += self._step
        return TrainResult({"w": values}, self.num_examples)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({}, self.num_examples)


@dataclass(frozen=True)
class Plan:
    """What goes round, how often, and between how many."""

    mb: int = 100
    rounds: int = 3
    participants: int = 4

    @property
    def run(self) -> RunSettings:
        run = settings(
            self.participants, self.rounds, run_id="large", round={"deadline_s": LONGEST_S},
            broker={"patience_s": 60.0},
        )  # fmt: skip
        return run.model_copy(update={"learning_task": TASK})

    def initial(self) -> Arrays:
        return {"w": np.linspace(-1, 1, self.mb * BYTES_PER_MB // 4, dtype=np.float32)}

    def expected(self) -> str:
        """The digest that the same updates give in this process, without a broker."""
        run, model = self.run, self.initial()
        strategy = make_strategy(run.strategy, run.round)
        for number in range(1, self.rounds + 1):
            strategy.start(model)
            for name in names(self.participants):
                trained = Drift(name, "").train(model, TrainConfig(number, seed=0))
                delta = np.subtract(trained.arrays["w"], model["w"])
                strategy.add({"w": delta}, weight_of(trained.num_examples, 0, run.round), name)
            model = strategy.finish()
        return hashlib.sha256(tensors.encode(model)).hexdigest()


def measure(plan: Plan, federation: Deployment, node: Node | None) -> dict[str, Any]:
    """One run, and what it cost. Raises AssertionError if its model is not the expected one."""
    initial = federation.directory / "initial.safetensors"
    initial.write_bytes(tensors.encode(plan.initial()))
    federation.set_up()
    workers = federation.workers(*names(plan.participants), task=TASK)
    leader = federation.aggregator(plan.run, "--set", f"run.initial={initial}")
    result = leader.result(LONGEST_S)
    assert result["model_sha256"] == plan.expected(), "the model is not the one that these updates give"
    return {
        "model_sha256": result["model_sha256"],
        "seconds_per_round": seconds_per_round(leader, workers, plan.rounds),
        "bytes": result["bytes"],
        "peak_rss_mb": {
            "aggregator": round(result["aggregator_peak_rss_mb"], 1),
            **{worker.name: stopped(worker) for worker in workers},
            "rabbitmq": beam_peak_mb(node),
        },
    }


def seconds_per_round(leader: Process, workers: list[Process], rounds: int) -> list[float]:
    """From one closed round to the next, so with the new model's way to the broker; the first from its tasks."""
    began = min(worker.wait_for("work_begun", round=1).at for worker in workers)
    closed = [leader.wait_for("round_closed", round=number).at for number in range(1, rounds + 1)]
    return [round(after - before, 2) for before, after in zip([began, *closed], closed, strict=False)]


def stopped(worker: Process) -> float:
    """Tells it to stop; returns the most memory it held, in MiB."""
    worker.stop()
    return float(worker.wait_for("worker_stopped").fields["peak_rss_mb"])


def beam_peak_mb(node: Node | None) -> float:
    """The most memory that the newest RabbitMQ of this node held, in MiB; 0 if it is not ours or not on Linux."""
    pid = beam(node) if node else None
    return round(int(fields(Path(f"/proc/{pid}/status"))["VmHWM"].split()[0]) / KIB_PER_MIB, 1) if pid else 0.0


@contextmanager
def private_rabbit() -> Iterator[Rabbit]:
    node = Node.create(Path(tempfile.mkdtemp(prefix="fluffle-rabbit-")), node_definitions())
    try:
        node.start()
        yield Rabbit(URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/"), node)
    finally:
        node.end()


def about(module: str = "large_model") -> dict[str, Any]:
    """What a number means nothing without."""
    rabbit = next((path.name for path in PROGRAMS.parent.glob("lib/rabbitmq_server-*")), "")
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "fluffle": version("fluffle"), "python": platform.python_version(), "numpy": version("numpy"),
            "aiormq": version("aiormq"), "rabbitmq": rabbit.removeprefix("rabbitmq_server-"),
        },
        "processor": platform.machine(), "cores": os.cpu_count(),
    }  # fmt: skip


@click.command()
@click.option("--mb", default=Plan.mb, show_default=True, help="Size of the model in MB.")
@click.option("--rounds", default=Plan.rounds, show_default=True)
@click.option("--participants", default=Plan.participants, show_default=True, help="At most 5.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "large_model.json")
def main(mb: int, rounds: int, participants: int, out: Path) -> None:
    """Measures, prints, and writes the same as JSON."""
    plan = Plan(mb, rounds, participants)
    with (
        tempfile.TemporaryDirectory() as directory,
        private_rabbit() as rabbit,
        deployment(rabbit, Path(directory)) as federation,
    ):
        report = json.dumps(about() | asdict(plan) | measure(plan, federation, rabbit.node), indent=2)
    out.write_text(report + "\n")
    click.echo(report)


if __name__ == "__main__":
    main()
