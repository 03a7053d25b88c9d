"""Messages that end whoever reads them."""

from __future__ import annotations

from asyncio import CancelledError
from pathlib import Path

import pytest

from aggregator.poison import MOST_ENDED, Poison
from broker.errors import BadMessage, ConnectionLost, StateError


class Killed(BaseException):
    """As if the process were gone."""


def leader(directory: Path, *offsets: int, dies_at: int | None = None) -> list[int]:
    """One that reads these until it dies; which of them it refused."""
    poison, refused = Poison(directory), []
    poison.count("run-1")
    try:
        for offset in offsets:
            try:
                with poison.reading("run-1", offset):
                    if offset == dies_at:
                        raise Killed
            except BadMessage as bad:
                assert "ended 5 leaders" in str(bad)  # noqa: PT017
                refused.append(offset)
    except Killed:
        pass
    return refused


def test_what_ended_several_leaders_is_refused_from_then_on(tmp_path: Path) -> None:
    for _ in range(MOST_ENDED):
        assert leader(tmp_path, 5, 6, 7, 8, dies_at=7) == []
    assert leader(tmp_path, 5, 6, 7, 8, dies_at=7) == [7]
    assert leader(tmp_path, 5, 6, 7, 8) == [7]


def test_two_of_them_are_both_found(tmp_path: Path) -> None:
    for _ in range(MOST_ENDED):
        leader(tmp_path, 5, 6, 7, dies_at=5)
        leader(tmp_path, 5, 6, 7, dies_at=7)
    assert leader(tmp_path, 5, 6, 7) == [5, 7]


def test_the_same_offset_of_another_run_is_another_message(tmp_path: Path) -> None:
    for _ in range(MOST_ENDED):
        leader(tmp_path, 7, dies_at=7)
    poison = Poison(tmp_path)
    poison.count("run-2")
    assert not poison.is_refused("run-2", 7)


def test_who_is_killed_while_it_waits_proves_nothing(tmp_path: Path) -> None:
    for _ in range(3 * MOST_ENDED):
        assert leader(tmp_path, 5, 6, 7) == []  # and here it is killed


@pytest.mark.parametrize("end", [ConnectionLost("cut"), BadMessage("refused"), CancelledError()])
def test_who_stops_reading_and_lives_proves_nothing(tmp_path: Path, end: BaseException) -> None:
    for _ in range(3 * MOST_ENDED):
        poison = Poison(tmp_path)
        poison.count("run-1")
        with pytest.raises(type(end)), poison.reading("run-1", 7):
            raise end
        assert not poison.is_refused("run-1", 7)


def test_damaged_counts_are_forgotten(tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"run-1/7": "many"}', b"\xff"):
        (tmp_path / "poison.json").write_bytes(content)
        assert leader(tmp_path, 7) == []


def test_a_directory_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="reading: cannot be written"):
        Poison(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_in_words_and_the_note_is_counted_later(tmp_path: Path) -> None:
    leader(tmp_path, 7, dies_at=7)
    (tmp_path / "poison.new").symlink_to("/dev/full")
    with pytest.raises(StateError, match=r"poison.json: cannot be written .*No space left"):
        Poison(tmp_path).count("run-1")
    for _ in range(MOST_ENDED):
        leader(tmp_path, 7, dies_at=7)
    assert leader(tmp_path, 7) == [7]
