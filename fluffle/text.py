"""Results in words, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aggregator.history import History, RoundReport
from fluffle.results import Result, by_round, headline
from fluffle.rundir import RunDir

UNITS = ("B", "kB", "MB", "GB", "TB")


def summary(result: Result, run: RunDir) -> str:
    """What came out, where it is, and what to try next."""
    updates = ", ".join(f"{count} {fate}" for fate, count in result["updates"].items())
    sizes = ", ".join(f"{size_text(size)} {way}" for way, size in result["bytes"].items())
    files = "".join(f"  {name:<9}{path}\n" for name, path in run.artefacts().items() if path.exists())
    virtual = "" if result["virtual_s"] is None else f", {duration_text(result['virtual_s'])} of virtual time"
    return (
        f"\n{result['task']} is finished ({result['why_finished'] or 'stopped'}): "
        f"version {result['model_version']} after {result['rounds']} rounds in {result['wall_s']:.1f} s"
        f"{virtual}\n"
        f"  {metrics_text(result['metrics']) or 'not evaluated'}\n"
        f"  updates: {updates}; {sizes}\n{target_text(result['target'])}\n{files}\n"
        f"next: fluffle runs show {run.path}    fluffle evaluate {run.path}    fluffle central {result['task']}\n"
    )


def target_text(target: Mapping[str, Any] | None) -> str:
    """When the target metric was reached, and what it took, as a line; nothing if there was no target."""
    if target is None:
        return ""
    wanted, reached = f"{target['metric']} {target['value']:g}", target["reached"]
    if reached is None:
        return f"  {wanted} was not reached\n"
    sizes = ", ".join(f"{size_text(size)} {way}" for way, size in reached["bytes"].items())
    return (
        f"  {wanted} reached in round {reached['round']}, after {duration_text(reached['seconds'])}: "
        f"{reached['updates']} updates counted; {sizes}\n"
    )


def duration_text(seconds: float) -> str:
    """`12.3 s`, `2 h 05 min` or `6 d 23 h`."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.9012, loss 0.3456`, the headline first."""
    first = headline(metrics)
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in sorted(metrics, key=lambda name: name != first))


def size_text(size: float) -> str:
    """`12.3 MB`, in powers of a thousand."""
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} {UNITS[-1]}"


def baseline_summary(result: Result) -> str:
    """What pooled training came to, or each participant alone."""
    lines = [
        (one["participant"], one["num_examples"], metrics_text(one["metrics"]))
        for one in result.get("participants", ())
    ]
    table = columns([("PARTICIPANT", "EXAMPLES", "ALONE"), *lines]) + "\n" if lines else ""
    mean = ", mean over participants" if lines else ""
    return (
        f"{table}{result['task']}, {result['strategy']}: {metrics_text(result['metrics'])} "
        f"after {result['rounds']} rounds in {result['wall_s']:.1f} s{mean}\n"
    )


def run_row(run: RunDir) -> tuple[object, ...]:
    """One line of `fluffle runs list`."""
    config = run.config()
    reports = _reports(run, config.run.id)
    metrics = metrics_text(reports[-1].metrics) if reports else ""
    state = run.result()["why_finished"] if run.result_file.exists() else "not finished"
    done = f"{len(reports)}/{config.stop.rounds}"
    return (run.path.name, config.task, config.strategy.name, done, metrics, state)


def run_page(run: RunDir) -> str:
    """All of `fluffle runs show`."""
    config = run.config()
    reports = _reports(run, config.run.id)
    names = sorted({name for report in reports for name in report.metrics})
    rows = [
        (
            *(r.round, r.attempt, r.accepted, r.late, r.rejected, r.duplicate, f"{r.duration_s:.2f}"),
            *(f"{r.metrics[name]:.4f}" if name in r.metrics else "" for name in names),
        )
        for r in reports
    ]
    head = ("ROUND", "ATTEMPT", "ACCEPTED", "LATE", "REJECTED", "DUPLICATE", "SECONDS", *map(str.upper, names))
    files = columns([(name, path) for name, path in run.artefacts().items() if path.exists()])
    return f"{config.run.id}: {config.task}, {config.strategy.name}\n\n{columns([head, *rows])}\n{files}"


def _reports(run: RunDir, run_id: str) -> list[RoundReport]:
    if not run.history_file.exists():
        return []
    with History(run.history_file) as history:
        return by_round(history.rounds(run_id))


def columns(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns, the first row being their names."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(f"{line.rstrip()}\n" for line in lines)
