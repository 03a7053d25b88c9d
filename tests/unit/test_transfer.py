"""How far a large body has come, and what is said of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress
from structlog.testing import capture_logs

from broker.messages import Where
from broker.payloads import bytes_of, piece
from fluffle.transfers import EVERY_S, Bars, Lines, watching
from workers.transfer import Transfer, TransferStatus

WHERE = Where(where="stream", size_bytes=90_000_001, sha256="a" * 64, chunks=90, stream="outbox")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_count_from_where_it_went_on() -> None:
    clock, told = Clock(), list[TransferStatus]()
    transfer = Transfer.begin("update", WHERE, 45, clock, told.append)
    assert transfer.status().left_s is None
    assert str(transfer.status()) == "update, 45.0 of 90.0 MB"
    clock.now += 10
    transfer.arrived(54)
    assert told == [transfer.status()]
    assert told[0].bytes_per_s == pytest.approx(9e5, rel=1e-4)
    assert told[0].left_s == pytest.approx(40, rel=1e-4)
    assert str(told[0]) == "update, 54.0 of 90.0 MB at 0.9 MB/s, 40 s left"
    clock.now += 40
    transfer.arrived(90)
    assert told[1].is_whole
    assert told[1].left_s == 0


@pytest.mark.parametrize(("size", "chunks"), [(1, 1), (10, 3), (10, 4), (90_000_001, 90), (7, 0)])
def test_so_many_bytes_are_in_so_many_pieces(size: int, chunks: int) -> None:
    where = WHERE.model_copy(update={"size_bytes": size, "chunks": chunks})
    assert [bytes_of(where, count) for count in range(1, chunks + 1)] == [
        piece(where, count).stop for count in range(chunks)
    ]
    assert bytes_of(where, 0) == 0


def status(done: int) -> TransferStatus:
    return TransferStatus(what="model", done_bytes=done, size_bytes=100, bytes_per_s=1.0, left_s=100.0 - done)


def test_a_log_line_comes_every_five_seconds_and_none_of_a_short_transfer() -> None:
    clock, said = Clock(), list[dict[str, object]]()
    lines = Lines(clock, lambda event, **fields: said.append({"event": event, **fields}))
    lines("p01", status(1))
    lines("p01", status(100))
    clock.now += 2 * EVERY_S
    lines("p01", status(1))  # another one: its five seconds begin now
    assert said == []
    clock.now += EVERY_S
    lines("p01", status(5))
    lines("p01", status(6))
    assert [(line["event"], line["participant"], line["done_bytes"]) for line in said] == [
        ("transfer_progress", "p01", 5)
    ]


def test_a_terminal_has_a_bar_for_each_as_long_as_it_lasts() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    bars = Bars(progress)
    bars("p01", status(10))
    bars("p02", status(20))
    bars("p01", status(30))
    assert [(task.description, task.completed, task.total) for task in progress.tasks] == [
        ("p01 model", 30, 100),
        ("p02 model", 20, 100),
    ]
    bars("p01", status(100))
    assert [task.description for task in progress.tasks] == ["p02 model"]


def test_without_a_terminal_lines_of_the_log_are_written() -> None:
    with watching() as told, capture_logs():
        assert isinstance(told, Lines)
