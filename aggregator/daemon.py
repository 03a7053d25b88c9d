"""The aggregator: leads one run round after round, or stands by until it must.

All it knows follows from the head record and the updates stream, so it may die anywhere: the next leader
reads the same stream from the same offset and decides the same. One task decides, in stream order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from aggregator import control, plan, status
from aggregator.announcer import Announcer, reply_to
from aggregator.archive import Archive, report_of
from aggregator.buffered import Buffer
from aggregator.fairness import fairness
from aggregator.garbage import Garbage
from aggregator.intake import Intake, check_sender
from aggregator.job import Job, Surroundings
from aggregator.judge import damping, judge, weight_of
from aggregator.lead import Lead
from aggregator.ledger import Ledger, weighted_means
from aggregator.marks import marked
from aggregator.models import Bodies, Models
from aggregator.pace import grown
from aggregator.progress import best_of, evaluation_due, why_finished
from aggregator.quota import Quotas
from aggregator.registry import Registry
from aggregator.round import Round, Step, reckoned
from aggregator.status import RunStatus
from aggregator.strategies import Strategy, check_training, make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.optimiser import ServerOptimiser
from aggregator.strategies.partial import Partial
from aggregator.strategies.streaming import Streaming
from aggregator.takeover import Takeover, commit, mark_end
from aggregator.ways import Ways
from broker import tensors
from broker.codecs import NONE
from broker.codecs.difference import difference
from broker.errors import (
    AccessRefused,
    BadMessage,
    ChunksMissing,
    ConfigError,
    LeadershipLost,
    MessageTooLarge,
    TaskError,
    TransportError,
)
from broker.head import ClosedRound, HeadRecord
from broker.messages import (
    Barrier,
    Control,
    Difference,
    FromParticipant,
    Heartbeat,
    Join,
    Leave,
    Message,
    Metrics,
    Rejected,
    Status,
    TrainFailed,
    UpdateReady,
)  # fmt: skip
from broker.offload import LIGHT_BYTES, contained, off_loop
from broker.payloads import verify
from broker.retry import Backoff, publish
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Delivery, Inbox
from broker.travelling import controls_in, due, shared
from broker.wire import FROM_PARTICIPANT, decode, encode

log = structlog.get_logger(__name__)

QUOTED_BYTES = 4 << 10  # of a refused message


class Aggregator:
    """One process that may lead. Run any number of them: one leads, the others stand by."""

    def __init__(self, job: Job, broker: Broker, directory: Path, around: Surroundings | None = None) -> None:
        self.job, self._broker, self._directory = job, broker, directory
        self._around = around or Surroundings()
        self._backoff = Backoff(longest_s=10.0)
        self._lead: Lead | None = None
        self._term: Term | None = None
        self._trouble = "connecting"
        self._welcome = False
        check_training(job.settings.strategy.name, job.settings.train, job.settings.round)
        if (job.settings.strategy.name == "fltrust") != (job.root is not None):
            raise ConfigError("strategy.name = 'fltrust' needs a job with `root`, and no other strategy does")
        make_strategy(
            job.settings.combining, job.settings.round
        )  # an unknown one is refused before anything starts

    async def run(self) -> HeadRecord:
        """Returns the last record once the run is finished. A lost connection or lead begins a new term.

        Pauses between terms grow while none gets to work: who lacks the model hands on the lead, to one who has it.
        Raises AccessRefused if it was refused before it ever got in, for then name or password are wrong; and
        MessageTooLarge, for the next term would send the same.
        """
        archive = await asyncio.to_thread(partial(Archive, self._directory, behind_s=self._around.behind_s))
        try:
            while True:
                try:
                    return await self._lead_once(archive)
                except (LeadershipLost, TransportError) as lost:
                    if isinstance(lost, MessageTooLarge) or (isinstance(lost, AccessRefused) and not self._welcome):
                        raise
                    if self._term is not None and self._term.caught_up:
                        self._backoff.reset()
                    self._lead, self._term, self._trouble = None, None, str(lost)
                    pause_s = self._backoff.next_s()
                    log.warning("term_ended", reason=str(lost), next_try_s=round(pause_s, 2))
                    await asyncio.sleep(pause_s)
        finally:
            await archive.close()

    def status(self, now: float) -> RunStatus:
        """What this process does at `now`, and what it waits for."""
        found = self._status(now)
        reason = self._lead.writer.blocked if self._lead is not None else ""
        return status.blocked(found, reason) if reason else found

    def _status(self, now: float) -> RunStatus:
        if self._term is not None:
            return self._term.status(now)
        if self._lead is not None:
            return status.of_standby(self.job.settings, self._lead.name)
        return status.of_connecting(self.job.settings, self._trouble)

    async def _lead_once(self, archive: Archive) -> HeadRecord:
        settings, topology = self.job.settings, Topology(self.job.settings.federation)
        reader = await self._broker.connect(AGGREGATOR, purpose="lead")
        try:
            writer = await self._broker.connect(AGGREGATOR, purpose="publish")
            try:
                await writer.declare(*topology.aggregator_declarations())
                self._welcome = True
                self._lead = Lead(reader, writer, topology, self._around.name(), settings.broker.patience_s)
                lead = await self._lead.acquire()
                self._term = Term(self.job, lead, topology, archive, self._around)
                return await self._term.run()
            finally:
                await writer.close()
        finally:
            await reader.close()


class Term:
    """One term of leadership, from being handed the record to the end of the run or of the connection."""

    def __init__(self, job: Job, lead: Lead, topology: Topology, archive: Archive, around: Surroundings) -> None:
        settings = job.settings
        self.job, self.settings, self.lead, self.topology = job, settings, lead, topology
        self.archive, self.around = archive, around
        self.combining = make_strategy(settings.combining, settings.round, archive.checkpoints.directory)
        self.strategy: Strategy = self.combining  # of the tensors that travel
        ways = Ways(lead.reader, lead.writer, topology, settings, around.store)
        self.models = Models(ways, archive)
        self.intake = Intake(ways, scratch=archive.checkpoints.directory)
        self.garbage = Garbage(ways)
        self.announcer = Announcer(lead, topology, settings, self.strategy.wants)
        self.registry = Registry((), 0.0, settings.broker.liveness_s)
        self.quotas = Quotas(settings.broker.quota_per_s)
        self.blob: tensors.Buffer = lead.payload
        self.model: tensors.Arrays = {}
        self.state_blob: tensors.Buffer = b""
        self.state: tensors.Arrays = {}
        self.round: Round | None = None
        self.removed: set[str] = set()  # as of the message that is read
        self.arrived_s: dict[str, float] = {}  # after the round was opened
        self.end = self.position = self.bytes_up = 0
        self.marks = self.head.marks  # of messages that are known to be there, as of the record
        self.last: Delivery | None = None  # that was read
        self.began = self.refresh_at = 0.0
        self.last_failure = ""

    @property
    def head(self) -> HeadRecord:
        return self.lead.record

    @property
    def _work_bytes(self) -> int:
        """How heavy the strategy's work is. What uses the disk is never light."""
        return len(self.blob) + (self.strategy.uses_disk or self.models.is_large(self.blob)) * LIGHT_BYTES

    @property
    def caught_up(self) -> bool:
        """Whether everything that was in the stream when this term began has been read."""
        return self.position > self.end

    def status(self, now: float) -> RunStatus:
        """What this leader does at `now`, and what it waits for."""
        view = status.View(
            self.settings, self.head, self.round, self.registry, self.quotas, self.caught_up, now - self.began,
            self.last_failure,
        )  # fmt: skip
        return status.of_leader(view, now)

    async def run(self) -> HeadRecord:
        """Reads and decides until the run is finished."""
        if self.head.finished and self.head.run_id != self.settings.run_id:
            await self._read_rest()
        await self._take_over()
        updates = await self._read_to_end()
        self._trust_the_record()
        self._note("caught_up", offset=self.end, round=self.head.round, epoch=self.head.epoch)
        await self._announce()
        while not self.head.finished:
            delivery = await updates.get(self._wait_s())
            if delivery is not None:
                await self._receive(delivery)
            await self._advance(self.around.clock())
        await updates.close()
        await self._announce()
        await self._read_rest()
        return self.head

    async def _read_to_end(self) -> Inbox:
        """Reads what is in the stream already, from where it had been read to; returns what reads on."""
        updates = await self.lead.reader.read(self.topology.updates, offset=self.position)
        while not self.caught_up:
            delivery = await updates.get(self.settings.broker.patience_s)
            if delivery is None:
                raise LeadershipLost(f"{self.topology.updates} gave nothing up to its barrier at {self.end}")
            await self._receive(delivery)
            if isinstance(self.round, Buffer) and self.round.is_full:  # else it would take all that came meanwhile
                await self._close(self.round, self.around.clock())
        return updates

    async def _read_rest(self) -> None:
        """What came when the run was over is late: nobody waits for it, but the ledger tells of it.

        What comes later still is read by whoever leads next: a standby, or the leader of the next run.
        """
        self.end = (await mark_end(self.lead, self.topology, self.settings.broker.patience_s)).offset
        self._start_round()
        await (await self._read_to_end()).close()
        if self.ledger.decided:
            await self._commit_read(self.head.with_(closed=None))

    async def _take_over(self) -> None:
        self.began = self.around.clock()
        takeover = Takeover(self.job, self.lead, self.topology, self.archive, self.models)
        bodies, reading = await takeover.take_over(self.began)
        self.blob, self.model = bodies.model, tensors.decode(bodies.model)
        self._take_state(await off_loop(len(bodies.state), bytearray, bodies.state))  # it may be written over
        self._expect(self.head.round + 1)
        if self.state or self.strategy is not self.combining:  # what is unfit is refused before anybody is asked
            self.strategy.start(self.model, self.state)
        await asyncio.to_thread(self.archive.poison.count, self.head.run_id)
        self.archive.note(self.head)  # the leader before may have died before it could
        self.registry = Registry(self.head.members, self.began, self.settings.broker.liveness_s)
        for participant in self.head.members:
            await self.intake.prepare(participant, self.head.model)
        if self.head.obeyed is None:
            await self.intake.forget(self.head.removed)
        self.refresh_at = self.began + self.settings.broker.refresh_s
        self._start_round()
        self.position, self.end, self.marks = reading.start, reading.end, reading.marks

    def _start_round(self) -> None:
        """Forgets what was decided since the record, or begins what it opened."""
        self.ledger, self.position = Ledger(self.head), self.head.updates_from
        opened = self.head.open and reckoned(self.head.open, self.settings.round, self.around.clock())
        self.round = plan.open_round(opened, self.settings.round) if opened else None
        self.arrived_s.clear()
        self.removed = set(control.removed_at_offset(self.head))
        if self.round and self.round.open.work == "train":
            self._expect(self.round.open.round)
            self.strategy.start(self.model, self.state)

    def _expect(self, number: int) -> None:
        """What travels in a round, and how that is combined."""
        local, fragments = self.settings.personal.patterns, self.settings.strategy.fragments
        self.strategy = self.combining
        if fragments > 1 and isinstance(self.combining, ServerOptimiser):
            self.strategy = Streaming(self.combining, fragments, number)
        if local:
            self.strategy = Partial(self.strategy, local)
        self.intake.expect(due(shared(self.model, local), fragments, number), self.strategy.wants)

    def _wait_s(self) -> float:
        until = self.round.open.deadline if self.round else self.began + self.settings.round.deadline_s
        now = self.around.clock()
        return max(0.0, min(until if until > now or self.round else self.refresh_at, self.refresh_at) - now)

    # -- receiving: every message becomes a decision, in the order of the stream ---------------------------

    async def _receive(self, delivery: Delivery) -> None:
        self.position, self.last = delivery.offset + 1, delivery
        self.bytes_up += len(delivery.body)
        if self.caught_up and not self._admits(delivery):
            return
        message: Message | None = None
        try:
            with self.archive.poison.reading(self.head.run_id, delivery.offset):
                message, payload = decode(delivery.body, FROM_PARTICIPANT)
                match message:
                    case Barrier() if delivery.sender == AGGREGATOR:
                        pass
                    case Control() if delivery.sender == AGGREGATOR:
                        await self._obey(message, delivery.offset)
                    case _:
                        await self._handle(check_sender(message, delivery), payload, delivery)
        except BadMessage as bad:
            await self._refuse(delivery, message, bad)

    def _admits(self, delivery: Delivery) -> bool:
        """Whether its sender is within its quota; if not, the message is not even decoded."""
        who, now = delivery.sender, self.around.clock()
        if who == AGGREGATOR or self.quotas.admit(who, len(delivery.body), now):
            return True
        ignored = self.quotas.ignored(who)
        if ignored.bit_count() == 1:  # 1, 2, 4, 8, ...: a flood of messages is none of log lines
            self._note("quota_exceeded", participant=who, ignored=ignored)
        if delivery.key == f"{who}.{UpdateReady.kind}":
            reason = f"{who} sends more than broker.quota_per_s allows"
            self.ledger.refused(who, 0, delivery.offset, reason, settles=False)
        return False

    async def _handle(self, message: FromParticipant, payload: memoryview, delivery: Delivery) -> None:
        if message.participant in self.removed:
            raise BadMessage(f"{message.participant} was removed by the operator")
        came = self.registry.hear(message.participant, self.around.clock())
        if came and self.round is None and self.caught_up:
            live = self.registry.count(self.around.clock())
            self._note("waiting_for_participants", live=live, expected=self.settings.round.participants)
        match message:
            case UpdateReady():
                await self._update(message, payload, delivery)
            case Join() | Heartbeat():
                await self._heard(message)
            case TrainFailed() if (
                self.round and message.run_id == self.head.run_id and self.round.offers(message.task)
            ):
                self._note("training_failed", participant=message.participant, error=message.error)
                self.last_failure = f"{message.participant} says {message.error}"
                self.round.fail(message.participant, message.task)
            case Leave():
                self.registry.leave(message.participant)
                if self.round:
                    self.round.leave(message.participant)

    async def _update(self, update: UpdateReady, payload: memoryview, delivery: Delivery) -> None:
        offset = delivery.offset
        judged = judge(update, self.head, self.ledger.settled, self.settings.round)
        if judged.verdict != "refused":
            self.garbage.note(update)
        match judged.verdict:
            case "refused":
                raise BadMessage(judged.reason)
            case "duplicate":
                self.ledger.duplicate(update, offset, judged.reason)
            case "late":
                weight = await self._fold(update, payload, judged.staleness) if judged.folds else 0
                self.ledger.late(update, offset, weight, judged.staleness, judged.reason)
            case "counted" if self.round and not self.round.takes_from(update.participant):
                raise BadMessage(f"{update.participant} answers more tasks in one version than round.turns allows")
            case "counted" if self.round:
                weight = await self._fold(update, payload, judged.staleness)
                self.ledger.counted(update, offset, weight, judged.staleness)
                self.quotas.refund(update.participant, len(delivery.body))
                self.round.accept(update.participant, weight, update.task)
                if self.caught_up:  # what is read again came at another time
                    self.arrived_s[update.participant] = self.around.clock() - self.round.open.opened

    async def _fold(self, update: UpdateReady, payload: memoryview, staleness: int) -> int:
        """Adds the update's arrays, if it has any, to the open round's sum; returns the weight."""
        weight = weight_of(update.num_examples, self.settings.round)
        if update.arrays == "none":
            return weight
        if update.arrays != self.strategy.wants:
            raise BadMessage(
                f"strategy {self.settings.strategy.name!r} sums {self.strategy.wants}s, not {update.arrays}s"
            )
        arrays, control = await self.intake.arrays(update, payload, len(self.blob))
        if update.body and update.body.where != "inline":
            self.bytes_up += update.body.size_bytes
        by = Contribution(
            weight, update.participant, update.effective_steps, damping(staleness), controls_in(control),
            update.start_loss,
        )  # fmt: skip
        await off_loop(self._work_bytes, self.strategy.add, arrays, by)
        return weight

    async def _refuse(self, delivery: Delivery, message: Message | None, bad: BadMessage) -> None:
        """Nothing that was accepted is touched; the reason goes to the ledger, the log and the rejected queue.

        If only chunks miss, its task stays open: the worker has them all, and sends them again once it has asked.
        """
        reason = bad.reason
        update = message if isinstance(message, UpdateReady) and message.participant == delivery.sender else None
        task = update.task if update and update.run_id == self.head.run_id else 0
        unread = self.archive.poison.is_refused(self.head.run_id, delivery.offset)
        if unread and self.round and self.round.awaits(delivery.sender):
            task = self.round.open.task  # nobody read it, but it is what was waited for
        answers = self.round is not None and self.round.offers(task) and not isinstance(bad, ChunksMissing)
        self.ledger.refused(delivery.sender, task, delivery.offset, reason, settles=answers)
        if self.round and answers:
            self.round.fail(delivery.sender, task)
            self.last_failure = f"the update of {delivery.sender} was refused: {reason}"
        self._note("update_rejected", participant=delivery.sender, offset=delivery.offset, reason=reason)
        note = Rejected(offset=delivery.offset, participant=delivery.sender, reason=reason[:2000])
        await publish(self.lead.writer, "", self.topology.rejected, encode(note, delivery.body[:QUOTED_BYTES]))

    async def _heard(self, told: Status) -> None:
        self.registry.note_phase(told.participant, told.phase)
        await self.intake.prepare(told.participant, self.head.model)
        if self.round:
            self.round.come_back(told.participant)
        if not self.caught_up:
            return
        if self.round and plan.has_room(self.round.open, told.participant, self.settings):
            cohort = tuple(sorted((*self.round.open.cohort, told.participant)))
            opened = self.round.open.model_copy(update={"cohort": cohort})
            await self._reopen(self.round, self.head.with_(open=opened))
        fates = reply_to(told, self.head, self.ledger.settled, self.round)
        if fates is not None:
            await self.announcer.tell(told.participant, fates, self.round, self.around.clock())

    # -- obeying: what operators want becomes a head record, in the order of the stream ---------------------

    async def _obey(self, wish: Control, offset: int) -> None:
        """Commits what an operator wants, and answers. What is read again is only answered again."""
        is_new = offset >= self.head.updates_from and not control.was_obeyed(wish, self.head)
        answer = control.answer(wish, self.head)
        if answer.done:
            await self._do(wish, is_new=is_new)
            self._note("operator_obeyed", command=wish.command, participant=wish.participant)
        await control.reply(self.lead.writer, self.topology, answer)

    async def _do(self, wish: Control, *, is_new: bool) -> None:
        if wish.command == "remove":
            self._put_out(wish.participant)
            if is_new:
                await self.lead.writer.delete(self.topology.inbox(wish.participant))
        elif wish.command == "admit":
            self.removed.discard(wish.participant)
        if is_new:
            await self._commit_wish(wish)

    async def _commit_wish(self, wish: Control) -> None:
        record = control.changed(wish, self.head).with_(obeyed=control.noted(wish, self.head))
        if self.round is None:
            return await self._commit(record)
        opened = self.round.without(wish.participant) if wish.command == "remove" else self.round.open
        return await self._reopen(self.round, record.with_(open=opened))

    def _put_out(self, participant: str) -> None:
        """From now on it is not waited for, and what it sends is refused."""
        self.removed.add(participant)
        self.registry.leave(participant)
        if self.round:
            self.round.leave(participant)

    def _trust_the_record(self) -> None:
        """Everything was read again, but the stream may have lost Controls that the record holds."""
        self.removed.clear()
        for participant in self.head.removed:
            self._put_out(participant)

    # -- deciding: what the state machine asks for becomes a head record ------------------------------------

    async def _advance(self, now: float) -> None:
        if self.round is None:
            if self.head.wanted == "stop":
                why = why_finished(self.head, self.settings, now)
                await self._commit_progress(self.head.with_(closed=None, finished=why))
            elif plan.enough(self.head, self.registry.count(now), self.settings, now - self.began):
                live = self.registry.live(now)
                await self._commit_progress(
                    plan.opened(self.head, "train", live, self.settings, now).with_(closed=None)
                )
                await self._announce()
        else:
            match self.round.step(now):
                case Step.CLOSE:
                    await self._close(self.round, now)
                case Step.GIVE_UP:
                    raise TaskError(f"everybody failed in round {self.round.open.round}: {self.last_failure}")
                case Step.EXTEND if why := why_finished(self.head, self.settings, now):
                    self.ledger.give_up(f"the run ended before its round closed: {why}")
                    await self._commit_progress(self.head.with_(open=None, closed=None, finished=why))
                case Step.EXTEND:
                    self._note("round_extended", round=self.round.open.round, missing=self.round.missing)
                    await self.models.put_again(self.head.run_id, self.head.model, self.blob)
                    live = self.registry.live(now)
                    await self._reopen(self.round, plan.extended(self.head, self.round, live, self.settings, now))
                    await self._announce()
                case Step.WAIT:
                    await self._invite(self.round, now)
        if now >= self.refresh_at:
            await self._refresh()

    async def _close(self, closing: Round, now: float) -> None:
        """One record closes this round and opens the next."""
        opened = closing.open
        metrics = self._reported(opened.work)
        record = self.head.with_(round=opened.round, metrics={**self.head.metrics, **metrics})
        if opened.work == "train":
            record = await self._new_version(record.with_(metrics=metrics, pace=self._pace(closing, now)))
        if self.job.metric in record.metrics:
            record = record.with_(best=best_of(record, self.job.metric))
        elif opened.work == "evaluate" or evaluation_due(self.settings, "central", opened.round):
            self._note("metric_not_measured", metric=self.job.metric, measured=" ".join(sorted(record.metrics)))
        closed = ClosedRound(
            work=opened.work, round=opened.round, attempt=opened.attempt, task=opened.task, opened=opened.opened,
            closed=now, cohort=len(opened.cohort), bytes_up=self.bytes_up, bytes_down=self.announcer.bytes_down,
            unlisted=self.ledger.unlisted,
        )  # fmt: skip
        self.bytes_up = self.announcer.bytes_down = 0
        record, live = record.with_(closed=closed, open=None), self.registry.live(now)
        await self._commit_progress(plan.continued(record, opened.work, live, self.settings, now, closing.missing))
        if report := report_of(self.head):
            self.around.on_report(report)
        if self.round:
            self.round.goes_on_after(closing)
        if not self.head.finished:
            await self._announce()
        await self.garbage.collect(self.head, now)

    def _reported(self, work: str) -> Metrics:
        """What the participants' own metrics come to."""
        if work == "train":
            return weighted_means(self.ledger.metrics, "train_")
        return weighted_means(self.ledger.metrics, "") | fairness(self.ledger.metrics, self.job.metric)

    def _pace(self, closing: Round, now: float) -> tuple[float, ...]:
        if self.settings.round.deadline == "fixed" or self.settings.round.is_buffered:
            return ()
        return grown(self.head.pace, self.arrived_s.values(), len(closing.missing), now - closing.open.opened)

    async def _new_version(self, record: HeadRecord) -> HeadRecord:
        """The record with the round's new model, stored and measured but not yet committed."""
        step: tensors.Buffer | None = None
        await self._check_base()
        if self.job.root is not None:
            await self._add_root(self.job.root, record.round)
        if self.settings.codec.down != NONE and self.models.is_large(self.blob):
            self.blob, step = await off_loop(self._work_bytes, self._combine_stepwise)
        else:
            self.blob = await off_loop(self._work_bytes, self._combine)
        self.model = tensors.decode(self.blob)
        self._take_state(await off_loop(len(self.blob), self._next_state))
        where = await self.models.put(record.run_id, self.blob)
        state = await self.models.put_state(record.run_id, self.state_blob)
        way = await self._way(record, step)
        metrics = dict(record.metrics)
        if evaluation_due(self.settings, "central", record.round):
            metrics |= await self.job.measure(self.model, self.around.on_notice)
            tensors.give_back(self.blob)
        return record.with_(
            version=record.version + 1, model=where, state=state, previous=record.model, difference=way,
            metrics=metrics,
        )  # fmt: skip

    async def _check_base(self) -> None:
        """What lies on a disk is not built upon before it was looked at. A new term has it from the broker."""
        if self.head.model is not None and tensors.is_mapped(self.blob):
            try:
                await verify(self.blob, self.head.model)
            except BadMessage as damaged:
                raise LeadershipLost(f"the global model's file was damaged: {damaged.reason}") from damaged

    async def _add_root(self, root: Callable[[tensors.Arrays, int], tensors.Arrays], number: int) -> None:
        """Adds the aggregator's own update, as if it were a participant's."""
        trained = await asyncio.to_thread(contained(root), self.model, number)
        own = shared(trained, self.settings.personal.patterns)
        await off_loop(self._work_bytes, self.strategy.add, own, Contribution(1, AGGREGATOR))

    def _combine_stepwise(self) -> tuple[tensors.Buffer, tensors.Buffer]:
        """The version to commit, and its difference to the one before, which stays as it is."""
        arrays, step = difference(self.settings.codec.down, self.model, self.strategy.finish())
        return tensors.encode_in(self.models.room, arrays).toreadonly(), step

    async def _way(self, record: HeadRecord, step: tensors.Buffer | None) -> Difference | None:
        """Where the difference to the record's model is, once it is there."""
        if step is None or record.model is None:
            return None
        body = await self.models.put_difference(record.run_id, step)
        return Difference(base=record.model.sha256, codec=self.settings.codec.down, body=body)

    def _combine(self) -> tensors.Buffer:
        """The new model. A large one is written where its checkpoint will be."""
        blob = tensors.blank(self.model, self.models.room)
        self.strategy.finish(tensors.decode(blob, writable=True))
        return blob.toreadonly()

    def _is_ours(self, blob: tensors.Buffer) -> bool:
        """Whether nobody else looks at these bytes, so that the next state's may take their place."""
        store = self.around.store
        shared = self.around.behind_s or (store is not None and store.hands_over)
        return len(blob) > self.settings.broker.inline_bytes and not shared and not memoryview(blob).readonly

    def _take_state(self, blob: tensors.Buffer) -> None:
        """The strategy goes on from these bytes, and may overwrite them if nobody else looks at them."""
        self.state_blob = blob
        self.state = tensors.decode(blob, writable=self._is_ours(blob)) if blob else {}

    def _next_state(self) -> tensors.Buffer:
        """The bytes of the strategy's state after `finish`; the same buffer if it wrote over the old one."""
        state = self.strategy.state
        if not state or state is self.state:
            return self.state_blob if state else b""
        return tensors.encode_in(tensors.in_memory, state)

    async def _reopen(self, current: Round, record: HeadRecord) -> None:
        """Changes who is asked, or until when; what was accepted stays, for the record's offset stays too."""
        await self._commit(record)
        current.reopen(record.open or current.open)
        for participant in self.removed:
            current.leave(participant)

    async def _commit_progress(self, record: HeadRecord) -> None:
        """Commits all that was read and decided so far, and who is live."""
        await self._commit_read(record.with_(members=tuple(self.registry.live(self.around.clock()))))

    async def _commit_read(self, record: HeadRecord) -> None:
        """Moves the offset to what comes next: what was decided is in the record. Then tells the history."""
        record = record.with_(
            updates_from=self.position,
            marks=marked(self.marks, self.last),
            settled=self.ledger.settled,
            decided=tuple(self.ledger.decided),
            obeyed=None,
        )
        await self._commit(record)
        self.marks = self.head.marks
        self._start_round()
        await self.intake.forget(self.head.removed)
        if self.head.run_id == self.settings.run_id:
            self.archive.note(self.head)
        else:
            await self.archive.note_fates(self.head)

    async def _refresh(self) -> None:
        """The same record again. Without an open round nothing needs to be read again: long waits stay cheap."""
        if self.round is None:
            await self._commit_read(self.head.with_(closed=None))
        else:
            await self._commit(self.head)
        await self.garbage.collect(self.head, self.around.clock())

    async def _commit(self, record: HeadRecord) -> None:
        await self.archive.keep_up()
        await commit(self.lead, record, Bodies(self.blob, self.state_blob))
        self.refresh_at = self.around.clock() + self.settings.broker.refresh_s

    async def _invite(self, current: Round, now: float) -> None:
        """Where nobody waits for the round to close, whoever is done is asked for more, or somebody else is."""
        if self.settings.round.is_buffered:
            for participant in current.invited(self.registry.live(now), self.settings.seed):
                await self.announcer.tell(participant, {}, current, now)

    def _note(self, event: str, **fields: object) -> None:
        self.around.on_notice(event, fields)

    async def _announce(self) -> None:
        now = self.around.clock()
        await self.announcer.announce(self.round, self.registry.live(now), now)
