"""What the bodies of a large model cost: through RabbitMQ, and through a claim-check store beside it.

    python -m benchmarks.data_plane
    python -m benchmarks.data_plane --mb 10 --rounds 2 --ways broker,folder --out /tmp/small.json

Four participants, 25,000,000 float32 in ten tensors, every participant changes every value, nothing is trained;
each participant and the aggregator are processes of their own. Counted are the processor seconds of all processes,
of the broker and the object store too, from the end of the first round to the end of the last, as the kernel tells
them. It checks that the model has the bits that the same sums give in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from aggregator.judge import weight_of
from aggregator.settings import RunSettings
from aggregator.strategies import make_strategy
from benchmarks.large_model import BYTES_PER_MB, LONGEST_S, RESULTS, about, private_rabbit
from broker import tensors
from broker.tensors import Arrays
from fluffle.chaos.processes import Event, Process
from tests.federation import names, settings
from tests.processes import deployment
from tests.rabbit_node import Rabbit
from tests.seaweed import BUCKET, Seaweed
from tests.web import web_server
from workers.task import Evaluation, TrainConfig, TrainResult

TASK = "benchmarks.data_plane:Drift"
WAYS = ("broker", "folder", "s3", "http")
PARTICIPANTS, TENSORS = 4, 10
TICKS = os.sysconf("SC_CLK_TCK")


class Drift:
    """Halves the values of whatever model it is given and moves them by what its name says. Costs one pass."""

    name = "drift"
    num_examples = 10

    def __init__(self, participant: str, data: str) -> None:
        self._step = np.float32(sum(participant.encode()) % 97 / 97)

    def initial(self) -> Arrays:
        raise NotImplementedError("the initial model is a file: run.initial")

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        moved = {}
        for name, values in arrays.items():
            moved[name] = values * np.float32(0.5)
            moved[name] += self._step
        return TrainResult(moved, self.num_examples)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({}, self.num_examples)


def initial(mb: int) -> Arrays:
    values = np.linspace(-1, 1, mb * BYTES_PER_MB // 4, dtype=np.float32)
    return {f"w{number}": part for number, part in enumerate(np.split(values, TENSORS))}


def run_of(rounds: int) -> RunSettings:
    run = settings(
        PARTICIPANTS, rounds, run_id="large", round={"deadline_s": LONGEST_S}, broker={"patience_s": 60.0}
    )
    return run.model_copy(update={"learning_task": TASK})


def expected(run: RunSettings, model: Arrays) -> str:
    """The digest that the same updates give in this process, without a broker."""
    strategy = make_strategy(run.strategy, run.round)
    for number in range(1, run.stop.rounds + 1):
        strategy.start(model)
        for name in names(PARTICIPANTS):
            trained = Drift(name, "").train(model, TrainConfig(number, seed=0))
            deltas = {key: np.subtract(values, model[key]) for key, values in trained.arrays.items()}
            strategy.add(deltas, weight_of(trained.num_examples, 0, run.round))
        model = strategy.finish()
    return hashlib.sha256(tensors.encode(model)).hexdigest()


def spent_s() -> dict[int, tuple[int, float]]:
    """Session and processor seconds, children's that ended too, of every process on this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        found[int(path.parent.name)] = int(fields[3]), sum(map(int, fields[11:15])) / TICKS
    return found


class Meter:
    """Reads everybody's processor time whenever a round closes."""

    def __init__(self, sessions: dict[int, str]) -> None:
        self.roles: dict[int, str] = {}  # by process
        self._sessions = sessions  # of servers, by session
        self.readings: list[tuple[float, Counter[str]]] = []

    def __call__(self, process: Process, event: Event) -> None:
        self.roles[process.pid] = "aggregator" if process.name == "leader" else "workers"
        if event.name == "round_closed":
            reading: Counter[str] = Counter()
            for pid, (session, seconds) in spent_s().items():
                if role := self.roles.get(pid) or self._sessions.get(session):
                    reading[role] += seconds
            self.readings.append((event.at, reading))

    def per_round(self) -> dict[str, Any]:
        (began, first), (ended, last) = self.readings[0], self.readings[-1]
        rounds = len(self.readings) - 1
        cpu = {role: round((last[role] - first[role]) / rounds, 2) for role in sorted(last)}
        total = round(sum(cpu.values()), 2)
        return {"cpu_s": cpu, "cpu_s_in_all": total, "seconds": round((ended - began) / rounds, 2)}


@contextmanager
def way(name: str, directory: Path) -> Iterator[tuple[dict[str, dict[str, str]], dict[int, str]]]:
    """Environments of the aggregator and of workers, and the sessions of what serves them."""
    folder = directory / "share"
    folder.mkdir()
    with ExitStack() as stack:
        sites: dict[str, str] = {}
        keeper: dict[str, str] = {}
        sessions: dict[int, str] = {}
        if name == "s3":
            seaweed = Seaweed.create(Path(tempfile.mkdtemp(prefix="fluffle-seaweed-")))
            stack.callback(seaweed.end)
            seaweed.start()
            assert seaweed.process
            sessions[seaweed.process.pid] = "seaweedfs"
            keeper = sites = {"FLUFFLE_STORE_URL": f"s3://{BUCKET}", **seaweed.environment("aggregator")}
        elif name == "http":
            sites = {"FLUFFLE_STORE_URL": stack.enter_context(web_server(folder))}
            keeper = {"FLUFFLE_STORE_URL": str(folder)}
            sessions[os.getsid(0)] = "web server"
        elif name == "folder":
            keeper = sites = {"FLUFFLE_STORE_URL": str(folder)}
        yield {"aggregator": keeper, "workers": sites}, sessions


def measure(name: str, mb: int, rounds: int, rabbit: Rabbit) -> dict[str, Any]:
    """One run that way. Raises AssertionError if its model is not the expected one."""
    run, model = run_of(rounds + 1), initial(mb)
    with tempfile.TemporaryDirectory() as scratch, way(name, Path(scratch)) as (environments, sessions):
        directory = Path(scratch)
        (directory / "initial.safetensors").write_bytes(tensors.encode(model))
        assert rabbit.node is not None
        meter = Meter({**sessions, rabbit.node.running[-1].pid: "rabbitmq"})
        with deployment(rabbit, directory) as federation:
            federation.on_event = meter
            federation.set_up()
            workers = [federation.worker(who, task=TASK, **environments["workers"]) for who in names(PARTICIPANTS)]
            start = ("--set", f"run.initial={directory / 'initial.safetensors'}")
            leader = federation.aggregator(run, *start, **environments["aggregator"])
            result = leader.result(LONGEST_S)
            for worker in workers:
                worker.stop()
            peaks = {"aggregator": round(result["aggregator_peak_rss_mb"], 1)}
            peaks |= {worker.name: worker.wait_for("worker_stopped").fields["peak_rss_mb"] for worker in workers}
    assert result["model_sha256"] == expected(run, model), "the model is not the one that these updates give"
    return meter.per_round() | {"peak_rss_mb": peaks, "model_sha256": result["model_sha256"]}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'way':8} {'CPU s/round':>12} {'of broker':>9} {'s/round':>8}  of which"]
    for name, figures in found.items():
        share = figures["cpu_s_in_all"] / found["broker"]["cpu_s_in_all"] if "broker" in found else 1.0
        parts = ", ".join(f"{role} {seconds}" for role, seconds in figures["cpu_s"].items())
        lines.append(f"{name:8} {figures['cpu_s_in_all']:12.2f} {share:9.2f} {figures['seconds']:8.2f}  {parts}")
    return "\n".join(lines)


@click.command()
@click.option("--mb", default=100, show_default=True, help="Size of the model in MB.")
@click.option("--rounds", default=5, show_default=True, help="Rounds after the first, which warms up.")
@click.option("--ways", default=",".join(WAYS), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "data_plane.json")
def main(mb: int, rounds: int, ways: str, out: Path) -> None:
    """Measures one way after the other, prints a table, and writes everything as JSON."""
    with private_rabbit() as rabbit:
        found = {name: measure(name, mb, rounds, rabbit) for name in ways.split(",")}
    assert len({figures["model_sha256"] for figures in found.values()}) == 1
    out.write_text(json.dumps(about("data_plane") | {"mb": mb, "rounds": rounds, "ways": found}, indent=2) + "\n")
    click.echo(table(found))


if __name__ == "__main__":
    main()
