"""The worker: serves one participant. It is told the newest round, trains off the loop, and keeps its update
until it knows what became of it. It may be killed, cut off or put to sleep at any point.

Two tasks: one stays connected, listens and sends heartbeats; one does whatever the newest order and the
held update ask for, and looks again whenever there is news.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from broker import tensors
from broker.errors import BadMessage, ConnectionLost, StateError, TransportError
from broker.messages import FromParticipant, Heartbeat, Join, Leave, TrainFailed, TrainRound
from broker.payloads import Address, Assembly, collect, upload, verify
from broker.retry import Backoff, publish
from broker.topology import AGGREGATOR, CHUNK, Topology
from broker.transport import Broker, Delivery, Inbox, Transport
from broker.wire import decode, encode
from workers.journal import Held, Journal
from workers.task import LearningTask, WorkAbandoned
from workers.trainer import Sizes, carry_out, train_config

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Waits and sizes. `lag_s` adds seconds to a training that took so many: to study slow machines."""

    heartbeat_s: float = 10.0
    patience_s: float = 30.0
    retry_s: float = 10.0  # at the most, between attempts to connect
    sizes: Sizes = field(default_factory=Sizes)
    lag_s: Callable[[float], float] = lambda trained_s: 0.0  # noqa: ARG005


@dataclass(frozen=True, slots=True)
class Site:
    """Where a worker works: its name, its learning task and journal, and the thread that trains."""

    participant: str
    task: LearningTask
    journal: Journal
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "train"))


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
        self.site, self.participant = site, site.participant
        self._broker, self._topology = broker, topology
        self._settings = settings or WorkerSettings()
        self._reader: Transport | None = None
        self._writer: Transport | None = None
        self._order: Order | None = None
        self._held: Held | None = None
        self._training: TrainRound | None = None
        self._done = ("", 0, 0)  # run, task and attempt that need not be begun again
        self._backoff = Backoff(self._settings.retry_s)
        self._news = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._stopping = asyncio.Event()
        self.finished = asyncio.Event()  # the run that it was last told of is over

    def stop(self) -> None:
        """Please stop: the update in hand is published, training is abandoned, then it leaves."""
        self._stopping.set()
        self._abandoned.set()
        self._news.set()

    async def run(self) -> None:
        remembered = await self.site.journal.load()
        self._held = remembered.held
        if remembered.order is not None:
            told, payload = decode(remembered.order)
            self._order = Order(told, payload) if isinstance(told, TrainRound) else None
        async with asyncio.TaskGroup() as group:
            link = group.create_task(self._stay_connected(), name=f"{self.participant} link")
            self._news.set()
            await self._work()
            if self._writer is not None:
                await self._say_goodbye()
            link.cancel()

    # -- the link: stay connected, listen, be heard ---------------------------------------------------------

    async def _stay_connected(self) -> None:
        while True:
            try:
                await self._converse()
            except TransportError as lost:
                pause_s = self._backoff.next_s()
                log.warning(
                    "not_connected", participant=self.participant, reason=str(lost), next_try_s=round(pause_s, 2)
                )
                await asyncio.sleep(pause_s)

    async def _converse(self) -> None:
        reader = await self._broker.connect(self.participant, purpose="consume")
        try:
            writer = await self._broker.connect(self.participant, purpose="publish")
            try:
                await reader.declare(*self._topology.inbox_declarations(self.participant))
                inbox = await reader.consume(self._topology.inbox(self.participant), prefetch=1)
                self._reader, self._writer = reader, writer
                await self._join()
                self._backoff.reset()
                self._news.set()
                await self._listen(inbox)
            finally:
                self._reader = self._writer = None
                await writer.close()
        finally:
            await reader.close()

    async def _listen(self, inbox: Inbox) -> None:
        clock = asyncio.get_running_loop().time
        next_beat = clock() + self._settings.heartbeat_s
        while True:
            delivery = await inbox.get(max(0.0, next_beat - clock()))
            if delivery is not None:
                await self._receive(delivery)
            elif clock() >= next_beat:
                await self._beat()
                next_beat = clock() + self._settings.heartbeat_s

    async def _receive(self, delivery: Delivery) -> None:
        """Journals an order, then acks it. What cannot be read is dropped: the next one tells all again."""
        try:
            told, payload = decode(delivery.body)
            if not isinstance(told, TrainRound) or delivery.sender != AGGREGATOR:
                raise BadMessage(f"a {told.kind} message from {delivery.sender!r} is no order")
        except BadMessage as bad:
            log.warning("order_dropped", participant=self.participant, reason=bad.reason)
            await delivery.ack()
            return
        before = self._order.told if self._order else None
        if before and before.run_id == told.run_id and told.rank < before.rank:
            log.info("older_order_dropped", participant=self.participant, rank=told.rank)
            await delivery.ack()
            return
        if self.participant in told.asked:
            await self.site.journal.save_order(delivery.body)
        self._order = Order(told, payload)
        await delivery.ack()
        await self._consider(told)
        if before is None or before.run_id != told.run_id:
            await self._join()
        elif before.epoch != told.epoch:
            await self._beat()  # a new leader wants to know who is there

    async def _consider(self, told: TrainRound) -> None:
        """What the order means for the work in hand and for the held update."""
        doing, held = self._training, self._held
        if doing and (told.run_id != doing.run_id or (told.task != doing.task and not told.late_counts)):
            self._abandoned.set()
        if held:
            task, fate = told.fates.get(self.participant, (0, "missing"))
            if told.run_id != held.update.run_id or (task >= held.update.task and fate != "missing"):
                self._held = None
                await self.site.journal.drop_held()
                log.debug("update_settled", participant=self.participant, task=held.update.task, fate=fate)
            elif task == held.update.task or (told.task == held.update.task and self.participant in told.asked):
                held.sent = False  # the aggregator does not have it
        if told.finished:
            self.finished.set()
        self._news.set()

    # -- the work: whatever the newest order and the held update ask for ------------------------------------

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                if self._held and not self._held.sent:
                    await self._deliver(self._held)
                if self._stopping.is_set():
                    return
                if (order := self._order) and self._is_to_do(order.told):
                    await self._do(order)
                    self._news.set()
            except (TransportError, BadMessage) as error:
                if self._stopping.is_set():
                    return
                log.info("work_waits", participant=self.participant, reason=str(error))

    def _is_to_do(self, told: TrainRound) -> bool:
        if self.participant not in told.asked or told.work == "none" or told.finished:
            return False
        held = self._held and (self._held.update.run_id, self._held.update.task) == (told.run_id, told.task)
        return not held and self._done != (told.run_id, told.task, told.attempt)

    async def _do(self, order: Order) -> None:
        """One task, from fetching the model to the journaled update. A task that raises is reported."""
        told = self._training = order.told
        self._abandoned.clear()
        try:
            blob = await self._fetch(order)
            config = train_config(told, self.participant, self._abandoned.is_set)
            work = partial(carry_out, self.site.task, told, blob, config, self.participant, self._settings.sizes)
            held = await asyncio.get_running_loop().run_in_executor(self.site.executor, work)
            await self._lag(held.update.seconds)
            await self.site.journal.save_held(held)
            self._held = held
        except WorkAbandoned:
            log.info("work_abandoned", participant=self.participant, task=told.task)
        except (TransportError, BadMessage, StateError):
            raise
        except Exception as error:  # whatever a user's task raises: the worker lives on
            log.exception("task_failed", participant=self.participant, task=told.task)
            reason = f"{type(error).__name__}: {error}"[:2000]
            await self._send(
                TrainFailed(participant=self.participant, run_id=told.run_id, task=told.task, error=reason)
            )
        finally:
            self._training = None
        self._done = (told.run_id, told.task, told.attempt)

    async def _lag(self, trained_s: float) -> None:
        if (extra_s := self._settings.lag_s(trained_s)) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._abandoned.wait(), extra_s)
        if self._abandoned.is_set():
            raise WorkAbandoned("a newer round began")

    async def _fetch(self, order: Order) -> tensors.Buffer:
        """The bytes of the global model, from behind the order or from the model stream."""
        where = order.told.model
        if where is None:
            raise BadMessage("the order names no model")
        blob: tensors.Buffer = order.payload
        if where.where == "stream":
            blob = await asyncio.to_thread(bytearray, where.size_bytes)
            stream = await self._connected(self._reader).read(where.stream, offset=where.first_offset)
            assembly = Assembly.into(blob, where, AGGREGATOR)
            await collect(stream, assembly, end=None, patience_s=self._settings.patience_s)
            await stream.close()
        await verify(blob, where)
        return blob

    async def _deliver(self, held: Held) -> None:
        """Publishes the held update: its chunks first, so that whoever reads of it finds them all."""
        update, writer = held.update, self._connected(self._writer)
        body = update.body
        if body is not None and body.where == "stream":
            await upload(writer, Address(self._topology.up, f"{self.participant}.{CHUNK}"), body, held.blob)
        frame = encode(update, held.blob if body is not None and body.where == "inline" else b"")
        await publish(writer, self._topology.up, f"{self.participant}.{update.kind}", frame)
        held.sent = True

    # -- what it says ---------------------------------------------------------------------------------------

    async def _send(self, message: FromParticipant) -> None:
        writer = self._connected(self._writer)
        await publish(writer, self._topology.up, f"{self.participant}.{message.kind}", encode(message))

    async def _join(self) -> None:
        task = self.site.task
        await self._send(Join(**self._status(), learning_task=task.name, num_examples=task.num_examples))

    async def _beat(self) -> None:
        await self._send(Heartbeat(**self._status()))
        self._news.set()  # whatever could not be done for want of the broker is tried again

    def _status(self) -> dict[str, Any]:
        phase, task = "idle", 0
        if self._training is not None:
            phase, task = "training", self._training.task
        elif self._held is not None:
            phase, task = "holding", self._held.update.task
        run_id, epoch = (self._order.told.run_id, self._order.told.epoch) if self._order else ("", 0)
        return {"participant": self.participant, "run_id": run_id, "epoch": epoch, "phase": phase, "task": task}

    async def _say_goodbye(self) -> None:
        with suppress(TransportError):
            await self._send(Leave(participant=self.participant, reason="stopped"))

    def _connected(self, transport: Transport | None) -> Transport:
        if transport is None:
            raise ConnectionLost("not connected now: this is tried again once it is")
        return transport
