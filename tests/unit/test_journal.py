"""The worker's journal: what it says is safe survives a crash anywhere, and damage costs only what is damaged."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from broker.errors import StateError
from broker.messages import Join, TrainRound, UpdateReady, Where
from broker.wire import encode
from workers.journal import FileJournal, Held, Journal, MemoryJournal, Remembered
from workers.kept import Kept

BODY = b"arrays of the finished update"


def order(task: int = 1) -> bytes:
    told = TrainRound(
        run_id="run-1", epoch=1, seq=1, task=task, round=1, attempt=1, work="train", asked=("p01",), version=0,
        model=None,
    )  # fmt: skip
    return encode(told, b"a model")


def held(task: int = 1, body: bytes = BODY, where: Literal["inline", "stream"] = "stream") -> Held:
    """One that took two seconds to train, so that it is worth to be synced."""
    sha256, chunks = hashlib.sha256(body).hexdigest(), int(where == "stream")
    update = UpdateReady(
        participant="p01", run_id="run-1", epoch=1, task=task, base_sha256="a" * 64, num_examples=3,
        arrays="delta" if body else "none", seconds=2.0,
        body=Where(where=where, size_bytes=len(body), sha256=sha256, chunks=chunks) if body else None,
    )  # fmt: skip
    return Held(update, body)


def load(directory: Path) -> Remembered:
    """What another process would remember."""
    return asyncio.run(FileJournal(directory).load())


def saved(directory: Path, *updates: Held, told: bytes | None = None) -> FileJournal:
    async def save(journal: FileJournal) -> FileJournal:
        if told is not None:
            await journal.turn(told, None)
        for update in updates:
            await journal.save_held(update)
        return journal

    return asyncio.run(save(FileJournal(directory)))


def drafted(journal: FileJournal, task: int = 1, body: bytes = BODY) -> Held:
    """One that was written where the journal keeps it."""
    room = memoryview(journal.room(len(body)))
    room[:] = body
    whole = held(task, body)
    return Held(whole.update, room)


def test_an_update_that_was_written_in_the_journal_is_saved_as_it_is(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    first, second = drafted(journal, 1), drafted(journal, 2, BODY * 2)
    assert list(tmp_path.iterdir()) == []
    asyncio.run(journal.save_held(first))
    assert (tmp_path / "update.safetensors").read_bytes() == BODY
    assert same(load(tmp_path).held, held(1))
    asyncio.run(journal.save_held(second))
    assert same(load(tmp_path).held, held(2, BODY * 2))
    assert bytes(first.blob) == BODY, "whoever still looks at the older one sees it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update.frame", "update.safetensors"]


def test_an_update_that_is_not_saved_leaves_nothing(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    asyncio.run(journal.save_held(held(1)))
    drafted(journal, 2)
    assert same(load(tmp_path).held, held(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update.frame", "update.safetensors"]


def test_a_disk_without_room_for_an_update_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no room for a body of .*free some"):
        FileJournal(tmp_path).room(1 << 60)


def same(remembered: Held | None, expected: Held) -> bool:
    return remembered is not None and (remembered.update, bytes(remembered.blob)) == (
        expected.update,
        bytes(expected.blob),
    )


def test_an_empty_directory_remembers_nothing(tmp_path: Path) -> None:
    assert load(tmp_path / "not there yet") == Remembered(None, None)


def test_what_was_saved_is_remembered_by_the_next_process(tmp_path: Path) -> None:
    saved(tmp_path, held(), told=order())
    remembered = load(tmp_path)
    assert remembered.order == order()
    assert same(remembered.held, held())
    assert remembered.held
    assert remembered.held.sent  # sent again only if the aggregator asks for it


def test_a_small_update_is_one_file(tmp_path: Path) -> None:
    small = held(where="inline")
    saved(tmp_path, small)
    assert [path.name for path in tmp_path.iterdir()] == ["update.frame"]
    assert same(load(tmp_path).held, small)


def test_an_update_without_arrays_is_remembered(tmp_path: Path) -> None:
    saved(tmp_path, held(body=b""))
    assert same(load(tmp_path).held, held(body=b""))


def test_the_newest_replaces_what_was_there(tmp_path: Path) -> None:
    saved(tmp_path, held(1, b"one"), held(2, b"two"), told=order(1))
    saved(tmp_path, told=order(2))
    remembered = load(tmp_path)
    assert same(remembered.held, held(2, b"two"))
    assert remembered.order == order(2)


def test_a_settled_update_is_forgotten_and_the_order_is_not(tmp_path: Path) -> None:
    journal = saved(tmp_path, held(), told=order())
    asyncio.run(journal.turn(None, False))
    asyncio.run(journal.turn(None, False))
    assert load(tmp_path) == Remembered(order(), None)


async def test_the_journal_in_memory_remembers_the_same() -> None:
    journal: Journal = MemoryJournal()
    assert await journal.load() == Remembered(None, None)
    await journal.turn(order(), None)
    await journal.save_held(held())
    remembered = await journal.load()
    assert remembered.order == order()
    assert same(remembered.held, held())
    await journal.turn(None, False)
    assert await journal.load() == Remembered(order(), None)


# -- an upload on its way -------------------------------------------------------------------------------------


def on_its_way(task: int = 1, confirmed: int = 0) -> Held:
    """A large update of which so many of 8 chunks are confirmed."""
    small = held(task)
    assert small.update.body
    body = small.update.body.model_copy(update={"where": "stream", "chunks": 8})
    return Held(small.update.model_copy(update={"body": body}), small.blob, confirmed=confirmed)


def progress(directory: Path) -> tuple[bool, int]:
    """Whether the next process takes the update for sent, and how much of it it need not send."""
    remembered = load(directory).held
    assert remembered
    return remembered.sent, remembered.confirmed


NEVER_NOTED = (True, 0)  # it asks first


@pytest.mark.parametrize("confirmed", [1, 7, 8])
def test_an_upload_goes_on_where_the_process_before_was(tmp_path: Path, confirmed: int) -> None:
    journal = saved(tmp_path, on_its_way())
    assert progress(tmp_path) == NEVER_NOTED
    asyncio.run(journal.note_upload(on_its_way(confirmed=confirmed)))
    assert progress(tmp_path) == (False, confirmed)


def test_what_was_sent_or_is_sent_again_from_the_beginning_has_no_note(tmp_path: Path) -> None:
    journal, update = saved(tmp_path, on_its_way()), on_its_way(confirmed=5)
    asyncio.run(journal.note_upload(update))
    update.sent = True
    asyncio.run(journal.note_upload(update))
    assert progress(tmp_path) == NEVER_NOTED
    asyncio.run(journal.note_upload(on_its_way(confirmed=5)))
    asyncio.run(journal.note_upload(on_its_way(confirmed=0)))
    assert progress(tmp_path) == NEVER_NOTED


def test_the_same_update_made_anew_has_no_note(tmp_path: Path) -> None:
    """A repeated attempt gives the same bits: what was confirmed before may be of no use any more."""
    journal = saved(tmp_path, on_its_way())
    asyncio.run(journal.note_upload(on_its_way(confirmed=5)))
    saved(tmp_path, on_its_way())
    assert progress(tmp_path) == NEVER_NOTED


def test_a_note_that_came_after_its_update_was_dropped_is_nothing(tmp_path: Path) -> None:
    journal = saved(tmp_path, on_its_way(1))
    asyncio.run(journal.turn(None, False))
    asyncio.run(journal.note_upload(on_its_way(1, confirmed=5)))
    assert load(tmp_path).held is None


def test_a_note_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = saved(tmp_path, on_its_way())
    asyncio.run(journal.note_upload(on_its_way(confirmed=3)))
    for name in ("fsync", "replace"):
        crash_at(monkeypatch, name, 1)
        with pytest.raises(Crash):
            asyncio.run(journal.note_upload(on_its_way(confirmed=5)))
        monkeypatch.undo()
        assert progress(tmp_path) == (False, 3)


@given(damage=st.binary(max_size=120))
@settings(deadline=None, max_examples=30)  # a disk takes its time to sync
def test_a_damaged_note_only_means_to_ask_first(tmp_path_factory: pytest.TempPathFactory, damage: bytes) -> None:
    directory = tmp_path_factory.mktemp("journal")
    saved(directory, on_its_way())
    (directory / "upload.note").write_bytes(damage)
    assert progress(directory) == NEVER_NOTED


@given(place=st.integers(0, 90), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=30)
def test_a_note_with_a_flipped_bit_is_not_believed(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    asyncio.run(saved(directory, on_its_way()).note_upload(on_its_way(confirmed=5)))
    note = bytearray((directory / "upload.note").read_bytes())
    note[place % len(note)] ^= 1 << bit
    (directory / "upload.note").write_bytes(note)
    assert progress(directory) == NEVER_NOTED


def test_a_note_about_another_update_is_not_believed(tmp_path: Path) -> None:
    journal = saved(tmp_path, on_its_way(2))
    asyncio.run(journal.note_upload(on_its_way(1, confirmed=5)))
    assert progress(tmp_path) == NEVER_NOTED


# -- crashes --------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


def crash_at(monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    """Ends everything at the n-th call of `os.<name>`, before it has an effect."""
    real, calls = getattr(os, name), 0

    def fatal(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, fatal)


@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_crash_leaves_the_old_update_or_the_new_or_none_but_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    old, new = held(1, b"old arrays"), held(2, b"new arrays")
    saved(tmp_path, old, told=order(1))
    crash_at(monkeypatch, name, nth)
    try:
        saved(tmp_path, new, told=order(2))
    except Crash:
        pass
    else:
        assert (name, nth) == ("replace", 4)  # there are three
    monkeypatch.undo()
    remembered = load(tmp_path)
    assert remembered.order in (order(1), order(2), None)  # cheap to have again
    assert remembered.held is None or same(remembered.held, old) or same(remembered.held, new)
    assert not list(tmp_path.glob("*.damaged"))
    saved(tmp_path, new, told=order(2))  # and it goes on
    assert same(load(tmp_path).held, new)


# -- what an update owes to the next --------------------------------------------------------------------------

IN_FORCE, OF_A, OF_B = (Kept("run-1", number, f"residual {number}".encode()) for number in (1, 2, 3))
CALLS = [(name, nth) for name in ("fsync", "replace", "unlink") for nth in range(1, 9)]


def owed(directory: Path) -> Kept | None:
    """What another process would add to its next update."""
    return asyncio.run(FileJournal(directory).residual())


async def owing(journal: Journal) -> None:
    """An update was counted and left `IN_FORCE`; the next is held, and owes `OF_A`."""
    await journal.save_held(held(1), IN_FORCE)
    await journal.turn(None, True)
    await journal.save_held(held(2), OF_A)


@pytest.mark.parametrize(("counted", "expected"), [(True, OF_A), (False, IN_FORCE)])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_an_update_owes_is_in_force_once_it_was_counted(
    tmp_path: Path, kind: str, counted: bool, expected: Kept
) -> None:
    """Refused, late or lost: what was owed before it is still owed."""
    journal: Journal = FileJournal(tmp_path) if kind == "file" else MemoryJournal()
    asyncio.run(owing(journal))
    assert asyncio.run(journal.residual()) == IN_FORCE
    asyncio.run(journal.turn(None, counted))
    assert asyncio.run(journal.residual()) == expected
    asyncio.run(journal.turn(None, True))  # said twice
    assert asyncio.run(journal.residual()) == expected
    asyncio.run(journal.drop_residual())
    assert asyncio.run(journal.residual()) is None


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_an_update_that_owes_nothing_new_changes_nothing(tmp_path: Path, kind: str) -> None:
    """As a federated evaluation. Nor does one that another replaced before its fate was known."""
    journal: Journal = FileJournal(tmp_path) if kind == "file" else MemoryJournal()
    asyncio.run(owing(journal))
    asyncio.run(journal.save_held(held(3)))
    asyncio.run(journal.turn(None, True))
    assert asyncio.run(journal.residual()) == IN_FORCE


@pytest.mark.parametrize(("name", "nth"), CALLS)
@pytest.mark.parametrize(("counted", "expected"), [(True, OF_A), (False, IN_FORCE)])
def test_a_crash_while_a_fate_is_noted_leaves_what_the_fate_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool, expected: Kept, name: str, nth: int
) -> None:
    """Whoever still holds the update says so, and is told again."""
    journal = FileJournal(tmp_path)
    asyncio.run(owing(journal))
    crash_at(monkeypatch, name, nth)
    with suppress(Crash):
        asyncio.run(journal.turn(None, counted))
    monkeypatch.undo()
    if load(tmp_path).held:
        asyncio.run(FileJournal(tmp_path).turn(None, counted))
    assert owed(tmp_path) == expected
    asyncio.run(FileJournal(tmp_path).save_held(held(3)))
    asyncio.run(FileJournal(tmp_path).turn(None, True))
    assert owed(tmp_path) == expected  # and nothing of the one before comes back


@pytest.mark.parametrize(("name", "nth"), CALLS)
def test_a_crash_while_an_update_is_kept_never_pairs_it_with_what_another_owes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    journal = FileJournal(tmp_path)
    asyncio.run(owing(journal))
    crash_at(monkeypatch, name, nth)
    with suppress(Crash):
        asyncio.run(journal.save_held(held(3, b"arrays of the third"), OF_B))
    monkeypatch.undo()
    assert owed(tmp_path) == IN_FORCE
    remembered = load(tmp_path).held
    if remembered:
        asyncio.run(FileJournal(tmp_path).turn(None, True))
    assert owed(tmp_path) == {None: IN_FORCE, 2: OF_A, 3: OF_B}[remembered and remembered.update.task]


@pytest.mark.parametrize("damage", [b"", b"junk", b"run-1 1 abc\nresidual 1", IN_FORCE.to_bytes()[:-1]])
def test_a_damaged_residual_is_set_aside_and_said_so(tmp_path: Path, damage: bytes) -> None:
    asyncio.run(owing(FileJournal(tmp_path)))
    (tmp_path / "residual.owed").write_bytes(damage)
    with capture_logs() as logs:
        assert owed(tmp_path) is None
    assert [line["event"] for line in logs] == ["journal_damaged"]
    assert (tmp_path / "residual.damaged").exists()
    assert owed(tmp_path) is None
    assert load(tmp_path).held


def test_every_file_is_synced_before_it_takes_its_name_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        real_sync(fd)

    def replace(source: Path, target: Path) -> None:
        steps.append(f"rename {Path(source).name} {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    saved(tmp_path, held())
    assert steps == [
        "sync update.new", "rename update.new update.safetensors", f"sync {tmp_path.name}",
        "sync update.new", "rename update.new update.frame", f"sync {tmp_path.name}",
    ]  # fmt: skip


def test_what_took_no_time_to_train_costs_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise AssertionError(f"synced {fd}")

    monkeypatch.setattr(os, "fsync", fsync)
    quick = held()
    quick.update = quick.update.model_copy(update={"seconds": 0.5})
    saved(tmp_path, quick, told=order())
    assert same(load(tmp_path).held, quick)


def test_a_half_written_file_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path, held(), told=order())
    (tmp_path / "update.new").write_bytes(b"half a")
    (tmp_path / "order.new").write_bytes(b"half an")
    remembered = load(tmp_path)
    assert same(remembered.held, held())
    assert remembered.order == order()


# -- damage ---------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 0xFF
    path.write_bytes(content)


def another_kind(path: Path) -> None:
    path.write_bytes(encode(Join(participant="p01")))


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("update.frame", cut_off),
        ("update.frame", flip),
        ("update.frame", another_kind),
        ("update.safetensors", cut_off),
        ("update.safetensors", flip),
        ("update.safetensors", missing),
    ],
)
def test_a_damaged_update_is_set_aside_and_said_so(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    saved(tmp_path, held(), told=order())
    damage(tmp_path / file)
    with capture_logs() as logs:
        assert load(tmp_path) == Remembered(order(), None)
    assert [(line["event"], line["file"]) for line in logs] == [("journal_damaged", str(tmp_path / "update.frame"))]
    assert (tmp_path / "update.damaged").exists()
    with capture_logs() as logs:
        assert load(tmp_path) == Remembered(order(), None)
    assert logs == []


@pytest.mark.parametrize("damage", [cut_off, flip, another_kind])
def test_a_damaged_order_is_set_aside_and_the_update_is_not(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    saved(tmp_path, held(), told=order())
    damage(tmp_path / "order.frame")
    with capture_logs() as logs:
        remembered = load(tmp_path)
    assert remembered.order is None
    assert same(remembered.held, held())
    assert logs[0]["event"] == "journal_damaged"


def test_a_body_without_its_header_is_nothing(tmp_path: Path) -> None:
    saved(tmp_path, held())
    (tmp_path / "update.frame").unlink()
    assert load(tmp_path) == Remembered(None, None)


# -- the disk refuses -----------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_error_and_costs_nothing_that_was_safe(tmp_path: Path) -> None:
    saved(tmp_path, told=order(1))
    (tmp_path / "order.new").symlink_to("/dev/full")
    with pytest.raises(StateError, match=r"order\.frame: the journal cannot be written .*No space left.*: free"):
        saved(tmp_path, told=order(2))
    assert load(tmp_path).order == order(1)


@pytest.mark.parametrize("file", ["update.frame", "update.safetensors", "order.frame"])
def test_a_journal_that_cannot_be_read_is_one_clear_error(tmp_path: Path, file: str) -> None:
    saved(tmp_path, held(), told=order())
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(StateError, match="the journal cannot be read"):
        load(tmp_path)


def test_an_update_that_cannot_be_dropped_is_one_clear_error(tmp_path: Path) -> None:
    journal = saved(tmp_path, held())
    (tmp_path / "update.frame").unlink()
    (tmp_path / "update.frame").mkdir()
    with pytest.raises(StateError, match="the journal cannot be written"):
        asyncio.run(journal.turn(None, False))
