"""What is written for people once a run has ended: its model, its result, its curve."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from aggregator.checkpoints import Checkpoints
from aggregator.history import History
from broker.errors import StateError
from broker.head import HeadRecord
from fluffle.config import Config
from fluffle.results import Result, build_result, to_json
from fluffle.rundir import RunDir


def finish(
    run: RunDir, config: Config, record: HeadRecord, wall_s: float, virtual_s: float | None = None
) -> Result:
    """Writes `model.safetensors`, `result.json`, `curve.png`, and `best.safetensors` where another version is best.

    Raises StateError if the disk refuses.
    """
    with History(run.history_file) as history:
        result = build_result(config, record, history, wall_s, virtual_s)
        reports = history.rounds(record.run_id)
    try:
        _copy_models(run, record)
        _replace(run.result_file, to_json(result).encode())
    except OSError as error:
        raise StateError(f"{run.path}: the result cannot be written: {error.strerror or error}") from None
    from fluffle.curve import draw_curve, save_curve  # matplotlib takes its time

    save_curve(draw_curve(reports, f"{config.task}, {config.strategy.name}"), run.curve_file)
    return result


def _copy_models(run: RunDir, record: HeadRecord) -> None:
    checkpoints = Checkpoints(run.checkpoints)
    if record.model:
        _copy(checkpoints.path(record.model.sha256), run.model_file)
    if record.model and record.best and record.best.sha256 != record.model.sha256:
        _copy(checkpoints.path(record.best.sha256), run.best_file)


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        beside = _beside(target)
        shutil.copyfile(source, beside)
        beside.replace(target)


def _replace(path: Path, content: bytes) -> None:
    beside = _beside(path)
    beside.write_bytes(content)
    beside.replace(path)


def _beside(path: Path) -> Path:
    """A former standby may be finishing in the same directory."""
    return path.with_name(f"{path.name}.{os.getpid()}.new")
