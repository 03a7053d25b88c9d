"""W6: how much memory an aggregator needs, for models of several sizes and numbers of participants.

    python -m benchmarks.memory

Two rounds over RabbitMQ for models of 10, 100 and 400 MB with 4 and with 12 participants, all of whom one process
plays (`benchmarks/feeders.py`). What counts is the aggregator's peak above its idle: that of a model of 1 KB.
And a worker's, for 100 MB, above what its learning task holds: the arrays that it returns.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from benchmarks.fleet import LONGEST_S, Load, deployed, rabbit, run_fluffle
from benchmarks.measure import BYTES_PER_MB, RESULTS, Line, line, report, table, write
from broker import tensors
from fluffle.chaos.node import Node
from fluffle.chaos.processes import Process

MODELS_MB = (10, 100, 400)
PARTICIPANTS = (4, 12)
ROUNDS = 2
MODELS_HELD, FIXED_MB = 2, 64  # the running sum, and what else the aggregator holds
MOST_UNEQUAL = 1.1
WORKER_MB = 100
FEEDERS = (sys.executable, "-m", "benchmarks.feeders")


def load_of(mb: int, participants: int) -> Load:
    floats = mb * BYTES_PER_MB // 4 or 256
    return Load(participants=participants, floats=floats, tensors=10, rounds=ROUNDS, warm_up=0)


def key_of(mb: int, participants: int) -> str:
    return f"w6-{mb}-{participants}"


def aggregator_peak_mb(node: Node, mb: int, participants: int) -> float:
    load = load_of(mb, participants)
    with deployed(node, key_of(mb, participants)) as deployment:
        model, update = (deployment.directory / name for name in ("model.safetensors", "update.safetensors"))
        initial = load.initial()
        model.write_bytes(tensors.encode(initial))
        update.write_bytes(tensors.encode({name: np.full_like(v, 0.001) for name, v in initial.items()}))
        names = f"{load.names[0]}..{load.names[-1]}"
        address = (str(deployment.url), deployment.topology.federation, names, str(update))
        feeders = deployment.start(Process("feeders", address, deployment, program=FEEDERS))
        leader = deployment.aggregator(load.run, "--set", f"run.initial={model}", "--http", "")
        result = leader.result(LONGEST_S)
        assert feeders.exit_code() == 0
        assert result["updates"]["accepted"] == ROUNDS * participants
        return float(result["aggregator_peak_rss_mb"]) * (1 << 20) / 1e6


def worker_peak_mb(node: Node, mb: int) -> float:
    """Of one worker with a process of its own."""
    load = replace(load_of(mb, 1), warm_up=1, rounds=1)
    return run_fluffle(node, key_of(mb, 1), load).peak_mb["workers"]


def measure(models_mb: tuple[int, ...] = MODELS_MB) -> dict[str, object]:
    cases = [(mb, count) for mb in (0, *models_mb) for count in PARTICIPANTS]
    workers = [(mb, 1) for mb in (0, WORKER_MB)]
    with rabbit(**{key_of(*case): load_of(*case) for case in (*cases, *workers)}) as node:
        peaks = {case: aggregator_peak_mb(node, *case) for case in cases}
        idle_worker, worker = (worker_peak_mb(node, mb) for mb, _ in workers)
    lines: list[Line] = []
    for mb in models_mb:
        above = {count: peaks[mb, count] - peaks[0, count] for count in PARTICIPANTS}
        for count in PARTICIPANTS:
            what = f"aggregator above idle, {mb} MB, {count} participants"
            lines.append(line("W6", what, "MB", above[count], float(mb), most=MODELS_HELD * mb + FIXED_MB))
        few, many = (above[count] for count in PARTICIPANTS)
        what = f"aggregator above idle, {mb} MB, 12 participants against 4"
        lines.append(line("W6", what, "MB", many, few, most_ratio=MOST_UNEQUAL))
    beyond = worker - idle_worker - WORKER_MB
    lines.append(line("W6", f"worker beyond its training, {WORKER_MB} MB", "MB", beyond, WORKER_MB, most_ratio=2.0))
    details = {f"{mb} MB, {count} participants": round(peak, 1) for (mb, count), peak in peaks.items()}
    details |= {"a worker": round(worker, 1), "an idle worker": round(idle_worker, 1)}
    return report("memory", lines, {"peak_mb": details}) | {"table": table(lines)}


@click.command()
@click.option("--mb", "models_mb", multiple=True, type=int, default=MODELS_MB, help="Sizes of models in MB.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "memory.json")
def main(models_mb: tuple[int, ...], out: Path) -> None:
    """Measures, prints a table, and writes everything as JSON."""
    found = measure(models_mb)
    click.echo(found.pop("table"))
    write(found, out)


if __name__ == "__main__":
    main()
