"""What every benchmark shares: processor seconds and memory of processes, versions, and where results go.

Processor seconds are what a noisy machine does not change much; wall time is what it does. So every number stands
beside a reference that ran in between, and it is the ratio that counts.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from yarl import URL

from broker.definitions import Document
from fluffle.chaos.node import PROGRAMS, Node
from tests.rabbit_node import Rabbit, node_definitions

BYTES_PER_MB = 1_000_000
RESULTS = Path(__file__).parent / "results"
ANONYMOUS_EVERY_S = 0.1
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Groups = Mapping[str, Iterable[int]]  # what the processes of these ids are called together


# -- processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stat:
    """What Linux says of one process. The seconds are its own and those of its children that ended."""

    parent: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: the wall clock, and the processor seconds of each group until then."""

    at: float
    cpu_s: Mapping[str, float]


def mark(groups: Groups) -> Mark:
    """Processor seconds until now, with all that these processes started."""
    stats = _stats()
    return Mark(
        time.monotonic(), {name: sum(_tree_cpu_s(pid, stats) for pid in pids) for name, pids in groups.items()}
    )


def between(first: Mark, last: Mark, rounds: int) -> dict[str, Any]:
    """Seconds and processor seconds of a round."""
    spent = {name: (last.cpu_s[name] - first.cpu_s[name]) / rounds for name in last.cpu_s}
    return {
        "seconds_per_round": round((last.at - first.at) / rounds, 5),
        "cpu_s_per_round": round(sum(spent.values()), 5),
        "cpu_s_per_round_of": {name: round(seconds, 5) for name, seconds in spent.items()},
    }


def peak_mb(*roots: int) -> float:
    """The most memory that any of these processes, or of those that they started, ever held, in MB."""
    stats = _stats()
    pids = [pid for root in roots for pid in _tree(root, stats)]
    return max((_kilobytes(pid, "VmHWM") / 1000 for pid in pids), default=0.0)


@contextmanager
def anonymous_mb(groups: Groups) -> Iterator[dict[str, float]]:
    """The most memory that is no file's, of any one process of each group, in MB: as seen now and then while the
    block runs."""
    found, over = dict.fromkeys(groups, 0.0), threading.Event()

    def watch() -> None:
        while not over.wait(ANONYMOUS_EVERY_S):
            for name, pids in groups.items():
                found[name] = max([found[name], *(_kilobytes(pid, "RssAnon") / 1000 for pid in pids)])

    watcher = threading.Thread(target=watch, name="anonymous memory")
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def forget_peaks(*roots: int) -> None:
    """From now on the most memory is what these processes hold now."""
    stats = _stats()
    for pid in (pid for root in roots for pid in _tree(root, stats)):
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def node_pids(node: Node) -> list[int]:
    """The processes that a private RabbitMQ consists of; what they started belongs to them."""
    return [process.pid for process in node.running]


def _tree_cpu_s(root: int, stats: Mapping[int, Stat]) -> float:
    return sum(stats[pid].cpu_s for pid in _tree(root, stats))


def _tree(root: int, stats: Mapping[int, Stat]) -> list[int]:
    children = [pid for pid, stat in stats.items() if stat.parent == root]
    own = [root] if root in stats else []
    return own + [pid for child in children for pid in _tree(child, stats)]


def _stats() -> dict[int, Stat]:
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            ticks = sum(map(int, fields[11:15]))  # user, system; the same of children that were waited for
            found[int(directory.name)] = Stat(int(fields[1]), ticks * TICK_S)
    return found


def _kilobytes(pid: int, field: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 // 1000
    return 0


# -- a RabbitMQ -----------------------------------------------------------------------------------------------


@contextmanager
def private_node(definitions: Document) -> Iterator[Node]:
    """A RabbitMQ of its own, started and ended with the block."""
    node = Node.create(Path(tempfile.mkdtemp(prefix="fluffle-rabbit-")), definitions)
    try:
        node.start()
        yield node
    finally:
        node.end()


@contextmanager
def private_rabbit() -> Iterator[Rabbit]:
    """One with the users and federations of the tests."""
    with private_node(node_definitions()) as node:
        yield Rabbit(URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/"), node)


# -- results --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One number of a benchmark beside its reference. `aim` is in words; `met` says whether it was reached."""

    benchmark: str
    what: str
    unit: str
    value: float
    reference: float | None = None
    ratio: float | None = None  # value / reference
    aim: str = ""
    met: bool | None = None


def rounded(value: float) -> float:
    """Three digits are more than these numbers hold."""
    return float(f"{value:.3g}")


def line(benchmark: str, what: str, unit: str, value: float, reference: float | None = None, **aim: float) -> Line:
    """A line, compared with its aim: `most` or `least` of the value, `most_ratio` or `least_ratio` of the ratio."""
    ratio = value / reference if reference else None
    ((name, limit),) = aim.items() or (("", 0.0),)
    compared = ratio if name.endswith("_ratio") else value
    met = (
        None
        if not name or compared is None
        else compared <= limit
        if name.startswith("most")
        else compared >= limit
    )
    words = f"{'at most' if name.startswith('most') else 'at least'} {limit:g}" if name else ""
    words += " times the reference" if name.endswith("_ratio") else f" {unit}" if name and unit else ""
    shown = (rounded(value), None if reference is None else rounded(reference), ratio and rounded(ratio))
    return Line(benchmark, what, unit, *shown, words, met)


def table(lines: Sequence[Line]) -> str:
    """The lines for people, as a table of Markdown."""
    rows = [
        (
            one.benchmark, one.what, f"{one.value:g} {one.unit}",
            "" if one.reference is None else f"{one.reference:g} {one.unit}",
            "" if one.ratio is None else f"{one.ratio:g}", one.aim, {None: "", True: "yes", False: "no"}[one.met],
        )
        for one in lines
    ]  # fmt: skip
    head = ("", "What", "Measured", "Reference", "Ratio", "Aim", "Met")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def about(module: str) -> dict[str, Any]:
    """What a number means nothing without."""
    rabbit = next((path.name for path in PROGRAMS.parent.glob("lib/rabbitmq_server-*")), "")
    packages = ("fluffle", "numpy", "pydantic", "aio-pika", "aiormq", "torch")
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *_without_out(sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(), **{package: version(package) for package in packages},
            "rabbitmq": rabbit.removeprefix("rabbitmq_server-"),
        },
        "processor": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def _without_out(arguments: Sequence[str]) -> Iterator[str]:
    """Where results go changes no number, and is nobody's business."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "--out" not in (before, argument):
            yield argument


def report(module: str, lines: Sequence[Line], details: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that one benchmark found, as it is written."""
    return about(module) | {"lines": [asdict(one) for one in lines], "details": dict(details)}


def write(found: Mapping[str, Any], out: Path) -> None:
    out.write_text(json.dumps(found, indent=2) + "\n")


def command(name: str, measure: Callable[[], dict[str, Any]]) -> click.Command:
    """What runs a benchmark that takes no settings. `measure`: its report, and beside it its `table`."""

    @click.command(help="Measures, prints a table, and writes everything as JSON.")
    @click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / f"{name}.json")
    def run(out: Path) -> None:
        found = measure()
        click.echo(found.pop("table"))
        write(found, out)

    return run
