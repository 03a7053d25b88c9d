"""Seconds waited against updates lost, for fixed and for learned deadlines. `python -m benchmarks.auto_deadline`.

Simulated with the code that sets real deadlines (`aggregator/pace.py`), without a broker: 20 participants whose
usual speeds differ, each a little faster or slower every time; one in ten does not answer at all. After 100 of 200
rounds everybody takes three times as long. A round waits for all 20, until its deadline; below the quorum of 8 it
goes on waiting for the quorum. Writes `benchmarks/results/auto_deadline.json` and `docs/auto-deadline.png`.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from aggregator.pace import allowed_s, grown
from aggregator.settings import RoundSettings

ROOT = Path(__file__).parents[1]
PARTICIPANTS, QUORUM, ROUNDS, SLOWER_FROM = 20, 8, 200, 100
USUAL_S = 10.0
FIXED_S = (10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0)
SPREADS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Outcome:
    """Means over all rounds. `lost` is the share of those updates that were under way and came too late."""

    deadline: str
    value: float
    waited_s: float
    lost: float


def arrivals(seed: int = 7) -> np.ndarray:
    """Seconds that each participant takes in each round, (rounds, participants); infinity if it never answers."""
    rng = np.random.default_rng(seed)
    usual = USUAL_S * rng.lognormal(0.0, 0.5, PARTICIPANTS)
    took = usual * rng.lognormal(0.0, 0.2, (ROUNDS, PARTICIPANTS))
    took[SLOWER_FROM:] *= 3
    took[rng.random(took.shape) < 0.1] = np.inf
    return took


def outcome(settings: RoundSettings, took: np.ndarray, name: str, value: float) -> Outcome:
    pace: tuple[float, ...] = ()
    waited, lost = [], []
    for row in took:
        closed = min(max(allowed_s(pace, settings), float(np.sort(row)[QUORUM - 1])), float(row.max()))
        on_time = row[row <= closed]
        pace = grown(pace, map(float, on_time), len(row) - len(on_time), closed)
        waited.append(closed)
        lost.append(1 - len(on_time) / np.isfinite(row).sum())
    return Outcome(name, value, round(float(np.mean(waited)), 2), round(float(np.mean(lost)), 4))


def outcomes() -> list[Outcome]:
    took = arrivals()
    fixed = [outcome(RoundSettings(deadline_s=s), took, "fixed", s) for s in FIXED_S]
    auto = RoundSettings(deadline="auto", deadline_s=60.0)
    learned = [outcome(auto.model_copy(update={"deadline_spreads": k}), took, "auto", k) for k in SPREADS]
    return fixed + learned


def draw(found: Sequence[Outcome], path: Path) -> None:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, mark, label, offset in (("fixed", "s--", "{:g} s", (5, 4)), ("auto", "o-", "k = {:g}", (-18, -12))):
        points = [one for one in found if one.deadline == name]
        axes.plot([p.waited_s for p in points], [100 * p.lost for p in points], mark, label=name)
        for point in points:
            at = (point.waited_s, 100 * point.lost)
            axes.annotate(label.format(point.value), at, offset, textcoords="offset points", size=7)
    axes.set_xlabel("seconds waited in a round, mean")
    axes.set_ylabel("updates lost, %")
    axes.set_ylim(bottom=-5)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    found = outcomes()
    report = {
        "command": "python -m benchmarks.auto_deadline",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "matplotlib": mpl.__version__},
        "outcomes": [asdict(one) for one in found],
    }
    (ROOT / "benchmarks" / "results" / "auto_deadline.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(found, ROOT / "docs" / "auto-deadline.png")
    for one in found:
        print(f"{one.deadline:5} {one.value:5g}  {one.waited_s:6.1f} s  {100 * one.lost:5.1f} % lost")


if __name__ == "__main__":
    sys.exit(main())
