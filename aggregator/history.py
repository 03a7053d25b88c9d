"""The history and the ledger of runs in one SQLite file, for people and reports.

It is written from committed head records, so it never knows more than the record does; recording the
same record again, after a crash or by a new leader, changes nothing.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from broker.errors import StateError
from broker.head import Decision, HeadRecord
from broker.messages import Verdict

APPLICATION = 0x464C4659  # "FLFY": tells our files from other programs' databases
SCHEMA_VERSION = 2

UNREADABLE = (ValueError, TypeError, RecursionError)  # what a damaged row is read as

Outcome = Literal["accepted", "late", "rejected", "duplicate"]
OUTCOMES: dict[Verdict, Outcome] = {
    "counted": "accepted",
    "late": "late",
    "refused": "rejected",
    "duplicate": "duplicate",
}

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    run_id TEXT NOT NULL, task INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, work TEXT NOT NULL, version INTEGER NOT NULL,
    cohort INTEGER NOT NULL, accepted INTEGER NOT NULL, late INTEGER NOT NULL, rejected INTEGER NOT NULL,
    duplicate INTEGER NOT NULL, opened REAL NOT NULL, closed REAL NOT NULL, duration_s REAL NOT NULL,
    metrics TEXT NOT NULL, bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, model_sha256 TEXT NOT NULL,
    PRIMARY KEY (run_id, task)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger (
    run_id TEXT NOT NULL, epoch INTEGER NOT NULL, "offset" INTEGER NOT NULL, participant TEXT NOT NULL,
    task INTEGER NOT NULL, verdict TEXT NOT NULL, weight INTEGER NOT NULL, version INTEGER NOT NULL,
    staleness INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (run_id, epoch, "offset")
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One closed piece of work: a round of training, or one federated evaluation. Times are Unix seconds."""

    run_id: str
    task: int
    epoch: int
    seq: int
    round: int
    attempt: int
    work: str
    version: int
    cohort: int
    accepted: int
    late: int
    rejected: int
    duplicate: int
    opened: float
    closed: float
    duration_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    model_sha256: str = ""


ROUND_FIELDS = tuple(f.name for f in fields(RoundReport))
LEDGER_FIELDS = tuple(Decision.model_fields)


class History:
    """One `history.sqlite`. Methods block, may be called from any thread, and raise StateError.

    A decision is known by run, epoch and offset: a broker that lost the tail of its stream assigns the same offsets
    again, to another epoch's leader.
    """

    def __init__(self, path: Path | str) -> None:
        """Opens the file, or creates it. Raises StateError if it is damaged or not ours."""
        self.path = Path(path)
        self._lock = threading.Lock()
        with self._guarded():
            self._db = sqlite3.connect(self.path, check_same_thread=False)
        try:
            with self._guarded():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        with self._lock:
            self._db.close()

    def record(self, report: RoundReport, decided: Sequence[Decision]) -> None:
        """Stores a closed round and what was decided in it in one transaction: all of it, or nothing."""
        with self._transaction():
            self._add_round(report)
            self._add_lines(report.run_id, decided)

    def record_all(self, records: Sequence[tuple[HeadRecord, RoundReport | None]]) -> None:
        """Stores what committed records closed and decided in one transaction."""
        with self._transaction():
            for record, report in records:
                if report is not None:
                    self._add_round(report)
                self._add_lines(record.run_id, record.decided)

    def forget_after(self, record: HeadRecord) -> None:
        """Deletes what records of this run said that came after this one."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM rounds WHERE run_id = ? AND (epoch, seq) > (?, ?)",
                (record.run_id, record.epoch, record.seq),
            )
            self._db.execute(
                'DELETE FROM ledger WHERE run_id = ? AND (epoch > ? OR epoch = ? AND "offset" >= ?)',
                (record.run_id, record.epoch, record.epoch, record.updates_from),
            )

    def record_decided(self, run_id: str, decided: Sequence[Decision]) -> None:
        """Stores what a committed record that closed no round decided."""
        with self._transaction():
            self._add_lines(run_id, decided)

    def rounds(self, run_id: str) -> list[RoundReport]:
        """Every closed round of a run, in the order of its tasks."""
        rows = self._query(_select("rounds", ROUND_FIELDS, "task"), run_id)
        with self._guarded():
            return [_round(row) for row in rows]

    def ledger(self, run_id: str) -> list[Decision]:
        """The fate of everything that arrived, in the order in which it was decided."""
        rows = self._query(_select("ledger", LEDGER_FIELDS, 'epoch, "offset"'), run_id)
        with self._guarded():
            return [Decision(**dict(zip(LEDGER_FIELDS, row, strict=True))) for row in rows]

    def totals(self, run_id: str) -> dict[Outcome, int]:
        """How many training updates met which fate; answers to evaluations are not updates."""
        rows = self._query(
            "SELECT verdict, count(*) FROM ledger AS line WHERE run_id = ? AND NOT EXISTS"
            " (SELECT 1 FROM rounds WHERE run_id = line.run_id AND task = line.task AND work = 'evaluate')"
            " GROUP BY verdict",
            run_id,
        )
        counts = dict(rows)
        return {outcome: counts.get(verdict, 0) for verdict, outcome in OUTCOMES.items()}

    def runs(self) -> list[str]:
        """The runs that this file knows, by name."""
        return [name for (name,) in self._query("SELECT run_id FROM rounds UNION SELECT run_id FROM ledger")]

    def _add_round(self, report: RoundReport) -> None:
        self._db.execute(_insert("rounds", ROUND_FIELDS), _round_row(report))

    def _add_lines(self, run_id: str, decided: Sequence[Decision]) -> None:
        lines = [(run_id, *(getattr(decision, name) for name in LEDGER_FIELDS)) for decision in decided]
        self._db.executemany(_insert("ledger", ("run_id", *LEDGER_FIELDS)), lines)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._guarded(), self._db:
            yield

    def _query(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with self._lock, self._guarded(), closing(self._db.execute(query, values)) as cursor:
            return cursor.fetchall()

    def _prepare(self) -> None:
        """Creates the tables in a new file, and refuses a foreign one. Several processes may do so at once."""
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            if self._tables():
                self._check_ours()
            else:
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        with suppress(sqlite3.OperationalError):  # locked: another process is just doing the same
            self._db.execute("PRAGMA journal_mode = WAL")

    def _check_ours(self) -> None:
        if self._pragma("application_id") != APPLICATION:
            raise StateError(f"{self.path}: not a Fluffle history: choose another run directory")
        if (schema := self._pragma("user_version")) != SCHEMA_VERSION:
            raise StateError(
                f"{self.path}: history of schema version {schema}, but this Fluffle knows {SCHEMA_VERSION}: "
                "use the Fluffle that wrote it, or another run directory"
            )

    def _tables(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, *UNREADABLE) as error:
            raise StateError(
                f"{self.path}: the run history cannot be read or written ({error}): "
                "check the disk, or move the file away (the run itself does not need it)"
            ) from error


def _columns(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _insert(table: str, names: Sequence[str]) -> str:
    marks = ", ".join("?" * len(names))
    return f"INSERT INTO {table} ({_columns(names)}) VALUES ({marks}) ON CONFLICT DO NOTHING"  # noqa: S608 - constants


def _select(table: str, names: Sequence[str], order: str) -> str:
    return f"SELECT {_columns(names)} FROM {table} WHERE run_id = ? ORDER BY {order}"  # noqa: S608 - constants


def _round_row(report: RoundReport) -> tuple[Any, ...]:
    values = asdict(report) | {"metrics": json.dumps(report.metrics)}
    return tuple(values[name] for name in ROUND_FIELDS)


def _round(row: Sequence[Any]) -> RoundReport:
    values = dict(zip(ROUND_FIELDS, row, strict=True))
    return RoundReport(**values | {"metrics": json.loads(values["metrics"])})
