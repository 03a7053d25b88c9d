"""The result object, its words, its picture, and the files that a finished run leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator.checkpoints import Checkpoints
from aggregator.history import History, RoundReport
from broker import tensors
from broker.errors import StateError
from broker.head import Best, Decision, HeadRecord
from broker.messages import Where
from fluffle.baselines import BaselineResult, LocalResult
from fluffle.config import Config, from_values, load_config
from fluffle.curve import draw_curve, save_curve
from fluffle.finish import finish
from fluffle.results import build_result, by_round, central_result, headline, local_result, peak_rss_mb
from fluffle.rundir import RunDir, export_model, find_model, find_run, newest_run
from fluffle.text import baseline_summary, columns, metrics_text, run_page, run_row, size_text, summary

REPORT = RoundReport(
    run_id="run-1",
    task=1,
    epoch=1,
    seq=1,
    round=1,
    attempt=2,
    work="train",
    version=1,
    cohort=3,
    accepted=2,
    late=1,
    rejected=0,
    duplicate=0,
    opened=100.0,
    closed=102.5,
    duration_s=2.5,
    metrics={"loss": 0.9, "accuracy": 0.5},
    bytes_up=1000,
    bytes_down=500,
)
MODEL = {"w": np.ones((2, 2), dtype=np.float32)}


def blob(value: float) -> bytes:
    return tensors.encode({"w": np.full((2, 2), value, dtype=np.float32)})


def where(value: float) -> Where:
    return Where(where="inline", size_bytes=len(blob(value)), sha256=hashlib.sha256(blob(value)).hexdigest())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(
        from_values({"task": "digits", "run.id": "run-1", "run.dir": str(tmp_path / "run-1"), "stop.rounds": 2})
    )


@pytest.fixture
def run(config: Config) -> RunDir:
    run = RunDir(config.run_dir)
    run.begin(config, resume=False)
    checkpoints = Checkpoints(run.checkpoints)
    for value in (1.0, 2.0):
        checkpoints.store(where(value).sha256, blob(value))
    counted = [Decision(epoch=1, offset=n, participant=f"p{n}", task=1, verdict="counted") for n in range(2)]
    late = Decision(epoch=1, offset=2, participant="p3", task=1, verdict="late")
    with History(run.history_file) as history:
        history.record(REPORT, [*counted, late])
        history.record(replace(REPORT, task=2, round=2, late=0, metrics={"loss": 0.8, "accuracy": 0.75}), [])
    return run


@pytest.fixture
def record() -> HeadRecord:
    return HeadRecord(
        run_id="run-1",
        version=2,
        round=2,
        model=where(2.0),
        metrics={"loss": 0.8, "accuracy": 0.75},
        best=Best(version=1, round=1, value=0.9, sha256=where(1.0).sha256),
        finished="all 2 rounds done",
    )


def test_the_result_has_exactly_what_was_promised(config: Config, run: RunDir, record: HeadRecord) -> None:
    with History(run.history_file) as history:
        result = build_result(config, record, history, 12.5)
    assert result.pop("aggregator_peak_rss_mb") == pytest.approx(peak_rss_mb(), rel=0.2)
    row = {"round": 1, "attempt": 2, "accepted": 2, "late": 1, "rejected": 0, "duplicate": 0, "duration_s": 2.5}
    assert result == {
        "run_id": "run-1",
        "task": "digits",
        "strategy": "fedavg",
        "rounds": 2,
        "model_version": 2,
        "metrics": {"loss": 0.8, "accuracy": 0.75},
        "history": [
            row | {"metrics": {"loss": 0.9, "accuracy": 0.5}},
            row | {"round": 2, "late": 0, "metrics": {"loss": 0.8, "accuracy": 0.75}},
        ],
        "updates": {"accepted": 2, "late": 1, "rejected": 0, "duplicate": 0},
        "bytes": {"up": 2000, "down": 1000},
        "wall_s": 12.5,
        "virtual_s": None,
        "target": None,
        "model_sha256": where(2.0).sha256,
        "why_finished": "all 2 rounds done",
    }


def test_a_federated_evaluation_belongs_to_its_round() -> None:
    evaluated = replace(REPORT, task=2, work="evaluate", metrics={"accuracy": 0.6})
    assert by_round([REPORT, evaluated]) == [replace(REPORT, metrics={"loss": 0.9, "accuracy": 0.6})]


def test_finishing_leaves_model_best_result_and_curve(config: Config, run: RunDir, record: HeadRecord) -> None:
    result = finish(run, config, record, 3.0)
    assert json.loads(run.result_file.read_text()) == result == run.result()
    assert hashlib.sha256(run.model_file.read_bytes()).hexdigest() == result["model_sha256"]
    assert run.best_file.read_bytes() == blob(1.0)
    assert run.curve_file.read_bytes().startswith(b"\x89PNG")
    text = summary(result, run)
    assert "accuracy 0.75, loss 0.8" in text
    assert "2 accepted, 1 late" in text
    assert str(run.model_file) in text


def test_the_curve_draws_metric_loss_and_references(tmp_path: Path) -> None:
    reports = [REPORT, replace(REPORT, round=2, metrics={"accuracy": 0.75}), replace(REPORT, round=3, metrics={})]
    figure = draw_curve(reports, "digits", references={"pooled": 0.9})
    metric, loss = figure.axes
    assert [list(line.get_xdata()) for line in metric.lines] == [[1, 2], [0, 1]]
    assert list(loss.lines[0].get_ydata()) == [0.9]
    assert metric.get_ylabel() == "accuracy"
    save_curve(draw_curve([], "nothing yet"), tmp_path / "empty.png")
    with pytest.raises(StateError, match="the curve cannot be written"):
        save_curve(figure, tmp_path / "nowhere" / "curve.png")


def test_the_headline_is_what_people_ask_for() -> None:
    assert headline({"loss": 1, "mae": 1, "rmse": 1}) == "rmse"
    assert headline({"loss": 1, "mae": 1, "rmse": 1}, "mae") == "mae"
    assert headline({"loss": 1}) == "loss"
    assert headline({}) == ""
    assert metrics_text({"loss": 0.5, "rmse": 55.123456}) == "rmse 55.12, loss 0.5"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (12_340_000, "12.34 MB"), (10**16, "1e+04 TB")]
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert size_text(size) == text


def test_columns_line_up() -> None:
    assert columns([("A", "B"), ("long", 1)]) == "A     B\nlong  1\n"


def test_runs_are_shown_while_they_go_on_and_afterwards(config: Config, run: RunDir, record: HeadRecord) -> None:
    assert run_row(run) == ("run-1", "digits", "fedavg", "2/2", "accuracy 0.75, loss 0.8", "not finished")
    finish(run, config, record, 1.0)
    assert run_row(run)[-1] == "all 2 rounds done"
    page = run_page(run)
    assert "ACCURACY" in page
    assert str(run.curve_file) in page
    run.history_file.unlink()
    assert "digits" in run_page(run)


def test_runs_are_found_by_directory_and_name(run: RunDir, tmp_path: Path) -> None:
    assert find_run(str(run.path)) == find_run("run-1", tmp_path) == newest_run(tmp_path) == run
    with pytest.raises(StateError, match=r"rn-1: no such run: did you mean run-1\?"):
        find_run("rn-1", tmp_path)
    with pytest.raises(StateError, match="holds no runs"):
        newest_run(tmp_path / "empty")
    with pytest.raises(StateError, match=r"no model\.safetensors yet"):
        find_model("run-1", tmp_path)
    with pytest.raises(StateError, match="not a run directory"):
        RunDir(tmp_path).config()


def test_a_run_directory_is_used_once_unless_resumed(config: Config, run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="already holds a run: add --resume"):
        run.begin(config, resume=False)
    run.begin(config, resume=True)
    assert run.config() == config
    with pytest.raises(StateError, match="no run to resume"):
        RunDir(tmp_path / "other").begin(config, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used as the run directory"):
        RunDir(tmp_path / "file" / "run").begin(config, resume=False)


def test_models_are_exported(run: RunDir, config: Config, record: HeadRecord, tmp_path: Path) -> None:
    finish(run, config, record, 1.0)
    path, found = find_model(str(run.path))
    assert found == run
    export_model(path, tmp_path / "model.safetensors", "safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == blob(2.0)
    export_model(path, tmp_path / "arrays", "npz")
    with np.load(tmp_path / "arrays", allow_pickle=False) as arrays:
        assert arrays["w"].tolist() == [[2.0, 2.0]] * 2
    with pytest.raises(StateError, match="cannot be exported"):
        export_model(path, tmp_path / "nowhere" / "x", "safetensors")
    with pytest.raises(StateError, match="cannot be exported"):
        export_model(run.config_file, tmp_path / "x", "npz")


def test_baselines_as_results(config: Config) -> None:
    one = BaselineResult("p01", 10, {"accuracy": 0.5, "loss": 1.0}, ({"accuracy": 0.5, "loss": 1.0},))
    central = central_result(config, one) | {"wall_s": 1.0}
    assert central["strategy"] == "central"
    assert central["history"] == [{"round": 1, "metrics": {"accuracy": 0.5, "loss": 1.0}}]
    assert baseline_summary(central) == "digits, central: accuracy 0.5, loss 1 after 2 rounds in 1.0 s\n"
    two = replace(one, participant="p02", metrics={"accuracy": 1.0, "loss": 0.0})
    local = local_result(config, LocalResult((one, two))) | {"wall_s": 1.0}
    assert local["metrics"] == {"accuracy": 0.75, "loss": 0.5}
    assert "p02" in baseline_summary(local)
    assert "mean over participants" in baseline_summary(local)
