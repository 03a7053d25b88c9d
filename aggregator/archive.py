"""What the aggregator keeps on disk for people: checkpoints, the history and the ledger.

The run itself needs none of it, but for one use: checkpoints are the second copy of model bodies.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from aggregator.checkpoints import Checkpoints
from aggregator.history import OUTCOMES, History, RoundReport
from aggregator.poison import Poison
from broker.head import ClosedRound, HeadRecord
from broker.tensors import Buffer


class Archive:
    """A run directory. Methods are safe on the event loop: the disk is touched in a thread."""

    def __init__(self, directory: Path) -> None:
        self.checkpoints = Checkpoints(directory / "checkpoints")
        self.history = History(directory / "history.sqlite")
        self.poison = Poison(directory)

    async def store(self, sha256: str, blob: Buffer) -> None:
        """Puts a model body under its digest; on return it is on the disk."""
        await asyncio.to_thread(self.checkpoints.store, sha256, blob)

    async def load(self, sha256: str) -> bytes | None:
        """A model body, or None."""
        return await asyncio.to_thread(self.checkpoints.load, sha256)

    async def newest(self) -> HeadRecord | None:
        """The newest committed record whose model is here."""
        return await asyncio.to_thread(self.checkpoints.newest)

    async def note(self, record: HeadRecord) -> None:
        """Writes what a committed record says: manifest, history, ledger. Writing it again changes nothing."""
        await asyncio.to_thread(self._note, record)

    async def note_fates(self, record: HeadRecord) -> None:
        """Writes what was decided about the updates of another run, whose checkpoints are elsewhere."""
        await asyncio.to_thread(self.history.record_decided, record.run_id, record.decided)

    def _note(self, record: HeadRecord) -> None:
        self.checkpoints.describe(record)
        if record.closed is not None:
            self.history.record(report_of(record, record.closed), record.decided)
        else:
            self.history.record_decided(record.run_id, record.decided)
        self.checkpoints.prune({record.best.sha256} if record.best else ())

    def close(self) -> None:
        self.history.close()


def report_of(record: HeadRecord, closed: ClosedRound) -> RoundReport:
    """One line of the history, from the record that closed it."""
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
