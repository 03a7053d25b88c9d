"""What a sweep leaves behind: a file for each finished cell, and all of them together: JSON, table, picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from broker.durable import replace_file
from broker.errors import StateError
from fluffle.cell import Job, Outcome
from fluffle.comparison import Group, Line, Row, common_metric, crossed_table, line_of, long_table, summaries
from fluffle.layers import to_toml
from fluffle.pools import Submit
from fluffle.results import Result
from fluffle.sweep import Cell, Report, Sweep

KEPT = (  # of a result, in the file that has them all; each cell's own has everything
    "task", "strategy", "rounds", "model_version", "metrics", "num_examples", "updates", "bytes", "wall_s",
    "virtual_s", "model_sha256", "why_finished", "participants",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SweepDir:
    """The directory of one sweep, and the names of what lies in it."""

    path: Path

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    @property
    def curve_file(self) -> Path:
        return self.path / "curves.png"

    @property
    def unfinished_file(self) -> Path:
        return self.path / "unfinished"

    def cell_file(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.digest[:16]}.json"

    def begin(self) -> None:
        """Makes the directory. Raises StateError."""
        try:
            (self.path / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"{self.path}: cannot be used as the sweep's directory ({error.strerror or error}): "
                "choose another --dir"
            ) from None

    def keep(self, cell: Cell, result: Result) -> None:
        """Keeps a finished cell's result. Raises StateError."""
        write_json(self.cell_file(cell), json.dumps({"cell": told_of(cell), **result}, indent=1))

    def kept(self, cell: Cell) -> Result | None:
        """The result of a cell that is finished; None for one that is not, or whose file is damaged."""
        try:
            found: Result = json.loads(self.cell_file(cell).read_bytes())
            return found if found["cell"]["digest"] == cell.digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(slots=True)
class Finished:
    """What became of cells, by digest: their results, or why they failed."""

    results: dict[str, Result]
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        if outcome.error:
            self.errors[cell.digest] = outcome.error
        else:
            self.results[cell.digest] = outcome.result


def write_json(path: Path, text: str) -> None:
    """Whole, or not at all. Raises StateError."""
    try:
        replace_file(path, f"{text}\n".encode(), path.with_name(f"{path.name}.{os.getpid()}.new"))
    except OSError as error:
        raise StateError(f"{path}: cannot be written: {error.strerror or error}") from None


# -- running ---------------------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell], directory: SweepDir, submit: Submit) -> Iterator[tuple[Cell, Outcome]]:
    """Runs them, keeps each result, and tells of each as it ends, in whatever order. Raises StateError."""
    running = {submit(job_of(cell)): cell for cell in cells}
    for future in as_completed(running):
        cell, outcome = running[future], outcome_of(future)
        if not outcome.error:
            directory.keep(cell, outcome.result)
        yield cell, outcome


def outcome_of(future: Future[Outcome]) -> Outcome:
    """What became of a cell, also where its machine was lost or no process could be started."""
    try:
        return future.result()
    except Exception as error:
        return Outcome({}, f"{type(error).__name__}: {error}")


def job_of(cell: Cell) -> Job:
    return Job(cell.command, to_toml(cell.config), cell.config.run.id)


# -- all of it -------------------------------------------------------------------------------------------------


def gathered(sweep: Sweep, finished: Finished) -> dict[str, Any]:
    """Everything as plain data."""
    results = finished.results
    done = [cell for cell in sweep.cells if cell.digest in results]
    metric = common_metric([results[cell.digest] for cell in done], sweep.report.metric)
    cells = [told_of(cell) | {"result": _trimmed(results[cell.digest], metric)} for cell in done]
    return {
        "name": sweep.name,
        "title": sweep.title,
        **_made_with(),
        "metric": metric,
        "sweep": dict(sweep.document),
        "groups": list(summaries(groups_of(cells), metric, sweep.report.targets)),
        "failed": [
            told_of(cell) | {"error": finished.errors[cell.digest]}
            for cell in sweep.cells
            if cell.digest in finished.errors
        ],
        "cells": cells,
    }


def told_of(cell: Cell) -> dict[str, Any]:
    return {"place": dict(cell.place), "seed": cell.seed, "digest": cell.digest}


def _made_with() -> dict[str, Any]:
    packages = ("fluffle", "numpy", "torch")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }


def _trimmed(result: Result, metric: str) -> Result:
    history = [_trimmed_row(row, metric) for row in result.get("history", ())]
    return {name: result[name] for name in KEPT if name in result} | {"history": history}


def _trimmed_row(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    kept = {name: row[name] for name in ("round", "accepted") if name in row}
    seconds = {"duration_s": round(row["duration_s"], 4)} if "duration_s" in row else {}
    return kept | seconds | {"metrics": {name: value for name, value in row["metrics"].items() if name == metric}}


def dumped(found: Mapping[str, Any]) -> str:
    """As JSON with a line for each group and each cell, so that differences can be read."""
    lines = [f" {json.dumps(key)}: {_lines(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(one, allow_nan=False) for one in value) + "\n ]"
    return json.dumps(value, allow_nan=False)


# -- reading it ------------------------------------------------------------------------------------------------


def report_of(found: Mapping[str, Any]) -> Report:
    return Report.model_validate(found["sweep"].get("report", {}))


def groups_of(cells: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Cells of the same place together, in the order of the sweep."""
    by_place: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for cell in cells:
        by_place.setdefault(tuple(cell["place"].items()), []).append(cell["result"])
    return [Group(dict(place), tuple(results)) for place, results in by_place.items()]


def table_of(found: Mapping[str, Any]) -> list[Row]:
    """Crossed if the report names an axis for its columns, else with a row for each group."""
    groups, report = groups_of(found["cells"]), report_of(found)
    if report.columns:
        return crossed_table(groups, found["metric"], report.columns)
    return long_table(groups, found["metric"], report)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The picture of a sweep. Raises StateError."""
    from fluffle.curve import draw_lines, save_curve  # matplotlib takes its time

    report = report_of(found)
    panels: dict[str, list[Line]] = {}
    for group in groups_of(found["cells"]):
        label = {axis: text for axis, text in group.label.items() if axis != report.panels}
        heading = f"{report.panels} {group.label[report.panels]}" if report.panels else ""
        panels.setdefault(heading, []).append(line_of(Group(label, group.results), found["metric"]))
    save_curve(draw_lines(panels, found["title"], found["metric"], report.against), path)
