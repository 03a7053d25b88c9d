"""W3: what a run costs that really trains, from the command to its end.

    python -m benchmarks.training

`fluffle simulate digits` with ten participants, SGD 0.1, batches of 32, one epoch and 20 rounds, against the same
steps in one plain loop (`benchmarks/plain_digits.py`): as one would write it, with scikit-learn's copy of the data,
and once more with the file that we ship. Whole processes, with all that they import; three of each, in turns, of
which the quickest counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import command, line, report, table
from fluffle.chaos.processes import ROOT
from workers.data import SHIPPED

TIMES, MOST_RATIO = 3, 1.5
PLAIN = (sys.executable, "-m", "benchmarks.plain_digits")
LEAN = (*PLAIN, str(SHIPPED / "digits.csv.gz"))
FLUFFLE = (
    sys.executable, "-m", "fluffle", "simulate", "digits", "--participants", "10", "--rounds", "20",
    "--set", "train.lr=0.1", "--set", "train.batch_size=32", "--set", "train.local_epochs=1",
    "--run-dir", "run", "--json", "result.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process, from its start to its exit."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    accuracy: float


def cost_of(command: tuple[str, ...]) -> Cost:
    with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as directory:
        return cost_in(Path(directory), command)


def cost_in(directory: Path, command: tuple[str, ...]) -> Cost:
    """Of that command there; its metrics are in `result.json`, or are what it prints."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s, process.returncode = time.monotonic() - began, os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    result = directory / "result.json"
    accuracy = json.loads(result.read_text())["metrics"] if result.exists() else json.loads(said)
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(wall_s, cpu_s, usage.ru_maxrss * 1024 / 1e6, accuracy["accuracy"])


def measure() -> dict[str, object]:
    costs = [(cost_of(FLUFFLE), cost_of(PLAIN), cost_of(LEAN)) for _ in range(TIMES)]
    ours, plain, lean = ([three[which] for three in costs] for which in range(3))
    wall_s, plain_wall_s, lean_wall_s = (min(one.wall_s for one in many) for many in (ours, plain, lean))
    cpu_s, plain_cpu_s = (min(one.cpu_s for one in many) for many in (ours, plain))
    peak, plain_peak = (max(one.peak_mb for one in many) for many in (ours, plain))
    lines = [
        line("W3", "whole process", "s", wall_s, plain_wall_s, most_ratio=MOST_RATIO),
        line("W3", "whole process, against a loop that reads our file", "s", wall_s, lean_wall_s),
        line("W3", "whole process", "CPU s", cpu_s, plain_cpu_s),
        line("W3", "whole process", "MB at most", peak, plain_peak),
    ]
    details = {"fluffle": [asdict(one) for one in ours], "plain": [asdict(one) for one in plain]}
    details["lean"] = [asdict(one) for one in lean]
    return report("training", lines, details) | {"table": table(lines)}


main = command("training", measure)

if __name__ == "__main__":
    main()
