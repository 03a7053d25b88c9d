"""The history file: whole records, each once, readable by whoever comes later."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from aggregator.history import History, RoundReport
from broker.errors import StateError
from broker.head import Decision

REPORT = RoundReport(
    run_id="run-1",
    task=1,
    epoch=1,
    seq=2,
    round=1,
    attempt=1,
    work="train",
    version=1,
    cohort=3,
    accepted=2,
    late=0,
    rejected=1,
    duplicate=0,
    opened=1_700_000_000.25,
    closed=1_700_000_002.5,
    duration_s=2.25,
    metrics={"accuracy": 0.1 + 0.2, "loss": 1e-17},
    bytes_up=1 << 40,
    bytes_down=12,
    model_sha256="a" * 64,
)
DECIDED = (
    Decision(epoch=1, offset=4, participant="p01", task=1, verdict="counted", weight=100),
    Decision(epoch=1, offset=5, participant="p02", task=1, verdict="counted", weight=50),
    Decision(epoch=1, offset=6, participant="p03", task=1, verdict="refused", reason="tensor 'w' has shape (2,)"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite"


def test_what_was_recorded_is_read_back_unchanged(path: Path) -> None:
    with History(path) as history:
        history.record(REPORT, DECIDED)
    with History(path) as history:
        assert history.rounds("run-1") == [REPORT]
        assert history.ledger("run-1") == list(DECIDED)
        assert history.totals("run-1") == {"accepted": 2, "late": 0, "rejected": 1, "duplicate": 0}
        assert history.runs() == ["run-1"]
        assert history.rounds("other") == []


def test_recording_again_changes_nothing(path: Path) -> None:
    with History(path) as history:
        for epoch in (1, 2):
            history.record(replace(REPORT, epoch=epoch), DECIDED)
        assert history.rounds("run-1") == [REPORT]
        assert history.ledger("run-1") == list(DECIDED)


def test_a_reused_offset_is_another_decision(path: Path) -> None:
    """A broker that lost the tail of its stream assigns the same offsets again, in a later epoch."""
    again = Decision(epoch=2, offset=4, participant="p02", task=2, verdict="counted", weight=50)
    with History(path) as history:
        history.record(REPORT, DECIDED)
        history.record_decided("run-1", [again])
        assert history.ledger("run-1") == [*DECIDED, again]
        assert history.totals("run-1")["accepted"] == 3


def test_answers_to_evaluations_are_not_updates(path: Path) -> None:
    answers = [Decision(epoch=1, offset=9, participant="p01", task=2, verdict="counted", weight=10)]
    with History(path) as history:
        history.record(REPORT, DECIDED)
        history.record(replace(REPORT, task=2, work="evaluate"), answers)
        assert history.totals("run-1")["accepted"] == 2
        assert [report.work for report in history.rounds("run-1")] == ["train", "evaluate"]


def test_a_record_is_stored_whole_or_not_at_all(path: Path) -> None:
    broken = [*DECIDED, replace_offset(DECIDED[0], None)]
    with History(path) as history:
        with pytest.raises(StateError, match="check the disk"):
            history.record(REPORT, broken)
        assert history.rounds("run-1") == []
        assert history.ledger("run-1") == []


def replace_offset(decision: Decision, offset: object) -> Decision:
    return decision.model_copy(update={"offset": offset})


def test_threads_share_one_history(path: Path) -> None:
    with History(path) as history, ThreadPoolExecutor(8) as pool:
        reports = [replace(REPORT, task=task) for task in range(50)]
        list(pool.map(lambda report: history.record(report, DECIDED), reports))
        assert history.rounds("run-1") == reports


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            paths = [tmp_path / f"{number}.sqlite"] * 8
            for history in pool.map(History, paths):
                history.close()


def test_another_process_reads_while_one_writes(path: Path) -> None:
    with History(path) as writer, History(path) as reader:
        writer.record(REPORT, DECIDED)
        assert reader.rounds("run-1") == [REPORT]


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StateError, match=r"history\.sqlite"):
        History(path)


def test_a_foreign_database_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE songs (name)")
    other.close()
    with pytest.raises(StateError, match="not a Fluffle history"):
        History(path)


def test_a_newer_schema_is_refused(path: Path) -> None:
    History(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(StateError, match="schema version 99"):
        History(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nowhere"):
        History(tmp_path / "nowhere" / "history.sqlite")


def test_closing_twice_is_fine(path: Path) -> None:
    history = History(path)
    history.close()
    history.close()
