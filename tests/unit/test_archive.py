"""Files that lag behind the record: never with a gap, never ahead of what a resumed run goes on from."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from aggregator.archive import BEHIND_S, Archive
from aggregator.history import History
from broker import tensors
from broker.errors import StateError
from broker.head import Best, ClosedRound, Decision, HeadRecord
from broker.messages import Where

LONG_S = 60.0


def model(version: int) -> bytes:
    return tensors.encode({"w": np.full(4, version, dtype=np.float32)})


def where(version: int) -> Where:
    blob = model(version)
    return Where(where="inline", size_bytes=len(blob), sha256=hashlib.sha256(blob).hexdigest())


def committed(version: int, *, epoch: int = 1, best: int = 0) -> HeadRecord:
    """The record that closed round `version`, in which p01's update at that offset was counted."""
    closed = ClosedRound(work="train", round=version, attempt=1, task=version, cohort=1, opened=0.0, closed=1.0)
    line = Decision(epoch=epoch, offset=version, participant="p01", task=version, verdict="counted", weight=1)
    score = Best(version=best, round=best, value=0.5, sha256=where(best).sha256) if best else None
    return HeadRecord(
        run_id="run-1", epoch=epoch, seq=version, version=version, round=version, task=version + 1,
        model=where(version), closed=closed, decided=(line,), updates_from=version + 1, best=score,
    )  # fmt: skip


def note(archive: Archive, record: HeadRecord) -> None:
    assert record.model is not None
    archive.keep(record.model.sha256, model(record.version))
    archive.note(record)


async def opened(directory: Path, behind_s: float = 0.0) -> Archive:
    return await asyncio.to_thread(lambda: Archive(directory, behind_s=behind_s))


async def tasks(directory: Path) -> tuple[list[int], list[int]]:
    """Those of the rounds and of the lines of the ledger."""
    return await asyncio.to_thread(_tasks, directory)


def _tasks(directory: Path) -> tuple[list[int], list[int]]:
    with History(directory / "history.sqlite") as history:
        return [r.task for r in history.rounds("run-1")], [d.task for d in history.ledger("run-1")]


async def written(archive: Archive) -> None:
    """Returns once all that was noted is on the disk."""
    for task in (archive._history_task, archive._checkpoint_task):
        assert task
        await task


async def test_what_was_noted_is_on_the_disk_before_the_next_record_is_committed(tmp_path: Path) -> None:
    archive = await opened(tmp_path)
    for version in (1, 2, 3):
        note(archive, committed(version))
        await archive.keep_up()
        assert (await tasks(tmp_path))[0] == list(range(1, version + 1))
    await archive.close()
    newest = await archive.newest()
    assert newest is not None
    assert newest.version == 3


async def test_a_model_that_is_elsewhere_is_stored_at_once(tmp_path: Path) -> None:
    archive = await opened(tmp_path)
    await archive.store(where(1).sha256, model(1))
    assert await archive.load(where(1).sha256) == model(1)
    await archive.close()


async def test_behind_the_record_files_are_few_and_the_history_is_whole(tmp_path: Path) -> None:
    archive = await opened(tmp_path, LONG_S)
    for version in range(1, 9):
        note(archive, committed(version, best=5 if version >= 5 else 0))
        await archive.keep_up()
        if version == 1:
            await written(archive)
    assert await tasks(tmp_path) == ([1], [1]), "the others wait for their time"
    await archive.close()
    everything = list(range(1, 9))
    assert await tasks(tmp_path) == (everything, everything)
    kept = await asyncio.to_thread(lambda: {path.name for path in (tmp_path / "checkpoints").glob("v*.json")})
    assert kept == {"v000001.json", "v000005.json", "v000008.json"}, "the best is there, too"
    assert await archive.load(where(5).sha256) == model(5)


async def test_who_resumes_forgets_what_is_beyond_its_checkpoint(tmp_path: Path) -> None:
    """As a process leaves it that is killed between the history and the checkpoint."""
    archive = await opened(tmp_path)
    for version in (1, 2):
        note(archive, committed(version))
        await written(archive)
    await asyncio.to_thread(archive.history.record_all, [(committed(3), None), (committed(4), None)])
    newest = await archive.newest()
    assert newest is not None
    assert newest.version == 2
    await archive.rewind(newest)
    archive.note(newest)
    for version in (3, 4):
        note(archive, committed(version, epoch=2))
    await archive.close()
    assert await tasks(tmp_path) == ([1, 2, 3, 4], [1, 2, 3, 4])


async def test_a_disk_that_refuses_ends_the_run_at_the_next_record(tmp_path: Path) -> None:
    archive = await opened(tmp_path)
    await asyncio.to_thread(shutil.rmtree, tmp_path / "checkpoints")
    note(archive, committed(1))
    await asyncio.sleep(2 * BEHIND_S)
    with pytest.raises(StateError, match="checkpoints"):
        await archive.keep_up()
    with pytest.raises(StateError):
        archive.note(committed(2))
    with pytest.raises(StateError):
        await archive.close()
