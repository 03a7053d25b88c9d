"""Results in words, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aggregator.history import History, RoundReport
from fluffle.results import Confusion, Result, by_round, headline, shown
from fluffle.rundir import RunDir

MOST_SHOWN = 20  # classes, or pairs of them
UNITS = ("B", "kB", "MB", "GB", "TB")


def summary(result: Result, run: RunDir) -> str:
    """What came out, where it is, and what to try next."""
    updates = ", ".join(f"{count} {fate}" for fate, count in result["updates"].items())
    sizes = ", ".join(f"{size_text(size)} {way}" for way, size in result["bytes"].items())
    files = "".join(f"  {name:<10}{path}\n" for name, path in run.artefacts().items() if path.exists())
    virtual = "" if result["virtual_s"] is None else f", {duration_text(result['virtual_s'])} of virtual time"
    return (
        f"\n{result['task']} is finished ({result['why_finished'] or 'stopped'}): "
        f"version {result['model_version']} after {result['rounds']} rounds in {result['wall_s']:.1f} s"
        f"{virtual}\n"
        f"  {metrics_text(result['metrics']) or 'not evaluated'}\n{fairness_text(result)}"
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
    first, told = headline(metrics), shown(metrics)
    return ", ".join(f"{name} {told[name]:.4g}" for name in sorted(told, key=lambda name: name != first))


def fairness_text(result: Result) -> str:
    """How evenly the model serves the participants, if they measured it."""
    if not (views := result.get("fairness")):
        return ""
    words = ", ".join(
        f"{view.replace('worst_10', 'worst 10%')} {views[view]:.4g}" for view in views if view != "metric"
    )
    return f"  {views['metric']} over participants: {words}\n"


def confusion_text(confusion: Confusion) -> str:
    """Counts with each class's recall; with many classes only the pairs that are mistaken most often."""
    if len(confusion) > MOST_SHOWN:
        return _worst_pairs(confusion)
    head = ("TRUE \\ PREDICTED", *range(len(confusion)), "RECALL")
    rows = [(c, *row, f"{row[c] / sum(row):.3f}" if sum(row) else "") for c, row in enumerate(confusion)]
    return columns([head, *rows])


def _worst_pairs(confusion: Confusion) -> str:
    found = [
        (count, true, predicted)
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    found.sort(key=lambda pair: -pair[0])
    rows = [(true, predicted, count) for count, true, predicted in found[:MOST_SHOWN]]
    return columns([("TRUE", "PREDICTED", "EXAMPLES"), *rows])


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
    result = run.result() if run.result_file.exists() else {}
    metrics = metrics_text(reports[-1].metrics if reports else result.get("metrics", {}))
    done = f"{len(reports) or result.get('rounds', 0)}/{config.stop.rounds}"
    strategy = result.get("strategy", config.strategy.name)
    return (run.path.name, config.task, strategy, done, metrics, result.get("why_finished", "not finished"))


def run_page(run: RunDir) -> str:
    """All of `fluffle runs show`."""
    config = run.config()
    files = columns([(name, path) for name, path in run.artefacts().items() if path.exists()])
    if run.result_file.exists() and not run.history_file.exists():
        return f"{config.run.id}\n\n{baseline_summary(run.result())}\n{files}"
    reports = _reports(run, config.run.id)
    names = sorted({name for report in reports for name in shown(report.metrics)})
    rows = [
        (
            *(r.round, r.attempt, r.accepted, r.late, r.rejected, r.duplicate, f"{r.duration_s:.2f}"),
            *(f"{r.metrics[name]:.4f}" if name in r.metrics else "" for name in names),
        )
        for r in reports
    ]
    head = ("ROUND", "ATTEMPT", "ACCEPTED", "LATE", "REJECTED", "DUPLICATE", "SECONDS", *map(str.upper, names))
    title = f"{config.run.id}: {config.task}, {config.strategy.name}"
    return f"{title}\n\n{columns([head, *rows])}\n{_measured(run)}{files}"


def _measured(run: RunDir) -> str:
    """What a finished run's last evaluation says beyond its metrics."""
    result = run.result() if run.result_file.exists() else {}
    confusion = result.get("confusion", ())
    parts = (fairness_text(result).lstrip(), confusion_text(confusion) if confusion else "")
    return "".join(f"{part}\n" for part in parts if part)


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
