"""What the aggregator keeps on disk for people: checkpoints, the history and the ledger.

The run itself needs none of it, but for one use: checkpoints are the second copy of model bodies.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from aggregator.checkpoints import Checkpoints
from aggregator.history import OUTCOMES, History, RoundReport
from aggregator.poison import Poison
from broker.head import HeadRecord
from broker.tensors import Buffer, in_memory

BEHIND_S = 0.25  # that files may lag behind, where writing is quick
DISK_SHARE = 0.1  # of the time may pass with writing what may be behind


class Archive:
    """A run directory. Methods are safe on the event loop: the disk is touched in a thread.

    What was committed is written while the run goes on. The history is written before the next record is committed.
    The checkpoint of a model that the record itself carries is a copy for people and for the day when the broker
    loses its disk: it may come a quarter of a second later, and the next one then stands for those between. With
    `behind_s` all of it may be so late: that is for the embedded broker, which dies with this process. Whoever goes
    on from a checkpoint forgets what the history knows beyond it.
    """

    def __init__(self, directory: Path, *, behind_s: float = 0.0) -> None:
        self.checkpoints = Checkpoints(directory / "checkpoints")
        self.history = History(directory / "history.sqlite")
        self.poison = Poison(directory)
        self._behind_s = behind_s
        self._kept: dict[str, Buffer] = {}  # models and states that are not on the disk yet
        self._lines: list[HeadRecord] = []  # records that the history does not know yet
        self._pages: dict[str, HeadRecord] = {}  # the newest record, and that of the best model, by model
        self._history_task: asyncio.Task[None] | None = None
        self._checkpoint_task: asyncio.Task[None] | None = None
        self._history_at = self._checkpoint_at = 0.0  # the earliest next time, as the event loop's clock has it
        self._closing = asyncio.Event()

    def room(self, size_bytes: int) -> Buffer:
        """Where a large body is to be written that may be stored: on the disk, if it must be there in time. For a
        thread."""
        return in_memory(size_bytes) if self._behind_s else self.checkpoints.draft(size_bytes)

    async def store(self, sha256: str, blob: Buffer) -> None:
        """Puts a model body under its digest, before a record names it: on return it is on the disk."""
        if self._behind_s:
            self.keep(sha256, blob)
        else:
            await asyncio.to_thread(self.checkpoints.store, sha256, blob)

    def keep(self, sha256: str, blob: Buffer) -> None:
        """As `store`, for a body that the record itself carries: it is written with that record."""
        self._kept[sha256] = blob

    async def load(self, sha256: str) -> memoryview | None:
        """A model body, or None."""
        return await asyncio.to_thread(self.checkpoints.load, sha256)

    async def newest(self) -> HeadRecord | None:
        """The newest committed record whose model and state are here."""
        return await asyncio.to_thread(self.checkpoints.newest)

    async def rewind(self, record: HeadRecord) -> None:
        """The run goes on from this record: what the history knows beyond it will be done again."""
        await asyncio.to_thread(self.history.forget_after, record)

    def note(self, record: HeadRecord) -> None:
        """Has written what a committed record says: manifest, history, ledger. Writing it again changes nothing.

        Raises StateError if the disk refused what was noted before.
        """
        self._check()
        self._lines.append(record)
        wanted = {model.sha256 for model in (record.model, record.best) if model is not None}
        if record.model is not None:
            self._pages[record.model.sha256] = record
        self._pages = {sha256: page for sha256, page in self._pages.items() if sha256 in wanted}
        wanted.update(body.sha256 for page in (record, *self._pages.values()) for body in page.bodies)
        self._kept = {sha256: blob for sha256, blob in self._kept.items() if sha256 in wanted}
        if _is_over(self._history_task):
            self._history_task = asyncio.create_task(self._write_history(), name="history")
        if _is_over(self._checkpoint_task):
            self._checkpoint_task = asyncio.create_task(self._write_checkpoints(), name="checkpoints")

    async def note_fates(self, record: HeadRecord) -> None:
        """Writes what was decided about the updates of another run, whose checkpoints are elsewhere."""
        await asyncio.to_thread(self.history.record_decided, record.run_id, record.decided)

    async def keep_up(self) -> None:
        """To be called before the next record is committed: returns once the disk is not too far behind."""
        if not self._behind_s and self._history_task is not None:
            await asyncio.shield(self._history_task)
        self._check()

    async def close(self) -> None:
        """Writes what is still to be written. Raises StateError if the disk refuses."""
        self._closing.set()
        try:
            for task in (self._history_task, self._checkpoint_task):
                if task is not None:
                    await task
        finally:
            self.history.close()

    def _check(self) -> None:
        for task in (self._history_task, self._checkpoint_task):
            if task is not None and task.done():
                task.result()

    async def _write_history(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._lines:
            await self._pause(self._history_at - clock())
            records, self._lines = self._lines, []
            lines = [(record, report_of(record)) for record in records]
            await asyncio.to_thread(self.history.record_all, lines)
            self._history_at = clock() + self._behind_s

    async def _write_checkpoints(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._pages:
            await self._pause(self._checkpoint_at - clock())
            await self._history_written()
            pages, self._pages, began = self._pages, {}, clock()
            newest = max(pages.values(), key=lambda record: record.rank)
            await asyncio.to_thread(self._write_pages, pages, newest, dict(self._kept))
            if self._behind_s or _carries_its_model(newest):
                self._checkpoint_at = clock() + max(
                    self._behind_s, BEHIND_S, (clock() - began) * (1 / DISK_SHARE - 1)
                )

    async def _history_written(self) -> None:
        """The history may be ahead of the newest checkpoint, for `rewind` mends that; never behind it."""
        while self._history_task is not None and not self._history_task.done():
            await asyncio.shield(self._history_task)
        self._check()

    def _write_pages(self, pages: Mapping[str, HeadRecord], newest: HeadRecord, kept: Mapping[str, Buffer]) -> None:
        for record in pages.values():
            for body in record.bodies:
                if body.sha256 in kept:
                    self.checkpoints.store(body.sha256, kept[body.sha256])
            self.checkpoints.describe(record)
        self.checkpoints.prune({newest.best.sha256} if newest.best else ())

    async def _pause(self, pause_s: float) -> None:
        """Unless it is closed meanwhile."""
        if pause_s > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause_s)


def _carries_its_model(record: HeadRecord) -> bool:
    return record.model is not None and record.model.where == "inline"


def _is_over(task: asyncio.Task[None] | None) -> bool:
    return task is None or task.done()


def report_of(record: HeadRecord) -> RoundReport | None:
    """The line of the history for the round that a record closed, if it closed one."""
    closed = record.closed
    if closed is None:
        return None
    counts = Counter(OUTCOMES[decision.verdict] for decision in record.decided)
    return RoundReport(
        run_id=record.run_id,
        task=closed.task,
        epoch=record.epoch,
        seq=record.seq,
        round=closed.round,
        attempt=closed.attempt,
        work=closed.work,
        version=record.version,
        cohort=closed.cohort,
        accepted=counts["accepted"],
        late=counts["late"],
        rejected=counts["rejected"] + closed.unlisted,
        duplicate=counts["duplicate"],
        opened=closed.opened,
        closed=closed.closed,
        duration_s=closed.closed - closed.opened,
        metrics=record.metrics,
        bytes_up=closed.bytes_up,
        bytes_down=closed.bytes_down,
        model_sha256=record.model.sha256 if record.model else "",
    )
