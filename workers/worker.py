"""The worker: serves one participant. It is told the newest round, trains off the loop, and keeps its update
until it knows what became of it. It may be killed, cut off or put to sleep at any point.

Two tasks: the link listens and is heard; the other does whatever the newest order and the held update ask
for, and looks again whenever there is news.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import structlog

from broker.errors import BadMessage, FluffleError, StateError, TransportError
from broker.messages import Fate, Heartbeat, Join, Leave, Phase, TrainFailed, TrainRound, UpdateReady
from broker.offload import contained, off_loop
from broker.store import Store
from broker.tensors import Buffer, Room, in_memory
from broker.tensors import decode as decode_arrays
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Delivery
from broker.travelling import shared
from broker.wire import decode, decode_again
from workers.choice import Measured, choose
from workers.journal import Held, Journal
from workers.kept import Kept
from workers.lane import Lane
from workers.link import Link, Means, WorkerSettings
from workers.own import Own, is_needed, own_of
from workers.progress import Progress
from workers.status import WorkerStatus, waits_for
from workers.task import LearningTask, WorkAbandoned
from workers.trainer import Errand, Finished, carry_out, described, owed_by, slowed, train_config
from workers.upload import Upload

SOFTWARE = f"fluffle {version('fluffle')}"

log = structlog.get_logger(__name__)

TaskFor = Callable[[TrainRound], LearningTask]


def always(task: LearningTask) -> TaskFor:
    """The same learning task whatever the run asks for."""
    return lambda _: task


@dataclass(frozen=True, slots=True)
class Site:
    """Where a worker works: its name, its learning task and journal, the thread that trains, and its way to the
    claim-check store, if there is one. `lora_rank`: of its adapters, 0: the model's.

    `task_for` finds the learning task for an order. It runs in that thread too, so it may load data.
    """

    participant: str
    task_for: TaskFor
    journal: Journal
    thread: Lane = field(default_factory=lambda: Lane("train"))
    store: Store | None = None
    lora_rank: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """A TrainRound and the model behind its header, if that is inline."""

    told: TrainRound
    payload: memoryview


class Worker:
    """One participant's worker. `run` returns after `stop`; both may be called in any order."""

    def __init__(
        self, site: Site, broker: Broker, topology: Topology, settings: WorkerSettings | None = None
    ) -> None:
        self.site, self.participant, self.topology = site, site.participant, topology
        self._settings = settings or WorkerSettings()
        self._link = Link(site.participant, broker, topology, self._settings, Means(site.store, site.journal.room))
        self._order: Order | None = None
        self._is_news = True  # the order came from the broker; one from the journal may be long out of date
        self._held: Held | None = None
        self._keeping = asyncio.Lock()  # the held update is the journal's
        self._training: TrainRound | None = None
        self._seen = Measured()
        self._done = ("", 0, 0)  # run, task and attempt that need not be begun again
        self._settled: tuple[int, Fate | None] = (0, None)
        self._since = self._settings.clock()  # it does what it does since then
        self._news = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._stopping = asyncio.Event()
        self.finished = asyncio.Event()  # a run that it saw going on is over

    def stop(self) -> None:
        """Please stop: the update in hand is published, training is abandoned, then it leaves."""
        self._stopping.set()
        self._abandoned.set()
        self._news.set()

    def status(self, now: float) -> WorkerStatus:
        """What it does at `now`, and what it waits for."""
        told, held, (phase, task) = self._order and self._order.told, self._held, self._doing()
        transfer = self._link.transfer
        return WorkerStatus(
            participant=self.participant,
            federation=self.topology.federation,
            connected=not self._link.trouble,
            waits_for=waits_for(self._link, phase, task, told.round if told else 0),
            phase=phase,
            phase_s=max(0.0, now - self._since),
            run_id=told.run_id if told else "",
            epoch=told.epoch if told else 0,
            round=told.round if told else 0,
            task=task,
            held=held.update.task if held else 0,
            sent=held is not None and held.sent,
            settled=self._settled[0],
            fate=self._settled[1],
            transfer=transfer.status() if transfer else None,
        )

    async def run(self) -> None:
        remembered = await self.site.journal.load()
        self._held = remembered.held
        if remembered.order is not None:
            told, payload = decode(remembered.order)
            self._order = Order(told, payload) if isinstance(told, TrainRound) else None
            self._is_news = False
            if self._order and self._held:  # it may be what tells its fate
                await self._take_in(self._order.told, remembered.order)
        async with asyncio.TaskGroup() as group:
            link = group.create_task(self._link.run(self), name=f"{self.participant} link")
            self._news.set()
            await self._work()
            with suppress(TransportError):
                await self._link.send(Leave(participant=self.participant, reason="stopped"))
            link.cancel()

    # -- being told: what the link calls --------------------------------------------------------------------

    async def on_connected(self) -> None:
        await self._link.send(Join(**self._status(), software=SOFTWARE))
        self._news.set()

    async def on_heartbeat(self) -> None:
        await self._link.send(Heartbeat(**self._status()))
        self._is_news = True  # or there is nobody to give any
        self._news.set()  # whatever could not be done for want of the broker is tried again

    async def on_delivery(self, delivery: Delivery) -> None:
        """Journals an order that asks for something, then acks it. The next one tells all again."""
        order, before = _read(delivery), self._order.told if self._order else None
        same_run = before is not None and order is not None and before.run_id == order.told.run_id
        if order is None or (same_run and before and order.told.rank < before.rank):
            log.warning(
                "order_dropped", participant=self.participant, why="unreadable" if order is None else "older"
            )
            await delivery.ack()
            return
        # Before it is begun: what it owes depends on the fate of the last update.
        await self._take_in(order.told, delivery.body)
        await self._consider(order.told, is_new=before is None or order.told.rank != before.rank)
        self._order, self._is_news = order, True
        self._news.set()
        await delivery.ack()
        if order.told.finished and same_run and before and not before.finished:
            self.finished.set()
        if not same_run:
            await self.on_connected()
        elif before and before.epoch != order.told.epoch:
            await self.on_heartbeat()  # a new leader wants to know who is there

    async def _consider(self, told: TrainRound, *, is_new: bool) -> None:
        """What an order means for the work in hand and for the held update.

        One that was heard before may have crossed the update: to answer it would begin an endless conversation.
        """
        doing, held = self._training, self._held
        if doing and (is_over(told, doing.run_id) or (told.task != doing.task and not told.late_counts)):
            self._abandoned.set()
        if held:
            if told.fates.get(self.participant, (0, "missing"))[0] == held.update.task:
                await self._send_again(held)
            elif is_new and told.task == held.update.task and told.asks(self.participant):
                await self.on_heartbeat()  # it did not have it when it asked; has it come meanwhile?

    async def _take_in(self, told: TrainRound, frame: bytes) -> None:
        """Journals the order if it asks for something, and forgets the held update if its fate is told, or nobody
        will tell it."""
        async with self._keeping:
            held = self._held
            settled = settlement(held.update, told) if held else None
            order = frame if told.asks(self.participant) else None
            await self.site.journal.turn(order, settled.counted if settled else None)
            if held and settled:
                self._held, self._settled = None, (held.update.task, settled.fate)
                self._since = self._settings.clock()
                self._notice("update_settled", task=held.update.task, fate=settled.fate)

    async def _send_again(self, held: Held) -> None:
        """The aggregator does not have it, and the outbox may have lost what was confirmed: all of it is sent.

        Unless it is on its way already: then this answers what was said before.
        """
        if held.sent:
            held.confirmed = 0
            await self.site.journal.note_upload(held)
            held.sent = False

    def _status(self) -> dict[str, Any]:
        phase, task = self._doing()
        run_id, epoch = (self._order.told.run_id, self._order.told.epoch) if self._order else ("", 0)
        return {"participant": self.participant, "run_id": run_id, "epoch": epoch, "phase": phase, "task": task}

    def _doing(self) -> tuple[Phase, int]:
        if self._training is not None:
            return "training", self._training.task
        if self._held is not None:  # "holding" only once it is on its way: the stream keeps that order
            return "holding" if self._held.sent else "training", self._held.update.task
        return "idle", 0

    # -- the work: whatever the newest order and the held update ask for ------------------------------------

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                if (held := self._held) and not held.sent:
                    await self._deliver(held)
                if self._stopping.is_set():
                    return
                if self._order and self._is_news and self._is_to_do(self._order.told):
                    await self._do(self._order)
                    self._news.set()
            except (TransportError, BadMessage) as error:
                if self._stopping.is_set():
                    return
                log.info("work_waits", participant=self.participant, reason=str(error))

    async def _deliver(self, held: Held) -> None:
        """Sends an update, unless meanwhile an order settles it: what cannot count any more need not arrive."""
        resumed = partial(self._notice, "upload_resumed", task=held.update.task, confirmed=held.confirmed)
        clock = asyncio.get_running_loop().time
        upload = Upload(held, self.site.journal, clock, lambda: self._held is held, resumed)
        began, first = clock(), held.confirmed
        try:
            await self._link.deliver(held, upload.arrived)
        except WorkAbandoned:
            log.info("upload_abandoned", participant=self.participant, task=held.update.task)
            return
        if first == 0:  # one that goes on says less
            self._seen = self._seen.after_upload(len(held.blob), clock() - began)
        held.sent, self._since = True, self._settings.clock()
        if held.confirmed:
            await self.site.journal.note_upload(held)
        self._notice("update_sent", task=held.update.task)

    def _is_to_do(self, told: TrainRound) -> bool:
        if not told.asks(self.participant) or told.work == "none" or told.finished:
            return False
        held = self._held and (self._held.update.run_id, self._held.update.task) == (told.run_id, told.task)
        return not held and self._done != (told.run_id, told.task, told.attempt)

    async def _do(self, order: Order) -> None:
        """One task, from fetching the model to the journaled update. A task that raises is reported."""
        told = self._training = order.told
        self._since = self._settings.clock()
        self._abandoned.clear()
        self._notice("work_begun", work=told.work, round=told.round, attempt=told.attempt, task=told.task)
        progress: Progress | None = None
        try:
            progress = await self.site.journal.progress() if told.work == "train" else None
            finished = await self._carry_out(order, progress)
            async with self._keeping:
                await self.site.journal.save_held(finished.held, finished.owes, finished.own)
                self._held = finished.held
            self._note_work(told, finished)
        except WorkAbandoned:
            log.info("work_abandoned", participant=self.participant, task=told.task)
        except (TransportError, BadMessage, StateError):
            raise
        except Exception as error:  # whatever a user's task raises: the worker lives on
            cause = None if isinstance(error, FluffleError) else error
            log.error("task_failed", participant=self.participant, task=told.task, why=str(error), exc_info=cause)
            reason = f"{type(error).__name__}: {error}"[:2000].encode(errors="replace").decode()
            if progress is not None:  # it may be what fails
                await self.site.journal.drop_progress()
            await self._link.send(
                TrainFailed(participant=self.participant, run_id=told.run_id, task=told.task, error=reason)
            )
        finally:
            self._training, self._since = None, self._settings.clock()
        self._done = (told.run_id, told.task, told.attempt)

    def _note_work(self, told: TrainRound, finished: Finished) -> None:
        update, size = finished.held.update, {}
        if update.body is not None and told.model is not None:
            size = {"codec": update.codec, "bytes": update.body.size_bytes}
            trained_s, encoded_s = finished.trained_s, finished.encoded_s
            self._seen = self._seen.after_work(update.codec, told.model.size_bytes, trained_s, encoded_s)
        self._notice("work_done", task=told.task, seconds=round(update.seconds, 3), **size, **update.metrics)

    async def _carry_out(self, order: Order, progress: Progress | None) -> Finished:
        blob = await self._link.fetch(order.told, order.payload)
        residual = await self._residual(order.told, blob) if order.told.work == "train" else None
        packing = choose(order.told.codecs, len(blob), self._seen)
        own = await self._own(order, blob)
        journal = self.site.journal
        errand = Errand(
            order.told, blob, self.participant, packing, residual, own, progress, journal.save_progress,
            self.site.lora_rank, _room(order.told, journal),
        )  # fmt: skip
        config = train_config(order.told, self.participant, self._abandoned.is_set, self._settings.stopwatch)

        def work() -> Finished:
            return carry_out(self.site.task_for(order.told), errand, config)

        trained = await self.site.thread.run(contained(work))
        store, sizes = self.site.store, self._settings.sizes
        in_memory = store is not None and store.hands_over
        size_bytes = 0 if in_memory else len(trained.held.blob)
        finished = await off_loop(size_bytes, described, trained, order.told.model, sizes, handed_over=in_memory)
        lag_s = self._settings.lag_s(order.told, finished.held.update)
        await self._lag(lag_s)
        return slowed(
            finished, lag_s
        )  # what is finished is published, even if it may be late: the ledger shall know

    async def _own(self, order: Order, blob: Buffer) -> Own:
        """What is this participant's own. Of another run, or another model, it is of no use any more."""
        told, kept = order.told, await self.site.journal.own()
        if kept is None and not is_needed(told):
            return Own(told)
        base, server = decode_arrays(blob), dict[str, Any]()
        if told.work == "train":
            server = decode_arrays(await self._link.fetch_state(told, order.payload))
        if kept is not None:
            try:
                known = partial(own_of, since=kept.round, server=server)
                return await off_loop(len(kept.blob), known, told, kept.arrays(told), base)
            except BadMessage as unfit:
                await self.site.journal.drop_own()
                self._notice("own_state_dropped", reason=unfit.reason)
        lost = kept is not None or (is_needed(told) and self.participant in told.fates)
        if lost and kept is None:
            self._notice("own_state_lost", round=told.round)
        return own_of(told, {}, base, lost=lost, server=server)

    async def _residual(self, told: TrainRound, blob: Buffer) -> Kept | None:
        """What the updates before owe to this one. Of another run, or another model, it is of no use any more."""
        residual = await self.site.journal.residual()
        if residual is None:
            return None
        try:
            await off_loop(len(blob), owed_by, residual, told, shared(decode_arrays(blob), told.local))
        except BadMessage as unfit:
            await self.site.journal.drop_residual()
            self._notice("residual_dropped", reason=unfit.reason)
            return None
        return residual

    def _notice(self, event: str, **fields: object) -> None:
        self._settings.on_notice(event, participant=self.participant, **fields)

    async def _lag(self, lag_s: float) -> None:
        """Plays a slow machine, which stops like any other when its work became pointless."""
        if lag_s > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._abandoned.wait(), lag_s)
                raise WorkAbandoned("a newer round began")


class Settlement(NamedTuple):
    """What became of an update. `counted`: this one was, and not another of the same participant."""

    fate: Fate
    counted: bool


def settlement(held: UpdateReady, told: TrainRound) -> Settlement | None:
    """What an order tells of a held update; None as long as somebody may still want it."""
    task, fate = told.fates.get(held.participant, (0, "missing"))
    if is_over(told, held.run_id) or (task >= held.task and fate != "missing"):
        return Settlement(fate, told.run_id == held.run_id and (task, fate) == (held.task, "counted"))
    return None


def is_over(told: TrainRound, run_id: str) -> bool:
    """Whether nothing that is done for that run can matter any more."""
    return told.finished or told.run_id != run_id


def _room(told: TrainRound, journal: Journal) -> Room:
    """Where the update is written: a large one in the journal."""
    return in_memory if told.model is None or told.model.where == "inline" else journal.room


def _read(delivery: Delivery) -> Order | None:
    try:
        told, payload = decode_again(delivery.body)
    except BadMessage:
        return None
    return Order(told, payload) if isinstance(told, TrainRound) and delivery.sender == AGGREGATOR else None
