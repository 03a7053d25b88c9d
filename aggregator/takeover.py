"""How a new leader comes to know the run: from the record, or, if there is none, from the beginning."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from aggregator.archive import Archive
from aggregator.job import Job
from aggregator.lead import Lead
from aggregator.marks import Marks, marked, surviving
from aggregator.models import Bodies, Models
from aggregator.progress import why_finished
from broker import tensors
from broker.errors import ConfigError, LeadershipLost, StateError
from broker.head import HeadRecord
from broker.messages import Barrier
from broker.offload import contained
from broker.retry import publish
from broker.topology import Topology
from broker.transport import Delivery
from broker.wire import encode

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """From which offset of the updates stream a term reads; up to `end` it was there before. `marks` survived."""

    start: int
    end: int
    marks: Marks


class Takeover:
    """The steps between being handed the record and reading updates. They commit through `lead`."""

    def __init__(self, job: Job, lead: Lead, topology: Topology, archive: Archive, models: Models) -> None:
        self._job, self._lead, self._topology, self._archive, self._models = job, lead, topology, archive, models

    async def take_over(self, now: float) -> tuple[Bodies, Reading]:
        """The global model's and the state's bytes, and what of the updates stream there is."""
        end = await mark_end(self._lead, self._topology, self._job.settings.broker.patience_s)
        bodies = await (
            self._begin(now, end) if self._lead.record.run_id != self._job.settings.run_id else self._load()
        )
        return bodies, await self._reading(end.offset)

    async def _reading(self, end: int) -> Reading:
        """Where to read from: after a loss, other messages may have taken the place of what was read."""
        record = self._lead.record
        patience_s, stream = self._job.settings.broker.patience_s, self._topology.updates
        marks = await surviving(record.marks, end, self._lead.reader, stream, patience_s)
        if marks == record.marks and end >= record.updates_from:
            return Reading(record.updates_from, end, marks)
        first = record.marks[0][0] if record.marks else record.updates_from
        start = marks[-1][0] + 1 if marks else min(end, first)
        log.error(
            "updates_stream_lost_its_tail",
            epoch=record.epoch, end=end, read_to=record.updates_from, read_again_from=start,
        )  # fmt: skip
        return Reading(start, end, marks)

    async def _load(self) -> Bodies:
        record, payload = self._lead.record, self._lead.payload
        if record.model is None:
            raise StateError(f"the record of run {record.run_id!r} names no model: give it up with --abandon")
        inline_bytes = record.model.size_bytes if record.model.where == "inline" else 0
        blob, is_there = await self._models.get(record.run_id, record.model, payload)
        await self._archive.store(record.model.sha256, blob)  # whoever led before had another disk
        if not is_there:
            record = record.with_(model=await self._models.put(record.run_id, blob), difference=None)
        state: tensors.Buffer = b""
        if record.state is not None:
            behind = payload[inline_bytes:]
            state, is_there = await self._models.get(record.run_id, record.state, behind, "strategy's state")
            await self._archive.store(record.state.sha256, state)
            if not is_there:
                record = record.with_(state=await self._models.put_state(record.run_id, state))
        bodies = Bodies(blob, state)
        if record is not self._lead.record:
            await commit(self._lead, record, bodies)
        return bodies

    async def _begin(self, now: float, end: Delivery) -> Bodies:
        """Replaces the record of no run, or of another that is over, by the first of this one."""
        old, run_id = self._lead.record, self._job.settings.run_id
        if old.run_id and not old.finished and old.run_id != self._job.abandon:
            raise ConfigError(
                f"federation {self._topology.federation!r} is in run {old.run_id!r} (after round {old.round}, "
                f"unfinished): wait for it, go on with it under that id, or give it up with --abandon {old.run_id}"
            )
        first, bodies = await self._saved(now) or await self._fresh(now)
        model = await self._models.put(run_id, bodies.model)
        state = await self._models.put_state(run_id, bodies.state)
        epoch = max(old.epoch, first.epoch + 1)  # above what workers have seen of this run
        first = first.with_(
            epoch=epoch,
            seq=old.seq + 1,
            model=model,
            state=state,
            difference=None,
            updates_from=end.offset,
            marks=marked((), end),
            open=None,
            closed=None,
            decided=(),
            members=(),
            wanted="run",
            removed=old.removed if old.run_id else first.removed,  # from the federation, not from one run
            obeyed=None,
        )
        await commit(self._lead, first, bodies)
        await self._models.forget(old, first)  # nobody needs the models of the run before
        log.info("run_began", run_id=run_id, version=first.version, model_bytes=len(bodies.model))
        return bodies

    async def _saved(self, now: float) -> tuple[HeadRecord, Bodies] | None:
        saved = await self._archive.newest()
        if saved is None or saved.model is None or self._job.fresh:
            return None
        if saved.run_id != self._job.settings.run_id:
            raise StateError(
                f"the run directory holds checkpoints of another run, {saved.run_id!r}: choose another directory, "
                "or begin here with --fresh"
            )
        if not self._job.from_checkpoint:
            raise StateError(
                f"run {saved.run_id!r} has checkpoints up to version {saved.version}, but the broker has no record "
                "of it: go on with them (--from-checkpoint, for simulate --resume), or begin again with --fresh"
            )
        await self._archive.rewind(saved)  # what was committed after it is lost, and will be done again
        self._archive.note(saved)  # it may have been killed between checkpoint and history
        blob = await self._archive.load(saved.model.sha256)
        state = await self._archive.load(saved.state.sha256) if saved.state else b""
        saved = saved.with_(wanted="run")  # whoever stopped it now wants it to go on
        over = why_finished(saved, self._job.settings, now) if saved.version else ""  # perhaps it may now go on
        if blob is None or state is None:
            return None
        return saved.with_(finished=over), Bodies(blob, state)

    async def _fresh(self, now: float) -> tuple[HeadRecord, Bodies]:
        blob = await asyncio.to_thread(self._initial)
        before = await self._archive.newest()  # if it begins again, workers have seen its epochs
        epoch = before.epoch if before else 0
        return HeadRecord(run_id=self._job.settings.run_id, epoch=epoch, started=now), Bodies(blob)

    def _initial(self) -> tensors.Buffer:
        arrays = contained(self._job.initial)()
        return tensors.encode_in(self._models.room, arrays).toreadonly()


async def commit(lead: Lead, record: HeadRecord, bodies: Bodies) -> None:
    """Commits `record` as the successor of the last; behind it the model, then the state, as far as they are
    inline."""
    pairs = ((record.model, bodies.model), (record.state, bodies.state))
    inline = [body for where, body in pairs if where is not None and where.where == "inline"]
    if record.epoch == lead.record.epoch:
        record = record.with_(seq=lead.record.seq + 1)
    await lead.commit(record, inline[0] if len(inline) == 1 else b"".join(inline))


async def mark_end(lead: Lead, topology: Topology, patience_s: float) -> Delivery:
    """A barrier published now into `updates`. Raises LeadershipLost if it does not come back."""
    barrier = encode(Barrier(nonce=f"{lead.name} {lead.record.epoch}.{lead.record.seq}"))
    tail = await lead.reader.read(topology.updates, offset="next", prefetch=1)
    await publish(lead.writer, "", topology.updates, barrier, timeout_s=patience_s)
    while (delivery := await tail.get(patience_s)) is not None:
        if delivery.body == barrier:
            await tail.close()
            return delivery
    raise LeadershipLost(f"the barrier in {topology.updates} was not delivered back within {patience_s:g} s")
