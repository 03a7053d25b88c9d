"""`python -m tests.fuzzing`: fuzzes targets, each in a process of its own, and writes down what came of it."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from tests.fuzzing.engine import HANG_S, MEASURED, TRACED
from tests.fuzzing.targets import ADDRESS_SPACE_BYTES, TARGETS, fuzz_alone

PACKAGES = ("fluffle", "msgpack", "numpy", "pydantic")


@click.command()
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Default: all.")
@click.option("--inputs", default=20_000, show_default=True, help="For each target.")
@click.option("--seconds", default=3600.0, show_default=True, help="At most, for each target.")
@click.option("--seed", default=1, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Targets at a time.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to add what was found, as JSON.")
def main(targets: tuple[str, ...], inputs: int, seconds: float, seed: int, jobs: int, out: Path | None) -> None:
    """Feeds each TARGET with changed inputs. Ends with 1 if one did more than be understood or refused."""
    began = time.monotonic()
    found = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = [pool.submit(fuzz_alone, name, inputs, seconds, seed) for name in targets or TARGETS]
        for task in as_completed(tasks):
            found.append(task.result())
            _tell(found[-1])
    if out:
        out.write_text(json.dumps(report(found, time.monotonic() - began, out), indent=2) + "\n")
    failures = sum(len(findings["failures"]) for findings in found)
    total = sum(findings["inputs"] for findings in found)
    click.echo(f"{total} inputs, {len(found)} targets, {failures} defects, {time.monotonic() - began:.0f} s")
    sys.exit(1 if failures else 0)


def _tell(found: dict[str, Any]) -> None:
    click.echo(
        f"{found['target']:18} {found['inputs']:8} inputs {found['understood']:7} understood "
        f"{found['edges']:5} edges (+{found['new_edges']}) {found['seconds']:6.1f} s, slowest "
        f"{found['slowest_s']:.3f} s, most {found['largest_allocation_bytes'] >> 10} KiB"
    )
    for failure in found["failures"]:
        click.echo(f"  DEFECT x{failure['times']}: {failure['error'][:160]}\n    {failure['where']}")


def report(found: Iterable[dict[str, Any]], wall_s: float, out: Path) -> dict[str, Any]:
    """This session with what other sessions left in the file, by command."""
    sessions = json.loads(out.read_text())["sessions"] if out.exists() else []
    rows = sorted(found, key=lambda row: list(TARGETS).index(row["target"]))
    session = {
        "command": " ".join(["python -m tests.fuzzing", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "inputs": sum(row["inputs"] for row in rows),
        "defects": sum(len(row["failures"]) for row in rows),
        "wall_seconds": round(wall_s, 1),
        "targets": rows,
    }
    sessions.append(session)
    limits = {
        "hang_cpu_seconds": HANG_S, "address_space_bytes": ADDRESS_SPACE_BYTES,
        "traced_every": TRACED, "memory_measured_every": MEASURED,
    }  # fmt: skip
    return {"inputs": sum(each["inputs"] for each in sessions), "limits": limits, "sessions": sessions}


if __name__ == "__main__":
    main()
