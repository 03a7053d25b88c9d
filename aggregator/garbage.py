"""What the claim-check store need not keep any more. Nothing goes that a leader may need to read again.

At once goes what a committed record has settled: updates whose task is decided, for the record's offset lies behind
them, and models that it remembers no more. All else that no record needs (a model that was stored but never
committed, an update that was never announced, another run's) goes once it was seen twice, `orphan_s` apart.

Everything is called right after a commit that was delivered back, so the record at hand is the truth. A leader that
is frozen in the middle of this deletes, when it wakes up, what was of no use to its own record; its successors'
records follow that one, and need it as little.
"""

from __future__ import annotations

import structlog

from aggregator.settings import RoundSettings
from aggregator.ways import Ways
from broker.errors import StoreFailed
from broker.head import HeadRecord
from broker.messages import UpdateReady
from broker.payloads import tried_together

KEPT_MODELS = 4  # versions: a slow participant may still be fetching an older one

log = structlog.get_logger(__name__)


def models_needed(record: HeadRecord) -> set[str]:
    """The digests of the models that somebody may yet fetch."""
    difference = record.difference.body if record.difference else None
    named = (record.model, record.state, record.previous, difference)
    versions = sorted({(version, sha256) for _, version, sha256 in record.lineage})
    return {where.sha256 for where in named if where} | {sha256 for _, sha256 in versions[-KEPT_MODELS:]}


def is_decided(record: HeadRecord, participant: str, task: int) -> bool:
    """Whether nothing can make a leader read this update (again). One that was refused may be sent again."""
    return task <= record.settled.get(participant, (0, ""))[0] and not (record.open and task == record.open.task)


def update_needed(record: HeadRecord, participant: str, task: int, settings: RoundSettings) -> bool:
    """Whether an update, announced or not, could still be added to a sum."""
    oldest = record.task
    if settings.takes_stale:
        fresh = record.version - settings.staleness_max
        oldest = min((known for known, version, _ in record.lineage if version >= fresh), default=oldest)
    return not record.finished and task >= oldest and not is_decided(record, participant, task)


class Garbage:
    """Collects the garbage of one federation's store during one term of leadership."""

    def __init__(self, ways: Ways) -> None:
        self._store = ways.store if ways.store is not None and ways.store.keeps else None
        self._topology, self._settings = ways.topology, ways.settings
        self._named: set[tuple[str, int]] = set()  # participant and task of updates that were announced
        self._models: set[str] = set()  # that the record before needed
        self._suspects: set[str] = set()
        self._next_look = 0.0

    def note(self, update: UpdateReady) -> None:
        """An update of this run was announced."""
        if update.body is not None and update.body.where == "url":
            self._named.add((update.participant, update.task))

    async def collect(self, record: HeadRecord, now: float) -> None:
        """Deletes what the record, just committed, needs no more. A store that fails now is tidied later."""
        if self._store is None:
            return
        try:
            await self._collect_decided(record)
            await self._collect_models(record)
            if now >= self._next_look:
                await self._collect_orphans(record)
                self._next_look = now + self._settings.store.orphan_s
        except StoreFailed as failed:
            log.warning("garbage_left", reason=str(failed))

    async def _collect_decided(self, record: HeadRecord) -> None:
        async def collect(participant: str, task: int) -> None:
            await self._delete(self._topology.update_place(participant, record.run_id, str(task)))
            self._named.discard((participant, task))

        await tried_together(
            collect(participant, task)
            for participant, task in sorted(self._named)
            if is_decided(record, participant, task)
        )

    async def _collect_models(self, record: HeadRecord) -> None:
        needed = models_needed(record)
        for sha256 in self._models - needed:
            await self._delete(self._topology.model_place(record.run_id, sha256))
        self._models = needed

    async def _collect_orphans(self, record: HeadRecord) -> None:
        found = await self._unneeded(record)
        for place in sorted(found & self._suspects):
            await self._delete(place)
            log.info("orphan_deleted", place=place)
        self._suspects = found - self._suspects

    async def _unneeded(self, record: HeadRecord) -> set[str]:
        """All places in the store that this record does not need."""
        models, updates = self._topology.model_place, self._topology.update_place
        found = set()
        for run_id in await self._names(models()):
            if run_id != record.run_id:
                found.add(models(run_id))
                continue
            found |= {models(run_id, sha256) for sha256 in await self._names(models(run_id))}
        found -= {models(record.run_id, sha256) for sha256 in models_needed(record)}
        for participant in await self._names(updates()):
            for run_id in await self._names(updates(participant)):
                if run_id != record.run_id:
                    found.add(updates(participant, run_id))
                    continue
                for task in await self._names(updates(participant, run_id)):
                    if not (is_number(task) and self._needs(record, participant, int(task))):
                        found.add(updates(participant, run_id, task))
        return found

    def _needs(self, record: HeadRecord, participant: str, task: int) -> bool:
        return update_needed(record, participant, task, self._settings.round)

    async def _names(self, place: str) -> list[str]:
        assert self._store is not None
        return await self._store.names(place)

    async def _delete(self, place: str) -> None:
        assert self._store is not None
        await self._store.delete(place)


def is_number(task: str) -> bool:
    return task.isdecimal() and len(task) <= 16
