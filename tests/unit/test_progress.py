"""Progress of an unfinished training on the disk: whole or not there, and used for that very work alone."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from broker.errors import BadMessage, StateError
from broker.messages import TrainRound, Where
from tests.unit.test_journal import held
from workers.journal import FileJournal
from workers.own import Own
from workers.progress import Progress, Saving, Work

ARRAYS = {"w": np.arange(6, dtype=np.float32), "step": np.array(3), "rng": np.frombuffer(b"state", np.uint8)}
PROGRESS = Progress("run-1 3 " + "a" * 64, 12.5, ARRAYS)
TOLD = TrainRound(
    run_id="run-1", epoch=1, seq=1, task=3, round=3, attempt=1, work="train", asked=("p01",), version=2,
    model=Where(size_bytes=9, sha256="b" * 64), settings={"lr": 0.1}, seed=42,
)  # fmt: skip


def content(progress: Progress = PROGRESS) -> bytes:
    return b"".join(progress.to_pieces())


def found(directory: Path) -> Progress | None:
    """What another process would find."""
    return asyncio.run(FileJournal(directory).progress())


def same(one: Progress | None, other: Progress) -> bool:
    return one is not None and content(one) == content(other)


def test_what_was_saved_last_is_found_by_the_next_process_in_one_file(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    assert found(tmp_path) is None
    journal.save_progress(replace(PROGRESS, seconds=1.0))
    journal.save_progress(PROGRESS)
    assert same(found(tmp_path), PROGRESS)
    assert same(asyncio.run(journal.progress()), PROGRESS)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.saved"]


def test_a_finished_update_ends_it(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    journal.save_progress(PROGRESS)
    asyncio.run(journal.save_held(held()))
    assert found(tmp_path) is None
    journal.save_progress(PROGRESS)
    asyncio.run(journal.drop_progress())
    assert found(tmp_path) is None


@given(place=st.integers(0, len(content()) - 1), bit=st.integers(0, 7))
def test_one_wrong_bit_is_found(place: int, bit: int) -> None:
    damaged = bytearray(content())
    damaged[place] ^= 1 << bit
    with pytest.raises(BadMessage, match="does not match its sha256"):
        Progress.from_bytes(bytes(damaged))


@pytest.mark.parametrize("length", [0, 10, 90, len(content()) - 1])
def test_a_damaged_file_is_set_aside(tmp_path: Path, length: int) -> None:
    (tmp_path / "progress.saved").write_bytes(content()[:length])
    assert found(tmp_path) is None
    assert (tmp_path / "progress.damaged").exists()


def own(**kept: Any) -> Own:
    return Own(TOLD, {name: np.array(values) for name, values in kept.items()})


def name_of(told: TrainRound, participant: str, begins: Own) -> str:
    return Work(told, participant, begins).name


@pytest.mark.parametrize(
    "other",
    [
        {"run_id": "run-2"}, {"task": 4}, {"round": 4}, {"turn": 1}, {"seed": 43}, {"settings": {"lr": 0.2}},
        {"model": Where(size_bytes=9, sha256="c" * 64)}, {"state": Where(size_bytes=9, sha256="c" * 64)},
        {"wants": "gradient"}, {"ditto": 0.1}, {"local": ("bn*",)}, {"data": {"partition": "iid"}},
        {"learning_task": "digits"},
    ],
    ids=lambda other: "".join(other),
)  # fmt: skip
def test_other_work_has_another_name(other: dict[str, Any]) -> None:
    assert name_of(TOLD.model_copy(update=other), "p01", own()) != name_of(TOLD, "p01", own())


def test_so_has_another_participants_and_one_that_begins_with_another_state() -> None:
    names = [name_of(TOLD, "p01", own()), name_of(TOLD, "p02", own()), name_of(TOLD, "p01", own(x=1))]
    names += [name_of(TOLD, "p01", own(x=2)), name_of(TOLD, "p01", replace(own(), lost=True))]
    names.append(Work(TOLD, "p01", own(), lora_rank=4).name)
    assert len(set(names)) == len(names)


def test_who_asks_and_how_often_changes_nothing() -> None:
    again = TOLD.model_copy(update={"epoch": 2, "seq": 9, "attempt": 3, "asked": ("p01", "p02"), "deadline_s": 1.0})
    assert name_of(again, "p01", own()) == name_of(TOLD, "p01", own())


@pytest.mark.parametrize("resumed", [True, False])
def test_only_that_work_goes_on_and_its_seconds_count(resumed: bool) -> None:
    kept: list[Progress] = []
    work = Work(TOLD, "p01", own())
    before = replace(PROGRESS, of=work.name) if resumed else PROGRESS
    saving = Saving(work, before, lambda p: bool(kept.append(p)), iter([100.0, 103.0]).__next__)
    assert bool(saving.resume) is resumed
    saving.save({"w": ARRAYS["w"]})
    assert (kept[0].of, kept[0].seconds) == (work.name, 15.5 if resumed else 3.0)


@pytest.mark.parametrize("error", [StateError("no room"), BadMessage("a dtype that cannot be kept")])
def test_what_cannot_be_saved_ends_no_training(error: Exception) -> None:
    def refuse(_: Progress) -> bool:
        raise error

    with capture_logs() as logs:
        Saving(Work(TOLD, "p01", own()), None, refuse, lambda: 0.0).save(ARRAYS)
    assert [line["event"] for line in logs] == ["progress_not_saved"]


def test_names_that_could_not_be_read_again_and_a_full_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadMessage, match="too long a name"):
        FileJournal(tmp_path).save_progress(replace(PROGRESS, arrays={"n" * 201: ARRAYS["w"]}))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = FileJournal(tmp_path)
    journal.save_progress(PROGRESS)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="free space"):
        journal.save_progress(replace(PROGRESS, seconds=99.0))
    assert same(found(tmp_path), PROGRESS)
