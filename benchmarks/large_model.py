"""A model of 1 GB, or of 4 GB, goes round between three participants and over a RabbitMQ of their own.

    python -m benchmarks.large_model
    python -m benchmarks.large_model --mb 4000 --rounds 1 --processes 1 --out /tmp/large.json

Random float32 in the shapes of a transformer: 4 GB are a billion parameters. Every participant changes every value,
nothing is trained. It is checked that the model comes out with the bits that the same sums give in one process.
What counts is the most memory that each process held, above that of one which does the same with a model of 1 KB;
and what a byte costs, beside a model of 100 MB in the same run. `--processes 1`: the participants share a process,
and train one after the other. Not part of `make bench`: 4 GB need some 13 GB of memory and 60 GB of disk.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from aggregator.judge import weight_of
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from benchmarks.fleet import Load, Measured, rabbit, run_fluffle
from benchmarks.measure import BYTES_PER_MB, RESULTS, Line, line, report, table, write
from benchmarks.memory import FIXED_MB, MODELS_HELD
from benchmarks.tasks import SHIFT, Shift, random_values, shifted, transformer
from broker.payloads import sha256_of
from fluffle.chaos.node import Node

PARTICIPANTS, REFERENCE_MB, REFERENCE_ROUNDS = 3, 100, 3
LONGEST_S = 1800.0
MOST_CPU_RATIO = 1.25


def load_of(mb: int, rounds: int, processes: int = PARTICIPANTS) -> Load:
    """The first of several rounds warms up."""
    shapes, warm_up = transformer(mb * BYTES_PER_MB // 4), min(1, rounds - 1)
    return Load(
        PARTICIPANTS, 0, rounds=rounds - warm_up, warm_up=warm_up, processes=processes, task=SHIFT, shapes=shapes,
        longest_s=LONGEST_S,
    )  # fmt: skip


def mb_of(load: Load) -> float:
    return sum(4.0 * math.prod(shape) for shape in load.shapes.values()) / BYTES_PER_MB


def expected(load: Load) -> str:
    """The digest that the same updates give in this process, one tensor after the other."""
    steps = {name: Shift(name, "").step for name in load.names}

    def write(number: int, out: NDArray[np.float32]) -> None:
        random_values(number, out)
        strategy = make_strategy(load.run.strategy, load.run.round)
        for _ in range(load.run.stop.rounds):
            strategy.start({"": out}, {})
            for name, step in steps.items():
                delta = shifted(out, step)
                delta -= out
                strategy.add({"": delta}, Contribution(weight_of(Shift.num_examples, load.run.round), name))
            strategy.finish({"": out})

    with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as directory:
        return sha256_of(load.encoded(write, Path(directory)))


def run_checked(node: Node, federation: str, load: Load) -> Measured:
    """Raises AssertionError if the model is not the expected one."""
    ours = run_fluffle(node, federation, load)
    assert ours.result["model_sha256"] == expected(load), "the model is not the one that these updates give"
    return ours


def lines_of(load: Load, ours: Measured, idle: Measured, small: Measured) -> list[Line]:
    mb, small_mb, name = mb_of(load), mb_of(load_of(REFERENCE_MB, 1)), f"{round(mb_of(load) / 1000, 1):g} GB"
    above = {who: peak - idle.peak_mb[who] for who, peak in ours.peak_mb.items()}
    bound = MODELS_HELD * mb + FIXED_MB
    what = f"{round(mb)} MB, {PARTICIPANTS} participants"
    beside, most = f"{what}, beside {round(small_mb)} MB", round(bound)
    return [
        line(name, what, "s/round", ours.seconds),
        line(name, what, "CPU s/round", ours.cpu_s),
        line(name, beside, "s/GB", ours.seconds / mb * 1000, small.seconds / small_mb * 1000),
        line(
            name, beside, "CPU s/GB", ours.cpu_s / mb * 1000, small.cpu_s / small_mb * 1000,
            most_ratio=MOST_CPU_RATIO,
        ),
        line(name, f"aggregator above idle, {what}", "MB", above["aggregator"], mb, most=most),
        line(name, f"aggregator, anonymous, {what}", "MB", ours.anonymous_mb["aggregator"], mb),
        line(name, f"a worker beyond its training, {what}", "MB", above["workers"] - mb, mb, most=FIXED_MB),
        line(name, f"RabbitMQ, {what}", "MB at most", ours.peak_mb["rabbitmq"]),
    ]  # fmt: skip


def measure(mb: int, rounds: int, processes: int = PARTICIPANTS) -> dict[str, object]:
    load, reference = load_of(mb, rounds, processes), load_of(REFERENCE_MB, REFERENCE_ROUNDS, processes)
    tiny = replace(reference, shapes={}, floats=256)
    with rabbit(idle=tiny, reference=reference, large=load) as node:
        idle = run_fluffle(node, "idle", tiny)
        small = run_checked(node, "reference", reference)
        ours = run_checked(node, "large", load)
    lines = lines_of(load, ours, idle, small)
    details = {"model": ours.details, "reference": small.details, "idle": idle.details}
    details |= {"model_sha256": ours.result["model_sha256"], "model_mb": mb_of(load)}
    details |= {"bytes": ours.result["bytes"]}
    return report("large_model", lines, details) | {"table": table(lines)}


@click.command()
@click.option("--mb", default=1000, show_default=True, help="Size of the model in MB, about.")
@click.option("--rounds", default=2, show_default=True, help="If there are several, the first warms up.")
@click.option("--processes", default=PARTICIPANTS, show_default=True, help="That the participants share.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "large_model.json")
def main(mb: int, rounds: int, processes: int, out: Path) -> None:
    """Measures, prints a table, and writes everything as JSON."""
    found = measure(mb, rounds, processes)
    click.echo(found.pop("table"))
    write(found, out)


if __name__ == "__main__":
    main()
