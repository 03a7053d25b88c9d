"""What a run came to: the object that `--json` writes, and the same in words."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregator.history import History, RoundReport
from aggregator.progress import improves, parse_target
from broker.head import HeadRecord
from fluffle.config import Config

if TYPE_CHECKING:  # brings torch
    from fluffle.baselines import BaselineResult, LocalResult

Result = dict[str, Any]
HEADLINES = ("accuracy", "rmse")


def build_result(
    config: Config, record: HeadRecord, history: History, wall_s: float, virtual_s: float | None = None
) -> Result:
    """One finished run as plain data. Bytes and updates are summed over all rounds."""
    reports = history.rounds(record.run_id)
    return {
        "run_id": record.run_id,
        "task": config.task,
        "strategy": config.strategy.name,
        "rounds": record.round,
        "model_version": record.version,
        "metrics": dict(record.metrics),
        "history": [_row(report) for report in by_round(reports)],
        "updates": dict(history.totals(record.run_id)),
        "bytes": {"up": sum(r.bytes_up for r in reports), "down": sum(r.bytes_down for r in reports)},
        "wall_s": wall_s,
        "virtual_s": virtual_s,
        "target": target_of(config, reports, record.started),
        "aggregator_peak_rss_mb": peak_rss_mb(),
        "model_sha256": record.model.sha256 if record.model else "",
        "why_finished": record.finished,
    }


def target_of(config: Config, reports: Sequence[RoundReport], started: float) -> Result | None:
    """The metric that was aimed at, and what it had cost when it was first `reached`; None if it never was.

    `updates` are those that counted. `seconds` are the aggregator's since the run began: virtual ones, if its are.
    """
    if not config.stop.target_metric:
        return None
    name, value = parse_target(config.stop.target_metric)
    target = {"metric": name, "value": value, "reached": None}
    for count, report in enumerate(reports, 1):
        if name in report.metrics and not improves(name, value, report.metrics[name]):
            so_far = reports[:count]
            return target | {
                "reached": {
                    "round": report.round,
                    "model_version": report.version,
                    "updates": sum(r.accepted for r in so_far if r.work == "train"),
                    "bytes": {"up": sum(r.bytes_up for r in so_far), "down": sum(r.bytes_down for r in so_far)},
                    "seconds": report.closed - started,
                }
            }
    return target


def central_result(config: Config, outcome: BaselineResult) -> Result:
    """Pooled training as plain data."""
    return _baseline(config, "central", outcome.metrics) | {
        "num_examples": outcome.num_examples,
        "history": [{"round": number, "metrics": m} for number, m in enumerate(outcome.history, 1)],
    }


def local_result(config: Config, outcome: LocalResult) -> Result:
    """Each participant alone as plain data; `metrics` are the means over them."""
    means = {name: values["mean"] for name, values in outcome.summary.items()}
    return _baseline(config, "local", means) | outcome.to_dict()


def _baseline(config: Config, kind: str, metrics: Mapping[str, float]) -> Result:
    return {
        "run_id": config.run.id,
        "task": config.task,
        "strategy": kind,
        "rounds": config.stop.rounds,
        "metrics": dict(metrics),
    }


def by_round(reports: Sequence[RoundReport]) -> list[RoundReport]:
    """The rounds of training, each with the metrics of the federated evaluation that followed it."""
    measured = {report.round: report.metrics for report in reports if report.work == "evaluate"}
    return [
        replace(report, metrics={**report.metrics, **measured.get(report.round, {})})
        for report in reports
        if report.work == "train"
    ]


def headline(metrics: Mapping[str, float], wanted: str = "") -> str:
    """The metric to show first: the wanted one, accuracy, rmse, any but the loss, the loss; or nothing."""
    others = [name for name in metrics if name != "loss"]
    return next((name for name in (wanted, *HEADLINES, *others, "loss") if name in metrics), "")


def peak_rss_mb() -> float:
    """The most memory this process ever held, in MiB. Only Linux tells that of this program alone; elsewhere it may
    be that of whoever started it, if that was more."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def to_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def _row(report: RoundReport) -> dict[str, Any]:
    names = ("round", "attempt", "accepted", "late", "rejected", "duplicate", "duration_s", "metrics")
    return {name: getattr(report, name) for name in names}
