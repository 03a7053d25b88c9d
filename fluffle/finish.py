"""What is written for people once a run has ended: its model, its result, its curve."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aggregator.checkpoints import Checkpoints
from aggregator.history import History, RoundReport
from broker import tensors
from broker.errors import StateError
from broker.head import HeadRecord
from broker.tensors import Arrays, Buffer
from fluffle.config import Config
from fluffle.jobs import confusion_of
from fluffle.results import Confusion, Result, build_result, to_json
from fluffle.rundir import RunDir


def finish(
    run: RunDir, config: Config, record: HeadRecord, wall_s: float, virtual_s: float | None = None
) -> Result:
    """Writes `model.safetensors`, `result.json`, `curve.png`, `best.safetensors` where another version is best, and
    `confusion.png` where the aggregator measures a classifier.

    Raises StateError if the disk refuses.
    """
    with History(run.history_file) as history:
        result = build_result(config, record, history, wall_s, virtual_s)
        reports = history.rounds(record.run_id)
    with _written(run):
        _copy_models(run, record)
        confusion = confusion_of(config, run.model_file)
        result |= {"confusion": confusion} if confusion else {}
        _replace(run.result_file, to_json(result).encode())
    _draw(run, f"{config.task}, {config.strategy.name}", reports, confusion)
    return result


def _draw(run: RunDir, title: str, reports: Sequence[RoundReport], confusion: Confusion | None) -> None:
    from fluffle.confusion import draw_confusion  # matplotlib takes its time
    from fluffle.curve import draw_curve, save_curve
    from fluffle.pictures import save_picture

    save_curve(draw_curve(reports, title), run.curve_file)
    if confusion:
        save_picture(draw_confusion(confusion, title), run.confusion_file)


def finish_baseline(run: RunDir, result: Result, arrays: Arrays) -> None:
    """Writes `result.json`, and `model.safetensors` if there is one model. Raises StateError."""
    with _written(run):
        if arrays:
            _replace(run.model_file, tensors.encode(arrays))
        _replace(run.result_file, to_json(result).encode())


@contextmanager
def _written(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(f"{run.path}: the result cannot be written: {error.strerror or error}") from None


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


def _replace(path: Path, content: Buffer) -> None:
    beside = _beside(path)
    beside.write_bytes(content)
    beside.replace(path)


def _beside(path: Path) -> Path:
    """A former standby may be finishing in the same directory."""
    return path.with_name(f"{path.name}.{os.getpid()}.new")
