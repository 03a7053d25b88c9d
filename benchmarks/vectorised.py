"""What a simulation of 100 participants saves that trains them side by side, and what comes out.

    python -m benchmarks.vectorised

`fluffle simulate --vectorise` against the same run one by one: whole processes, with all that they import, in
turns. Three models: a small one with two layers (`digits`: steps of 8 examples, three epochs), softmax regression
(`mnist-logreg`: 32, two epochs) and the 2NN (`mnist-2nn`: 10, one epoch).
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.measure import Line, command, line, report, table
from benchmarks.training import Cost, cost_in
from broker.tensors import Arrays, decode

PARTICIPANTS = 100
FAR = 1e-4  # between two models' parameters; a step moves them by a hundredth and more


@dataclass(frozen=True, slots=True)
class Case:
    """A shipped task and so many rounds; the CPU seconds that should remain, of those one by one."""

    task: str
    rounds: int
    most_ratio: float


@dataclass(frozen=True, slots=True)
class Run:
    """What the whole process cost, the seconds of the run itself, and its model."""

    cost: Cost
    run_s: float
    arrays: Arrays


CASES = (Case("digits", 20, 0.6), Case("mnist-logreg", 8, 0.8), Case("mnist-2nn", 3, 1.0))


def simulate(case: Case, switch: str) -> Run:
    command = (
        sys.executable, "-m", "fluffle", "simulate", case.task, "--participants", str(PARTICIPANTS),
        "--rounds", str(case.rounds), switch, "--run-dir", "run", "--json", "result.json",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as directory:
        cost = cost_in(Path(directory), command)
        told = json.loads(Path(directory, "result.json").read_text())
        return Run(cost, told["wall_s"], decode(Path(directory, "run", "model.safetensors").read_bytes()))


def compared(case: Case, apart: Run, beside: Run) -> list[Line]:
    """The run side by side, with the one one by one as its reference."""
    one, other, name = apart.cost, beside.cost, f"{case.task}, {case.rounds} rounds"
    far = max(float(np.abs(beside.arrays[key] - array).max()) for key, array in apart.arrays.items())
    return [
        line("vectorised", name, "CPU s", other.cpu_s, one.cpu_s, most_ratio=case.most_ratio),
        line("vectorised", name, "s without start-up", beside.run_s, apart.run_s),
        line("vectorised", name, "MB at most", other.peak_mb, one.peak_mb),
        line("vectorised", name, "accuracy", other.accuracy, one.accuracy),
        line("vectorised", name, "largest difference", far, most=FAR),
    ]


def measure() -> dict[str, object]:
    lines: list[Line] = []
    details = {}
    for case in CASES:
        apart, beside = (simulate(case, switch) for switch in ("--no-vectorise", "--vectorise"))
        lines += compared(case, apart, beside)
        details[case.task] = {
            way: asdict(run.cost) | {"run_s": run.run_s}
            for way, run in (("one by one", apart), ("side by side", beside))
        }
    return report("vectorised", lines, details) | {"table": table(lines)}


main = command("vectorised", measure)

if __name__ == "__main__":
    main()
