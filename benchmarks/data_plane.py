"""W2 again: what the bodies of a large model cost through RabbitMQ, and through a claim-check store beside it.

    python -m benchmarks.data_plane
    python -m benchmarks.data_plane --mb 10 --rounds 2 --way folder --out /tmp/small.json

Four participants, random float32 in ten tensors, every participant changes every value, nothing is trained; each
participant and the aggregator are processes of their own. Counted are the processor seconds of all processes, of
the broker and of what serves the store, too. It is checked that the model has the bits that the same sums
give in one process. Reference: the same through RabbitMQ.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import click

from benchmarks.fleet import Beside, rabbit
from benchmarks.measure import RESULTS, line, report, table, write
from benchmarks.payload import load_of, run_checked
from tests.seaweed import BUCKET, Seaweed

MOST_CPU_RATIO = 0.5


@contextmanager
def folder() -> Iterator[Beside]:
    with tempfile.TemporaryDirectory(prefix="fluffle-store-") as share:
        yield Beside(share, share)


@contextmanager
def seaweedfs() -> Iterator[Beside]:
    seaweed = Seaweed.create(Path(tempfile.mkdtemp(prefix="fluffle-seaweed-")))
    try:
        seaweed.start()
        assert seaweed.process is not None
        url, pids = f"s3://{BUCKET}", {"seaweedfs": [seaweed.process.pid]}
        yield Beside(url, url, seaweed.environment("aggregator"), pids)
    finally:
        seaweed.end()


@contextmanager
def http() -> Iterator[Beside]:
    """Workers go through a web server, the aggregator into the folder behind it."""
    with tempfile.TemporaryDirectory(prefix="fluffle-store-") as share:
        line = [sys.executable, "-m", "tests.web", share]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                yield Beside(share, server.stdout.readline().strip(), pids={"web server": [server.pid]})
            finally:
                server.kill()


WAYS: dict[str, Callable[[], AbstractContextManager[Beside]]] = {"folder": folder, "s3": seaweedfs, "http": http}


def measure(mb: int, rounds: int, ways: tuple[str, ...]) -> dict[str, object]:
    load = load_of(mb, rounds)
    with rabbit(broker=load, **dict.fromkeys(ways, load)) as node:
        through = {"broker": run_checked(node, "broker", load)}
        for name in ways:
            with WAYS[name]() as beside:
                through[name] = run_checked(node, name, load, beside=beside)
    reference, lines = through["broker"], []
    for name in ways:
        what, aim = f"{mb} MB through {name}", {"most_ratio": MOST_CPU_RATIO} if name == "folder" else {}
        lines += [
            line("W2", what, "CPU s/round", through[name].cpu_s, reference.cpu_s, **aim),
            line("W2", what, "s/round", through[name].seconds, reference.seconds),
        ]
    details = {name: measured.details for name, measured in through.items()}
    return report("data_plane", lines, details) | {"table": table(lines)}


@click.command()
@click.option("--mb", default=100, show_default=True, help="Size of the model in MB.")
@click.option("--rounds", default=5, show_default=True, help="Rounds after the first, which warms up.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), default=list(WAYS), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "data_plane.json")
def main(mb: int, rounds: int, ways: tuple[str, ...], out: Path) -> None:
    """Measures, prints a table, and writes everything as JSON."""
    found = measure(mb, rounds, ways)
    click.echo(found.pop("table"))
    write(found, out)


if __name__ == "__main__":
    main()
