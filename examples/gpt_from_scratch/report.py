"""The table and the curves of this example, from what the sweep left behind.

python -m examples.gpt_from_scratch.report examples/gpt_from_scratch/results.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from fluffle.curve import save_curve
from fluffle.pictures import new_figure

HERE = Path(__file__).parent
PARTICIPANTS, STEPS = 8, 600


class Run:
    """One cell of the sweep. `exchanged`: the bytes that a participant sends each time."""

    def __init__(self, cell: dict[str, Any]) -> None:
        result = cell["result"]
        self.name: str = cell["place"]["how"]
        self.loss: float = result["metrics"]["loss"]
        self.rounds: int = result["rounds"]
        self.exchanges = self.rounds if "bytes" in result else STEPS  # pooled training stands for one a step
        self.exchanged = result["bytes"]["up"] / self.rounds / PARTICIPANTS if "bytes" in result else 0.0
        self.curve = [
            (row["round"] / self.rounds, row["metrics"]["loss"]) for row in result["history"] if row["metrics"]
        ]


def runs_of(path: Path) -> list[Run]:
    """All runs. Pooled training sends nothing; the bytes told are those of a whole update in float32 each step."""
    runs = [Run(cell) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    whole = max(run.exchanged for run in runs)
    for run in runs:
        run.exchanged = run.exchanged or whole
    return runs


def table(runs: list[Run]) -> str:
    """In Markdown; each loss beside that of the first run."""
    rows = [
        "| | loss | against synchronous | exchanges | kB each | MB in all | times fewer bytes |",
        "| --- " * 7 + "|",
    ]
    synchronous = runs[0]
    for run in runs:
        sent = run.exchanges * run.exchanged
        fewer = synchronous.exchanges * synchronous.exchanged / sent
        more = 100 * (run.loss / synchronous.loss - 1)
        rows.append(
            f"| {run.name} | {run.loss:.4f} | {more:+.2f} % | {run.exchanges} | {run.exchanged / 1e3:.1f} "
            f"| {sent / 1e6:.2f} | {fewer:.0f} |"
        )
    return "\n".join(rows)


def draw(runs: list[Run], path: Path) -> None:
    """Loss on held-out text by inner steps, and by the bytes that one participant sent."""
    figure = new_figure(10, 4.5)
    by_steps, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        done, losses = zip(*run.curve, strict=True)
        by_steps.plot([part * STEPS for part in done], losses, label=run.name)
        by_bytes.plot([part * run.exchanges * run.exchanged / 1e6 for part in done], losses)
    by_steps.set(xlabel="inner steps of each participant", ylabel="loss on held-out text")
    by_bytes.set(xlabel="MB sent by each participant", xscale="log")
    for axes in (by_steps, by_bytes):
        axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_curve(figure, path)


if __name__ == "__main__":
    found = runs_of(Path(sys.argv[1]))
    print(table(found))
    draw(found, HERE / "curve.png")
