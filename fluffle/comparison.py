"""Results side by side: groups of runs that differ by their seed only, and what each group comes to.

`fluffle sweep` and `fluffle compare` share these tables; `fluffle/curve.py` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from aggregator.progress import LOWER_IS_BETTER, improves
from fluffle.results import Result, headline
from fluffle.sweep import Report
from fluffle.text import size_text

Row = tuple[str, ...]

COSTS: Mapping[str, Callable[[Result], float | None]] = {  # of a whole run; None where that kind of run has none
    "rounds": lambda result: result["rounds"],
    "updates": lambda result: result["updates"]["accepted"] if "updates" in result else None,
    "up": lambda result: result["bytes"]["up"] if "bytes" in result else None,
    "down": lambda result: result["bytes"]["down"] if "bytes" in result else None,
    "seconds": lambda result: result.get("virtual_s") or result["wall_s"],
}


@dataclass(frozen=True, slots=True)
class Group:
    """Results that differ by their seed only; `label` says of what, by axis."""

    label: Mapping[str, str]
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        return ", ".join(self.label.values())


@dataclass(frozen=True, slots=True)
class Spread:
    """Some numbers: how many, mean, sample standard deviation (0 for one), least and most."""

    n: int
    mean: float
    sd: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        sd = stdev(values) if len(values) > 1 else 0.0
        return cls(len(values), fmean(values), sd, min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.sd:.2g}" if self.n > 1 else f"{self.mean:.4g}"


@dataclass(frozen=True, slots=True)
class Point:
    """A measured version: after so many rounds, counted updates and seconds."""

    rounds: float
    updates: float
    seconds: float
    value: float


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with a band over seeds, or over participants. `flat`: only its last value means something."""

    name: str
    points: tuple[Point, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    flat: bool = False


# -- one result ------------------------------------------------------------------------------------------------


def trajectory(result: Result, metric: str) -> list[Point]:
    """The metric against rounds, updates and seconds, wherever it was measured. Seconds are those in rounds."""
    points, updates, seconds = [], 0.0, 0.0
    for row in result.get("history", ()):
        updates += row.get("accepted", 0)
        seconds += row.get("duration_s", 0.0)
        if metric in row["metrics"]:
            points.append(Point(row["round"], updates, seconds, row["metrics"][metric]))
    return points


def reached(points: Sequence[Point], metric: str, target: float) -> Point | None:
    """The first that is as good as the target."""
    return next((point for point in points if not improves(metric, target, point.value)), None)


def common_metric(results: Sequence[Result], wanted: str = "") -> str:
    """The wanted metric, or the headline of what all of them measured."""
    shared = [set(result["metrics"]) for result in results]
    names = [name for name in (results[0]["metrics"] if results else ()) if all(name in one for one in shared)]
    return wanted or headline(dict.fromkeys(names, 0.0))


# -- groups ----------------------------------------------------------------------------------------------------


def final(group: Group, metric: str) -> Spread | None:
    """The last measured value, over the seeds."""
    values = [result["metrics"][metric] for result in group.results if metric in result["metrics"]]
    return Spread.of(values) if values else None


def to_target(group: Group, metric: str, target: float, of: str) -> Spread | None:
    """Rounds, updates or seconds until the target was reached, over the seeds that did."""
    found = [reached(trajectory(result, metric), metric, target) for result in group.results]
    values = [getattr(point, of) for point in found if point is not None]
    return Spread.of(values) if values else None


def line_of(group: Group, metric: str) -> Line:
    """The mean over seeds as far as all of them went, with the least and the most. Of participants alone, only the
    last values."""
    alone = [one["metrics"][metric] for result in group.results for one in result.get("participants", ())]
    if alone:
        spread = Spread.of(alone)
        return Line(group.name, (Point(0, 0, 0, spread.mean),), (spread.low,), (spread.high,), flat=True)
    columns = list(zip(*(trajectory(result, metric) for result in group.results), strict=False))
    return Line(
        group.name,
        tuple(_mean(points) for points in columns),
        tuple(min(point.value for point in points) for points in columns),
        tuple(max(point.value for point in points) for points in columns),
    )


def _mean(points: Sequence[Point]) -> Point:
    names = ("rounds", "updates", "seconds", "value")
    return Point(**{name: fmean(getattr(point, name) for point in points) for name in names})


# -- tables ----------------------------------------------------------------------------------------------------


def long_table(groups: Sequence[Group], metric: str, report: Report) -> list[Row]:
    """A row for each group, the first row being the names."""
    axes = groups[0].label if groups else ()
    until = [f"{of} to {target:g}" for target in report.targets for of in report.to]
    head = (*axes, metric, "least", "most", "n", *report.costs, *until)
    return [head, *(_row(group, metric, report) for group in groups)]


def _row(group: Group, metric: str, report: Report) -> Row:
    spread = final(group, metric)
    measured = (str(spread), f"{spread.low:.4g}", f"{spread.high:.4g}") if spread else ("", "", "")
    costs = (cost_text(group.results, name) for name in report.costs)
    until = (_until(group, metric, target, of) for target in report.targets for of in report.to)
    return (*group.label.values(), *measured, str(len(group.results)), *costs, *until)


def cost_text(results: Sequence[Result], name: str) -> str:
    """What whole runs took, in the mean; nothing where a kind of run has no such cost."""
    values = [COSTS[name](result) for result in results]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return size_text(fmean(known)) if name in ("up", "down") else f"{fmean(known):.4g}"


def _until(group: Group, metric: str, target: float, of: str) -> str:
    if not any(trajectory(result, metric) for result in group.results):
        return ""
    spread, n = to_target(group, metric, target, of), len(group.results)
    if spread is None:
        return "not reached"
    return f"{spread}" if spread.n == n else f"{spread} ({spread.n} of {n})"


def crossed_table(groups: Sequence[Group], metric: str, columns: str) -> list[Row]:
    """Final values, with one axis across."""
    across = list(dict.fromkeys(group.label[columns] for group in groups))
    rows: dict[Row, dict[str, str]] = {}
    for group in groups:
        down = tuple(label for axis, label in group.label.items() if axis != columns)
        rows.setdefault(down, {})[group.label[columns]] = str(final(group, metric) or "")
    axes = groups[0].label if groups else ()
    head = (*(axis for axis in axes if axis != columns), *across)
    return [head, *((*down, *(cells.get(label, "") for label in across)) for down, cells in rows.items())]


def runs_table(groups: Sequence[Group], metric: str) -> list[Row]:
    """A row for each run, of whatever kind, and what it cost."""
    head = ("RUN", "TASK", "STRATEGY", "ROUNDS", metric.upper(), "BEST", "UPDATES", "UP", "DOWN", "SECONDS")
    return [head, *(_run_row(group, metric) for group in groups)]


def _run_row(group: Group, metric: str) -> Row:
    (result,) = group.results
    costs = {name: cost_text([result], name) for name in COSTS}
    about = (group.name, result["task"], result["strategy"], costs.pop("rounds"))
    return (*about, *_measured(result, metric), *costs.values())


def _measured(result: Result, metric: str) -> tuple[str, str]:
    """The last value and the best one: of rounds, or of participants alone, whose mean is the first."""
    if metric not in result["metrics"]:
        return "", ""
    values = [point.value for point in trajectory(result, metric)]
    values += [one["metrics"][metric] for one in result.get("participants", ())]
    best = (min if metric in LOWER_IS_BETTER else max)(values, default=result["metrics"][metric])
    return f"{result['metrics'][metric]:.4g}", f"{best:.4g}"


def compared(groups: Sequence[Group], metric: str) -> dict[str, Any]:
    """Runs side by side as plain data."""
    return {"metric": metric, "runs": [{"run": group.name, **group.results[0]} for group in groups]}


def summaries(groups: Sequence[Group], metric: str, targets: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Each group as plain data."""
    for group in groups:
        until = {
            f"{target:g}": {
                of: _plain(to_target(group, metric, target, of)) for of in ("rounds", "updates", "seconds")
            }
            for target in targets
        }
        yield {"label": dict(group.label), metric: _plain(final(group, metric)), "to": until}


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else {name: getattr(spread, name) for name in ("n", "mean", "sd", "low", "high")}
