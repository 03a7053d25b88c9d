"""A whole federation in one process on the embedded broker, and the least that anybody could do instead.

    python -m benchmarks.embedded --participants 10 --floats 256 --rounds 100 --warm-up 10

`--bare` hands the model to tasks through queues of asyncio, lets each change it in a thread, and takes the mean of
what comes back: no messages, no checks, no files.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from aggregator.archive import BEHIND_S
from aggregator.daemon import Aggregator
from aggregator.history import RoundReport
from aggregator.job import Job, Surroundings
from benchmarks.fleet import LONGEST_S, Load, Measured, Sizes
from broker.memory import MemoryBroker
from broker.store import OwnMemory
from broker.tensors import Arrays
from broker.topology import AGGREGATOR, Topology
from fluffle.chaos.processes import ROOT
from fluffle.logs import configure_logs
from fluffle.results import peak_rss_mb
from workers.journal import MemoryJournal
from workers.lane import Lane
from workers.link import WorkerSettings
from workers.task import TrainConfig
from workers.tasks import find_object
from workers.worker import Site, Worker, always


@dataclass
class Rounds:
    """When each round closed, and the processor seconds of this process until then."""

    closed: list[tuple[float, float]] = field(default_factory=list)

    def note(self, _: RoundReport | None = None) -> None:
        self.closed.append((time.monotonic(), time.process_time()))

    def per_round(self, load: Load) -> dict[str, float]:
        (began, cpu_began), (ended, cpu_ended) = self.closed[load.warm_up - 1], self.closed[-1]
        count = len(self.closed) - load.warm_up
        return {
            "seconds_per_round": round((ended - began) / count, 5),
            "cpu_s_per_round": round((cpu_ended - cpu_began) / count, 5),
        }


def run(load: Load, *, bare: bool = False) -> Measured:
    """One run in a process of its own."""
    sizes = ("participants", "floats", "tensors", "rounds", "warm_up")
    options = [word for name in sizes for word in (f"--{name.replace('_', '-')}", str(getattr(load, name)))]
    line = [sys.executable, "-m", "benchmarks.embedded", *options, "--task", load.task, *["--bare"] * bare]
    done = subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT, timeout=LONGEST_S)
    told = json.loads(done.stdout)
    return Measured(told["per_round"], {"all": told["peak_mb"]}, Sizes(0, 0, 0, 0))


async def federate(load: Load, directory: Path) -> Rounds:
    """Fluffle: aggregator and workers, which share one thread to train in."""
    broker, topology, rounds = MemoryBroker(Topology("default").access), Topology("default"), Rounds()
    store = OwnMemory()
    connection = await broker.connect(AGGREGATOR, purpose="set up")
    await connection.declare(*topology.aggregator_declarations())
    make, thread = find_object(load.task), Lane("train")
    settings = WorkerSettings(heartbeat_s=load.heartbeat_s)
    workers = [
        Worker(Site(name, always(make(name, "")), MemoryJournal(), thread, store), broker, topology, settings)
        for name in load.names
    ]
    around = Surroundings(
        on_report=rounds.note, on_notice=lambda event, fields: None, behind_s=BEHIND_S, store=store
    )
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run())
        record = await Aggregator(Job(load.run, load.initial), broker, directory, around).run()
        for worker in workers:
            worker.stop()
    assert record.version == len(rounds.closed) == load.run.stop.rounds
    return rounds


async def floor(load: Load) -> Rounds:
    """As many tasks, queues and hops into a thread, and the same arithmetic."""
    make, thread, rounds = find_object(load.task), ThreadPoolExecutor(1, "train"), Rounds()
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[Arrays] = asyncio.Queue()
    inboxes: dict[str, asyncio.Queue[Arrays]] = {name: asyncio.Queue() for name in load.names}

    async def serve(name: str, inbox: asyncio.Queue[Arrays]) -> None:
        task = make(name, "")
        while True:
            arrays = await inbox.get()
            answers.put_nowait(
                (await loop.run_in_executor(thread, task.train, arrays, TrainConfig(round=1, seed=0))).arrays
            )

    tasks = [loop.create_task(serve(name, inbox)) for name, inbox in inboxes.items()]
    model = load.initial()
    for _ in range(load.run.stop.rounds):
        for inbox in inboxes.values():
            inbox.put_nowait(model)
        total = {name: np.zeros_like(values) for name, values in model.items()}
        for _ in tasks:
            for name, values in (await answers.get()).items():
                total[name] += values
        model = {name: values / np.float32(load.participants) for name, values in total.items()}
        rounds.note()
    for task in tasks:
        task.cancel()
    return rounds


@click.command()
@click.option("--participants", default=10)
@click.option("--floats", default=256)
@click.option("--tensors", default=2)
@click.option("--rounds", default=100)
@click.option("--warm-up", default=10)
@click.option("--task", default=Load(1, 1).task)
@click.option("--bare", is_flag=True)
def main(bare: bool, **sizes: int | str) -> None:  # noqa: FBT001 - a flag
    """Prints what a round cost as JSON."""
    configure_logs("warning")
    load = Load(**sizes)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as directory:
        rounds = asyncio.run(floor(load) if bare else federate(load, Path(directory)))
    click.echo(json.dumps({"per_round": rounds.per_round(load), "peak_mb": peak_rss_mb() * (1 << 20) / 1e6}))


if __name__ == "__main__":
    main()
