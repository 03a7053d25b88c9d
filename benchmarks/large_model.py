"""A model of 1 GB goes round, between three participants and over a RabbitMQ of their own.

    python -m benchmarks.large_model
    python -m benchmarks.large_model --mb 100 --rounds 5 --out /tmp/small.json

250 million random float32 in ten tensors; every participant is a process and changes every value, nothing is
trained. It is checked that the model comes out with the bits that the same sums give in one process. What counts is
the most memory that each process held, above that of one which does the same with a model of 1 KB. Not part of
`make bench`: it takes some minutes and 12 GB of memory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.fleet import Load, Measured, rabbit, run_fluffle
from benchmarks.measure import BYTES_PER_MB, RESULTS, Line, line, report, table, write
from benchmarks.memory import FIXED_MB
from benchmarks.payload import run_checked
from benchmarks.tasks import SHIFT

PARTICIPANTS = 3


def load_of(mb: int, rounds: int) -> Load:
    floats = mb * BYTES_PER_MB // 4
    return Load(PARTICIPANTS, floats, tensors=10, rounds=rounds - 1, processes=PARTICIPANTS, task=SHIFT)


def lines_of(mb: int, ours: Measured, idle: Measured) -> list[Line]:
    above = {who: peak - idle.peak_mb[who] for who, peak in ours.peak_mb.items()}
    what = f"{mb} MB, {PARTICIPANTS} participants"
    return [
        line("1 GB", what, "s/round", ours.seconds),
        line("1 GB", what, "CPU s/round", ours.cpu_s),
        line("1 GB", f"aggregator above idle, {what}", "MB", above["aggregator"], mb, most=3 * mb + FIXED_MB),
        line("1 GB", f"a worker beyond its training, {what}", "MB", above["workers"] - mb, mb, most_ratio=2.0),
        line("1 GB", f"RabbitMQ, {what}", "MB at most", ours.peak_mb["rabbitmq"]),
    ]


def measure(mb: int, rounds: int) -> dict[str, object]:
    load = load_of(mb, rounds)
    small = replace(load, floats=256)
    with rabbit(idle=small, large=load) as node:
        idle = run_fluffle(node, "idle", small)
        ours = run_checked(node, "large", load)
    lines = lines_of(mb, ours, idle)
    details = {"model": ours.details, "idle": idle.details, "model_sha256": ours.result["model_sha256"]}
    return report("large_model", lines, details) | {"table": table(lines)}


@click.command()
@click.option("--mb", default=1000, show_default=True, help="Size of the model in MB.")
@click.option("--rounds", default=2, show_default=True, help="At least two: the first warms up.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "large_model.json")
def main(mb: int, rounds: int, out: Path) -> None:
    """Measures, prints a table, and writes everything as JSON."""
    found = measure(mb, rounds)
    click.echo(found.pop("table"))
    write(found, out)


if __name__ == "__main__":
    main()
