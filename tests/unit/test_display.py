"""What is seen while a run goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import structlog
from rich.console import Console

from aggregator.fairness import views_of
from aggregator.history import RoundReport
from fluffle.display import LiveDisplay, LogDisplay, make_display, progress_bar
from fluffle.logs import configure_logs

REPORT = RoundReport(
    run_id="run-1",
    task=1,
    epoch=1,
    seq=1,
    round=1,
    attempt=1,
    work="train",
    version=1,
    cohort=3,
    accepted=3,
    late=0,
    rejected=0,
    duplicate=0,
    opened=100.0,
    closed=102.5,
    duration_s=2.5,
    metrics={"loss": 0.9, "accuracy": 0.5},
    bytes_up=123_456,
    bytes_down=500,
)


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def terminal(height: int = 30) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=True, width=120, height=height, legacy_windows=False), screen


def test_off_a_terminal_every_event_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "text")
    with make_display("digits", 5) as display:
        assert isinstance(display, LogDisplay)
        display.on_notice("participant_joined", participant="p01")
        display.on_report(REPORT)
        display.on_report(replace(REPORT, work="evaluate"))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "event=participant_joined participant=p01" in lines[0]
    assert "event=round_closed" in lines[1]
    assert "round=1" in lines[1]
    assert "accuracy=0.5" in lines[1]
    assert "event=version_evaluated" in lines[2]


def test_log_lines_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    with make_display("digits", 5, lines=True) as display:
        display.on_report(REPORT)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["accepted"], line["loss"]) == ("round_closed", 3, 0.9)


def test_the_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning")
    structlog.get_logger().info("round_closed")
    structlog.get_logger().warning("round_retried", reason="two\nlines")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "round_retried" in lines[0]


def test_the_live_table_shows_rounds_and_what_happened() -> None:
    console, screen = terminal()
    with LiveDisplay("digits · run-1", 5, console) as display:
        assert display.live
        display.on_notice("participant_joined", participant="p01")
        display.on_report(REPORT)
        display.on_report(replace(REPORT, task=2, work="evaluate", metrics={"accuracy": 0.625}))
        display.on_report(replace(REPORT, task=3, round=2, metrics={}))
    text = screen.getvalue()
    for word in ("digits · run-1", "accepted", "accuracy", "0.6250", "0.9000", "123.5 kB", "2/5", "p01"):
        assert word in text


def test_the_live_table_has_the_metrics_that_matter_most() -> None:
    display = LiveDisplay("digits", 5, terminal()[0])
    metrics = dict.fromkeys(("train_loss", "loss", "macro_f1", "macro_recall", "accuracy", "recall_3"), 0.5)
    display.on_report(replace(REPORT, metrics=metrics))
    assert display._metric_names() == ["accuracy", "train_loss", "loss", "macro_f1"]
    display.on_report(replace(REPORT, metrics=metrics | dict.fromkeys(views_of("accuracy"), 0.5)))
    assert display._metric_names() == ["accuracy", "accuracy_worst_10", "train_loss", "loss"]


def test_before_the_first_round_it_says_what_it_waits_for() -> None:
    console, screen = terminal()
    with LiveDisplay("digits", 5, console):
        pass
    assert "waiting for participants" in screen.getvalue()


def test_a_long_run_shows_its_newest_rounds() -> None:
    console, _ = terminal(height=12)
    display = LiveDisplay("digits", 50, console)
    for number in range(1, 51):
        display.on_report(replace(REPORT, task=number, round=number))
    with console.capture() as capture:
        console.print(display._picture())
    assert len(capture.get().splitlines()) <= 12
    assert "50/50" in capture.get()


def test_an_error_leaves_the_terminal_usable() -> None:
    console, _ = terminal()
    with pytest.raises(RuntimeError), LiveDisplay("digits", 5, console):
        raise RuntimeError
    assert console._live_stack == []


def test_the_bar_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("digits", 2) as advance:
        advance(None)
    assert capsys.readouterr() == ("", "")
