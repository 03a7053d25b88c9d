"""W5: what codecs save, and what they cost in accuracy.

    python -m benchmarks.codecs --picture docs/codecs.png
    python -m benchmarks.codecs --task digits --partition dirichlet:0.5 --seeds 1 \
        --out benchmarks/results/codecs_digits.json

Real training in whole runs on the embedded broker, for every codec: MNIST (`mnist-2nn`, `mnist-logreg`) and digits,
with ten participants whose data is alike (`iid`) or skewed (`dirichlet:0.5`). Accuracy is the mean of the last five
rounds and of up to two seeds, on examples that nobody trains on. Bytes are those of each update's whole message,
of which the envelope is what is not its body. And how long a
model of 100 MB takes. The first command takes most of an hour, the second is a part of `make bench`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import RESULTS, Line, line, report, table, write
from broker.codecs import packing
from broker.errors import BadMessage
from broker.memory import MemoryBroker
from broker.messages import MAX_ITEMS, Chunk, UpdateReady
from broker.topology import AGGREGATOR, Topology
from broker.wire import decode, encode
from fluffle.config import from_values, load_config
from fluffle.display import LogDisplay
from fluffle.learning import task_defaults
from fluffle.logs import configure_logs
from fluffle.rundir import RunDir
from fluffle.simulation import plan_simulation, run_simulation

CODECS = (
    "none", "fp16+zstd", "bf16+zstd", "int8+zstd", "qsgd:127+zstd", "qsgd:7+zstd", "topk:0.01+zstd", "sign",
    "powersgd:4",
)  # fmt: skip
DOWN, LARGE_TASK = ("xor+zstd", "fp16+zstd", "int8+zstd"), "mnist-2nn"
PARTITIONS = ("iid", "dirichlet:0.5")
SEEDS = (1, 2)
SEEDS_OF = {"digits": 2, "mnist-logreg": 1, "mnist-2nn": 1}  # tasks, and how many seeds each
PARTICIPANTS, LAST = 10, 5
ROUNDS_OF = {"digits": 40, "mnist-logreg": 30, "mnist-2nn": 30}
MOST_LOST = {"fp16": 0.005, "bf16": 0.005, "int8": 0.005, "topk:0.01": 0.025}
LEAST_FEWER = {"topk:0.01": 35.0}
MOST_ENVELOPE = 300


@dataclass(frozen=True, slots=True)
class Run:
    """One run: mean accuracy of its last rounds, and bytes of an update. `rounds`: accuracy after each."""

    task: str
    partition: str
    codec: str
    seed: int
    accuracy: float
    update_bytes: float
    envelope_bytes: int
    rounds: tuple[float, ...]
    down: str = "none"
    model_bytes: int = 0
    difference_bytes: int = 0  # between the last two versions


@dataclass(frozen=True, slots=True)
class Point:
    """What a codec comes to on one task: means over the seeds, beside the runs of the same seeds without."""

    task: str
    partition: str
    codec: str
    accuracy: float
    lost: float
    update_bytes: float
    fewer: float  # times fewer bytes
    envelope_bytes: int  # at most


# -- one run ---------------------------------------------------------------------------------------------------


def run(task: str, partition: str, codec: str, seed: int, down: str = "none") -> Run:
    """In this process."""
    with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as directory:
        chosen = {
            "task": task,
            "data.partition": partition,
            "codec.up": codec,
            "codec.down": down,
            "run.seed": seed,
            "run.dir": f"{directory}/run",
            "stop.rounds": ROUNDS_OF[task],
            "round.participants": PARTICIPANTS,
            "round.deadline_s": 3600.0,
        }
        config = load_config(from_values(chosen), defaults=task_defaults)
        plan, directory_of_run = plan_simulation(config), RunDir(config.run_dir)
        directory_of_run.begin(config, resume=False)
        reports: list[float] = []
        display = LogDisplay()
        display.on_report = lambda report: reports.append(report.metrics["accuracy"])  # type: ignore[method-assign]
        record = run_simulation(plan, display).record
        assert isinstance(plan.broker, MemoryBroker)
        sizes = asyncio.run(_sizes(plan.broker, config.broker.federation))
    assert len(sizes) == ROUNDS_OF[task] * PARTICIPANTS
    accuracy = mean(reports[-LAST:])
    bytes_of_all = mean(size.envelope + size.chunk_headers + size.body for size in sizes)
    envelope = max(size.envelope for size in sizes)
    step = record.difference.body.size_bytes if record.difference else 0
    model = record.model.size_bytes if record.model else 0
    return Run(task, partition, codec, seed, accuracy, bytes_of_all, envelope, tuple(reports), down, model, step)


@dataclass(frozen=True, slots=True)
class Size:
    """Of one update, in bytes: its message without the body, the headers of the body's chunks, and the body."""

    envelope: int
    chunk_headers: int
    body: int


async def _sizes(broker: MemoryBroker, federation: str) -> list[Size]:
    """Of every update that was published."""
    reader = await broker.connect(AGGREGATOR, purpose="audit")
    inbox = await reader.read(Topology(federation).updates, offset="first")
    sizes = []
    while (delivery := await inbox.get(0)) is not None:
        try:
            message, payload = decode(delivery.body)
        except BadMessage:  # a barrier's neighbour: nothing of ours
            continue
        if isinstance(message, UpdateReady) and message.body:
            headers = message.body.chunks * chunk_header_bytes(message.body.sha256)
            sizes.append(Size(len(delivery.body) - len(payload), headers, message.body.size_bytes))
    return sizes


def chunk_header_bytes(sha256: str = "a" * 64) -> int:
    return len(encode(Chunk(of=sha256, index=MAX_ITEMS - 1)))


# -- how fast they are -----------------------------------------------------------------------------------------


def speeds() -> Iterator[Line]:
    """Seconds for a model of 25 million values, beside those of copying it three times; the quickest of three."""
    model = {"w": np.random.default_rng(1).normal(0, 0.01, (5000, 5000)).astype(np.float32)}
    copy_s = _quickest(lambda: [model["w"].copy() for _ in range(3)])
    for name in CODECS:
        codec, rng = packing(name), np.random.default_rng(1)
        body = codec.pack(model, {}, rng).body
        encode_s = _quickest(lambda codec=codec, rng=rng: codec.pack(model, {}, rng))
        decode_s = _quickest(lambda codec=codec, body=body: [*codec.unpack(body, model).values()])
        yield line("W5", f"encode 100 MB: {name}", "s", encode_s, copy_s)
        yield line("W5", f"decode 100 MB: {name}", "s", decode_s, copy_s)


def _quickest(work: Callable[[], object]) -> float:
    took = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


# -- all of them -----------------------------------------------------------------------------------------------


def points(runs: Sequence[Run]) -> Iterator[Point]:
    """Means over the seeds, beside `none` on the same task."""
    runs = [run for run in runs if run.down == "none"]
    for task, partition, codec in sorted({(run.task, run.partition, run.codec) for run in runs}):
        mine = [run for run in runs if (run.task, run.partition, run.codec) == (task, partition, codec)]
        plain = [run for run in runs if (run.task, run.partition, run.codec) == (task, partition, "none")]
        accuracy, update_bytes = mean(run.accuracy for run in mine), mean(run.update_bytes for run in mine)
        yield Point(
            task=task,
            partition=partition,
            codec=codec,
            accuracy=round(accuracy, 4),
            lost=round(mean(run.accuracy for run in plain) - accuracy, 4),
            update_bytes=round(update_bytes, 1),
            fewer=round(mean(run.update_bytes for run in plain) / update_bytes, 2),
            envelope_bytes=max(run.envelope_bytes for run in mine),
        )


def lines(found: Sequence[Point]) -> Iterator[Line]:
    """Each aim, on each task."""
    for point in found:
        base, where = point.codec.removesuffix("+zstd"), f"{point.codec}, {point.task} {point.partition}"
        if base in MOST_LOST:
            yield line("W5", f"accuracy lost: {where}", "", point.lost, most=MOST_LOST[base])
        if base in LEAST_FEWER:
            yield line("W5", f"times fewer bytes: {where}", "", point.fewer, least=LEAST_FEWER[base])
    envelope = max(point.envelope_bytes for point in found)
    yield line("W5", "update message without its body", "bytes", envelope, most=MOST_ENVELOPE)
    yield line("W5", "chunk message without its piece", "bytes", chunk_header_bytes())


def lines_down(runs: Sequence[Run]) -> Iterator[Line]:
    """Models as differences to the version before: how much of a whole one they are, and what that costs."""
    for run in (run for run in runs if run.down != "none"):
        whole = next(one for one in runs if (one.task, one.partition, one.codec, one.seed, one.down) == (
            run.task, run.partition, "none", run.seed, "none"))  # fmt: skip
        name = f"{run.down}, {run.task} {run.partition}"
        yield line("W5", f"difference, whole model: {name}", "bytes", run.difference_bytes, run.model_bytes)
        yield line("W5", f"accuracy lost: down {name}", "", round(whole.accuracy - run.accuracy, 4))


def draw(found: Sequence[Point], path: Path) -> None:
    tasks = sorted({point.task for point in found})
    figure = Figure(figsize=(9.6, 3.0 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(PARTITIONS), squeeze=False)
    for (row, task), (column, partition) in product(enumerate(tasks), enumerate(PARTITIONS)):
        axes = grid[row][column]
        for point in (p for p in found if (p.task, p.partition) == (task, partition)):
            axes.plot(point.update_bytes, point.accuracy, "o", color="C0")
            at = (point.update_bytes, point.accuracy)
            axes.annotate(point.codec, at, (3, 3), textcoords="offset points", size=6)
        axes.set_xscale("log")
        axes.set_title(f"{task}, {partition}", size=9)
        axes.set_xlabel("bytes of an update")
        axes.set_ylabel("accuracy")
    figure.savefig(path, dpi=110)


def page(found: Sequence[Point]) -> str:
    """The table of the documentation."""
    rows = [
        (f"`{p.codec}`", p.task, p.partition, f"{p.accuracy:.4f}", f"{p.lost:+.4f}", f"{p.update_bytes:,.0f}",
         f"{p.fewer:.1f}")
        for p in sorted(found, key=lambda p: (p.task, p.partition, CODECS.index(p.codec)))
    ]  # fmt: skip
    head = ("Codec", "Task", "Partition", "Accuracy", "Lost", "Bytes of an update", "Times fewer")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def planned(
    tasks: Sequence[str], partitions: Sequence[str], codecs: Sequence[str], most_seeds: int
) -> Iterator[tuple[str, str, str, int, str]]:
    for task, partition, codec in product(tasks, partitions, dict.fromkeys(("none", *codecs))):
        for seed in SEEDS[: min(SEEDS_OF[task], most_seeds)]:
            yield task, partition, codec, seed, "none"
    yield from ((LARGE_TASK, "iid", "none", SEEDS[0], down) for down in DOWN if LARGE_TASK in tasks)


@click.command()
@click.option("--task", "tasks", multiple=True, default=tuple(SEEDS_OF), help="Only these.")
@click.option("--partition", "partitions", multiple=True, default=PARTITIONS, help="Only these.")
@click.option("--codec", "codecs", multiple=True, default=CODECS, help="Only these, and none.")
@click.option("--seeds", "most_seeds", default=len(SEEDS), show_default=True, help="At most so many of each task.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Where to draw it.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "codecs.json")
def main(picture: Path | None, out: Path, **chosen: Any) -> None:
    """Measures, prints a table, and writes everything as JSON. What was measured already is kept beside it."""
    configure_logs("warning")
    done = out.with_suffix(".runs.jsonl")
    runs = [Run(**json.loads(row)) for row in done.read_text().splitlines()] if done.exists() else []
    known = {(run.task, run.partition, run.codec, run.seed, run.down) for run in runs}
    for which in planned(**chosen):
        if which not in known:
            runs.append(run(*which))
            with done.open("a") as file:
                file.write(json.dumps(asdict(runs[-1])) + "\n")
            click.echo(f"{which}: accuracy {runs[-1].accuracy:.4f}, {runs[-1].update_bytes:.0f} bytes", err=True)
    found = list(points(runs))
    if picture is not None:
        draw(found, picture)
    click.echo(page(found))
    told = [*lines(found), *lines_down(runs), *speeds()]
    click.echo(table(told))
    write(
        report("codecs", told, {"points": [asdict(p) for p in found], "runs": [asdict(r) for r in runs]}),
        out,
    )
    done.unlink()


if __name__ == "__main__":
    main()
