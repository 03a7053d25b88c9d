"""What the aggregator keeps on disk for people: checkpoints, the history and the ledger.

The run itself needs none of it, but for one use: checkpoints are the second copy of model bodies.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from aggregator.checkpoints import Checkpoints
from aggregator.history import OUTCOMES, History, RoundReport
from aggregator.poison import Poison
from broker.head import HeadRecord
from broker.tensors import Buffer

BEHIND_S = 0.25  # that a simulation which was killed may have to do again, where writing is quick
DISK_SHARE = 0.1  # of the time may pass with writing what may be behind


class Archive:
    """A run directory. Methods are safe on the event loop: the disk is touched in a thread.

    What was committed is written while the run goes on: until the next record is committed, or, with `behind_s`, so
    many seconds later. That is for the embedded broker, which dies with this process: whoever resumes goes on from
    the newest checkpoint, and what the history knows beyond that is forgotten.
    """

    def __init__(self, directory: Path, *, behind_s: float = 0.0) -> None:
        self.checkpoints = Checkpoints(directory / "checkpoints")
        self.history = History(directory / "history.sqlite")
        self.poison = Poison(directory)
        self._behind_s, self._due = behind_s, 0.0
        self._kept: dict[str, Buffer] = {}  # models that are written with the record that names them
        self._records: list[HeadRecord] = []  # that are still to be written
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def store(self, sha256: str, blob: Buffer) -> None:
        """Puts a model body under its digest, before a record names it: on return it is on the disk."""
        if self._behind_s:
            self.keep(sha256, blob)
        else:
            await asyncio.to_thread(self.checkpoints.store, sha256, blob)

    def keep(self, sha256: str, blob: Buffer) -> None:
        """As `store`, for a body that the record itself carries: it is written with that record."""
        self._kept[sha256] = blob

    async def load(self, sha256: str) -> bytes | None:
        """A model body, or None."""
        return await asyncio.to_thread(self.checkpoints.load, sha256)

    async def newest(self) -> HeadRecord | None:
        """The newest committed record whose model is here."""
        return await asyncio.to_thread(self.checkpoints.newest)

    async def rewind(self, record: HeadRecord) -> None:
        """The run goes on from this record: what the history knows beyond it will be done again."""
        await asyncio.to_thread(self.history.forget_after, record)

    def note(self, record: HeadRecord) -> None:
        """Has written what a committed record says: manifest, history, ledger. Writing it again changes nothing.

        Raises StateError if the disk refused what was noted before.
        """
        self._check()
        self._records.append(record)
        wanted = {model.sha256 for model in (record.model, record.best) if model is not None}
        self._kept = {sha256: blob for sha256, blob in self._kept.items() if sha256 in wanted}
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_on(), name="archive")

    async def note_fates(self, record: HeadRecord) -> None:
        """Writes what was decided about the updates of another run, whose checkpoints are elsewhere."""
        await asyncio.to_thread(self.history.record_decided, record.run_id, record.decided)

    async def keep_up(self) -> None:
        """To be called before the next record is committed: returns once the disk is not too far behind."""
        if not self._behind_s and self._writing is not None:
            await asyncio.shield(self._writing)
        self._check()

    async def close(self) -> None:
        """Writes what is still to be written. Raises StateError if the disk refuses."""
        self._closing.set()
        try:
            if self._writing is not None:
                await self._writing
        finally:
            self.history.close()

    def _check(self) -> None:
        if self._writing is not None and self._writing.done():
            self._writing.result()

    async def _write_on(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._records:
            with suppress(TimeoutError):
                if (pause_s := self._due - clock()) > 0:
                    await asyncio.wait_for(self._closing.wait(), pause_s)
            records, self._records, began = self._records, [], clock()
            await asyncio.to_thread(self._write, records, dict(self._kept))
            ended = clock()
            if self._behind_s:
                self._due = ended + max(self._behind_s, (ended - began) * (1 / DISK_SHARE - 1))

    def _write(self, records: Sequence[HeadRecord], kept: Mapping[str, Buffer]) -> None:
        """The history first: it may be ahead of the newest checkpoint, which `rewind` mends, but has no gaps."""
        self.history.record_all([(record, report_of(record)) for record in records])
        newest = records[-1]
        for sha256, record in {record.model.sha256: record for record in records if record.model}.items():
            if sha256 in kept:
                self.checkpoints.store(sha256, kept[sha256])
            if sha256 in kept or not self._behind_s:
                self.checkpoints.describe(record)
        self.checkpoints.prune({newest.best.sha256} if newest.best else ())


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
