"""Operators pause, resume and stop a run, remove participants and admit them again: through the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from aggregator.daemon import Aggregator
from aggregator.settings import RunSettings
from aggregator.status import RunStatus
from broker.errors import AccessRefused, ConfigError, StateError, Unroutable
from broker.faults import Fault, FaultAt, Faults, FaultyBroker, NoFaults
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.messages import Answer, Command, Control, UpdateReady
from broker.topology import AGGREGATOR, OPERATOR, Topology
from broker.wire import decode, encode
from fluffle import control
from tests.federation import Crowd, Federation, names, settings

TOPOLOGY = Topology("default")


@dataclass
class Run:
    """A run, its workers, and an operator who talks to it."""

    federation: Federation
    aggregator: Aggregator
    running: asyncio.Task[HeadRecord]
    crowd: Crowd

    async def wish(self, command: Command, participant: str = "") -> str:
        return await control.command(self.federation.broker, TOPOLOGY, control.wish(command, participant), 10.0)

    def status(self) -> RunStatus:
        return self.aggregator.status(self.aggregator._around.clock())

    async def until(self, true: Callable[[RunStatus], bool]) -> RunStatus:
        """Reads what comes into the log until the status is so; every message may change it."""
        reader = await self.federation.broker.connect(AGGREGATOR, purpose="audit")
        log = await reader.read(TOPOLOGY.updates, offset="next")
        while not true(self.status()):
            await log.get(0.05)
        await reader.close()
        return self.status()

    def take_over(self) -> None:
        """The leader loses its connection and forgets everything; then it, or a standby, leads."""
        assert isinstance(self.federation.broker, MemoryBroker)
        for connection in self.federation.broker.connections:
            if (connection.user, connection.purpose) == (AGGREGATOR, "lead"):
                connection.abort()

    async def taken_over(self) -> None:
        """Returns once another term leads and has read again what the one before had read."""
        epoch = self.status().epoch
        self.take_over()
        await self.until(lambda now: now.epoch > epoch and "end of the log" not in now.waits_for)


@asynccontextmanager
async def running(
    directory: Path, run: RunSettings, *, size: int = 7, broker: MemoryBroker | None = None
) -> AsyncIterator[Run]:
    federation = Federation(
        broker or MemoryBroker(TOPOLOGY.access), directory, names(4), size=size, heartbeat_s=0.1
    )
    if broker is None:
        connection = await federation.broker.connect(AGGREGATOR, purpose="audit")
        await connection.declare(*TOPOLOGY.aggregator_declarations())
    aggregator = federation.aggregator(run)
    async with asyncio.timeout(30), federation.crowd() as crowd:
        task = asyncio.create_task(aggregator.run())
        yield Run(federation, aggregator, task, crowd)
        task.cancel()


def digest(head: HeadRecord) -> str:
    assert head.model is not None
    return head.model.sha256


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest after four rounds of three participants."""
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path_factory.mktemp("quiet"), names(3))
    return digest(asyncio.run(federation.run(settings(3, rounds=4))))


# -- pause, resume, stop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken_over", [False, True])
async def test_a_pause_holds_after_the_round_and_resume_goes_on_with_the_same_bits(
    undisturbed: str, tmp_path: Path, taken_over: bool
) -> None:
    async with running(tmp_path, settings(3, rounds=4)) as run:
        run.crowd.start(*names(3), lag_s=0.3)
        await run.federation.closed(1)
        assert await run.wish("pause") == "paused: round 2 goes on to its close, then no round opens until resume"
        assert run.status().waits_for.endswith("; then the operator: paused")
        if taken_over:
            await run.taken_over()
        await run.federation.closed(2)
        assert await run.wish("pause") == "already paused"
        if taken_over:
            await run.taken_over()
        await asyncio.sleep(0.5)
        assert len(run.federation.reports) == 2
        assert run.status().waits_for == "the operator: paused"
        assert await run.wish("resume") == "resumed: rounds open as soon as enough participants are live"
        head = await run.running
    assert digest(head) == undisturbed
    assert [report.attempt for report in run.federation.reports] == [1, 1, 1, 1]


async def test_the_last_word_counts_whoever_reads_it_again(undisturbed: str, tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4)) as run:
        run.crowd.start(*names(3), lag_s=0.5)
        await run.until(lambda now: now.work == "train")
        for command in ("pause", "pause", "stop", "resume", "pause", "resume", "resume"):
            await run.wish(command)
        await run.taken_over()
        assert run.status().wanted == "run"
        head = await run.running
    assert digest(head) == undisturbed


async def test_a_long_pause_is_not_read_again_and_changes_nothing_else(undisturbed: str, tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4, broker={"refresh_s": 0.2})) as run:
        run.crowd.start("p01", "p02")
        await run.until(lambda now: len(now.live) == 2)
        await asyncio.sleep(0.5)
        assert run.federation.reports == []  # the first round still waits for everybody
        run.crowd.start("p03", lag_s=0.2)
        await run.federation.closed(1)
        await run.wish("pause")
        await run.federation.closed(2)
        before = run.aggregator._term.head.updates_from
        await run.until(lambda now: run.aggregator._term.head.updates_from > before + 10)
        await run.taken_over()
        assert run.status().waits_for == "the operator: paused"
        await run.wish("resume")
        head = await run.running
    assert digest(head) == undisturbed
    assert [report.round for report in run.federation.reports] == [1, 2, 3, 4]


async def test_a_word_that_came_while_nobody_led_is_obeyed_by_who_leads_next(tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4)) as run:
        run.crowd.start(*names(3), lag_s=0.2)
        await run.federation.closed(1)
        run.running.cancel()
        await asyncio.wait([run.running])
        with pytest.raises(StateError, match=r"no aggregator answered within 0.1 s: .* federation 'default'\?"):
            await control.command(run.federation.broker, TOPOLOGY, control.wish("stop"), 0.1)
        head = await run.federation.aggregator(settings(3, rounds=4)).run()
    assert head.finished == "stopped by the operator"


async def test_stop_finishes_the_run_when_the_open_round_closes(tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4)) as run:
        run.crowd.start(*names(3), lag_s=0.2)
        await run.federation.closed(1)
        assert await run.wish("stop") == "stopping: round 2 goes on to its close, then the run is finished"
        head = await run.running
        for worker in run.crowd.workers.values():
            await worker.finished.wait()
    assert (head.finished, head.round, head.version) == ("stopped by the operator", 2, 2)
    assert run.status().waits_for == "nothing: the run is finished (stopped by the operator)"


async def test_stop_finishes_a_paused_run_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4)) as run:
        run.crowd.start(*names(3), lag_s=0.2)
        await run.federation.closed(1)
        await run.wish("pause")
        await run.federation.closed(2)
        assert await run.wish("stop") == "stopping: the run is finished"
        head = await run.running
    assert (head.finished, head.round) == ("stopped by the operator", 2)


async def test_stop_finishes_a_round_that_nobody_answers_at_its_deadline(tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4, round={"deadline_s": 1.0})) as run:
        run.crowd.start("p01", "p02")
        run.crowd.start("p03", lag_s=60.0)
        await run.until(lambda now: len(now.accepted) == 2)
        await run.wish("stop")
        head = await run.running
    assert (head.finished, head.round, head.version) == ("stopped by the operator", 0, 0)


async def test_a_wish_for_another_run_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=4)) as run:
        await run.until(lambda now: now.role == "leader")
        with pytest.raises(StateError, match="pause was refused: the run here is run-1, not run-2"):
            await control.command(run.federation.broker, TOPOLOGY, control.wish("pause", run_id="run-2"))
        assert run.status().wanted == "run"


# -- remove and admit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 1 << 17])  # in messages, in chunks
async def test_a_round_closes_without_the_removed_until_it_is_admitted_again(tmp_path: Path, size: int) -> None:
    async with running(tmp_path, settings(3, rounds=99), size=size) as run:
        run.crowd.start("p01", "p02", lag_s=0.1)
        run.crowd.start("p03", lag_s=60.0)
        await run.until(lambda now: now.missing == ("p03",))
        removed = await run.wish("remove", "p03")
        assert removed == "removed p03: it is not asked any more, and what it sends is refused"
        await run.federation.closed(1)
        await run.crowd.vanish("p03")
        run.crowd.start("p03", lag_s=0.1)
        await run.federation.closed(4)
        assert {(r.cohort, r.accepted) for r in run.federation.reports} == {(2, 2)}
        assert (run.status().removed, [p.name for p in run.status().live]) == (("p03",), ["p01", "p02"])
        assert sum(report.rejected for report in run.federation.reports) >= 1
        assert (await run.wish("admit", "p03")).startswith("admitted p03")
        await run.until(lambda now: "p03" in now.accepted)
        await run.wish("stop")
        await run.running
    ledger = await run.federation.ledger()
    assert {d.reason for d in ledger if d.participant == "p03" and d.verdict == "refused"} == {
        "p03 was removed by the operator"
    }
    assert "counted" in {d.verdict for d in ledger if d.participant == "p03"}


async def test_what_the_removed_delivered_before_counts_also_after_a_takeover(tmp_path: Path) -> None:
    """Who replays must not refuse what the leader before believed: the update is older than the removal."""
    async with running(tmp_path, settings(3, rounds=2), size=1 << 17) as run:  # in chunks
        run.crowd.start("p01", "p03")
        run.crowd.start("p02", lag_s=1.5)
        await run.until(lambda now: now.accepted == ("p01", "p03"))
        await run.wish("remove", "p03")
        await run.taken_over()
        assert (run.status().accepted, run.status().missing) == (("p01", "p03"), ("p02",))
        await run.running
    assert [(report.cohort, report.accepted) for report in run.federation.reports] == [(3, 3), (2, 2)]


async def test_what_was_refused_stays_refused_when_it_is_read_again(tmp_path: Path) -> None:
    """Removed and admitted in one round: what came in between is refused by whoever reads it."""
    async with running(tmp_path, settings(3, rounds=1)) as run:
        run.crowd.start("p01")
        run.crowd.start("p02", "p03", lag_s=2.0)
        await run.until(lambda now: now.accepted == ("p01",))
        await run.wish("remove", "p02")
        connection = await run.federation.broker.connect("p02", purpose="publish")
        head = run.aggregator._term.head
        forged = UpdateReady(
            participant="p02", run_id="run-1", epoch=head.epoch, task=head.task, base_sha256=head.model.sha256,
            arrays="none", num_examples=1,
        )  # fmt: skip
        await connection.publish(TOPOLOGY.up, "p02.update", encode(forged))
        await run.wish("admit", "p02")
        await run.taken_over()
        await run.running
    refused = [d for d in await run.federation.ledger() if d.verdict == "refused" and d.task]
    assert [(d.participant, d.reason) for d in refused] == [("p02", "p02 was removed by the operator")]


async def test_removing_everybody_leaves_a_round_that_waits_for_others(tmp_path: Path) -> None:
    async with running(tmp_path, settings(1, rounds=1, round={"deadline_s": 0.5})) as run:
        run.crowd.start("p01", lag_s=60.0)
        await run.until(lambda now: now.missing == ("p01",))
        await run.wish("remove", "p01")
        await run.taken_over()
        assert run.status().missing == ()
        await run.until(lambda now: now.attempt >= 2)
        assert run.status().missing == ()
        run.crowd.start("p02")
        await run.running
    assert {d.participant for d in await run.federation.ledger() if d.verdict == "counted"} == {"p02"}


@pytest.mark.parametrize("everything", [False, True])
async def test_a_log_that_lost_what_was_said_does_not_undo_it(tmp_path: Path, everything: bool) -> None:
    """Streams are not synced to disk, the record is: a broker without power forgets Controls, not what they did."""
    async with running(tmp_path, settings(3, rounds=9)) as run:
        run.crowd.start("p01", "p02", lag_s=1.0)
        run.crowd.start("p03", lag_s=60.0)
        await run.until(lambda now: len(now.missing) == 3)
        await run.wish("remove", "p03")
        await run.wish("pause")
        broker = run.federation.broker
        assert isinstance(broker, MemoryBroker)
        first, end = await offsets(run.federation)
        broker.lose_stream_tail(TOPOLOGY.updates, end if everything else end - first)
        await run.taken_over()
        now = run.status()
        assert (now.wanted, now.removed, now.missing) == ("pause", ("p03",), ("p01", "p02"))
        await run.federation.closed(1)
        await run.until(lambda now: len(now.live) == 2)
        assert run.status().waits_for == "the operator: paused"


async def offsets(federation: Federation) -> tuple[int, int]:
    """That of the first Control, and the end of the log."""
    reader = await federation.broker.connect(AGGREGATOR, purpose="audit")
    log = await reader.read(TOPOLOGY.updates, offset="first")
    controls, end = [], 0
    while (delivery := await log.get(0)) is not None:
        end = delivery.offset + 1
        controls += [delivery.offset] if isinstance(decode(delivery.body)[0], Control) else []
    await reader.close()
    return controls[0], end


async def test_who_was_removed_stays_removed_in_the_next_run(tmp_path: Path) -> None:
    async with running(tmp_path / "1", settings(2, rounds=1)) as run:
        run.crowd.start("p01", "p02", lag_s=0.2)
        await run.until(lambda now: now.role == "leader")
        await run.wish("remove", "p03")
        await run.running
        run.crowd.start("p03")
        run.federation.directory = tmp_path / "2"
        head = await run.federation.aggregator(settings(2, rounds=3, run_id="run-2")).run()
    assert head.removed == ("p03",)
    assert head.wanted == "run"
    assert {d.participant for d in await run.federation.ledger("run-2") if d.verdict == "counted"} == {"p01", "p02"}


async def test_the_queues_of_the_removed_are_gone(tmp_path: Path) -> None:
    async with running(tmp_path, settings(2, rounds=99, broker={"inline_bytes": 0})) as run:
        broker = run.federation.broker
        assert isinstance(broker, MemoryBroker)
        run.crowd.start("p01", "p02", lag_s=0.1)
        await run.federation.closed(1)
        assert TOPOLOGY.outbox("p02") in broker.stats().streams
        await run.crowd.vanish("p02")
        await run.wish("remove", "p02")
        assert TOPOLOGY.inbox("p02") not in broker.stats().queues
        await run.wish("admit", "p02")
        run.crowd.start("p02")
        await run.until(lambda now: "p02" in now.accepted)
        assert not [name for name in broker.stats().queues if OPERATOR in name]


# -- status ---------------------------------------------------------------------------------------------------


async def soon(true: Callable[[], bool]) -> None:
    """Looks until it is so, where nobody sends a message."""
    while True:
        if true():
            return
        await asyncio.sleep(0.01)


async def test_every_aggregator_tells_what_it_does(tmp_path: Path) -> None:
    broker = MemoryBroker(TOPOLOGY.access)
    broker.stop()
    async with running(tmp_path, settings(3, rounds=4), broker=broker) as run:
        standby = run.federation.aggregator(settings(3, rounds=4))
        assert run.status().waits_for == "the broker: connecting"
        other = asyncio.create_task(standby.run())
        await soon(lambda: "is stopped" in run.status().waits_for)
        assert run.status().role == "connecting"
        broker.start()
        run.crowd.start("p01", "p02")
        run.crowd.start("p03", lag_s=60.0)
        await soon(lambda: {run.status().role, standby.status(0.0).role} == {"leader", "standby"})
        if run.status().role == "standby":
            run.aggregator, standby = standby, run.aggregator
        assert standby.status(0.0).waits_for == "the leader's place: standing by"
        now = await run.until(lambda now: now.missing == ("p03",) and now.live[2].phase == "training")
        assert (now.round, now.rounds, now.attempt, now.cohort, now.accepted) == (1, 4, 1, 3, ("p01", "p02"))
        assert now.waits_for.startswith("updates of p03 until the deadline in ")
        assert now.deadline_left_s
        other.cancel()


# -- who may say it, and faults -------------------------------------------------------------------------------


async def test_a_participant_cannot_control_a_run(tmp_path: Path) -> None:
    async with running(tmp_path, settings(3, rounds=2)) as run:
        run.crowd.start("p01", "p02", lag_s=0.2)
        await run.until(lambda now: len(now.live) == 2)
        connection = await run.federation.broker.connect("p03", purpose="publish")
        frame = encode(Control(command="stop", nonce="n1"))
        with pytest.raises(AccessRefused):
            await connection.publish("", TOPOLOGY.updates, frame)
        with pytest.raises(Unroutable):
            await connection.publish(TOPOLOGY.up, "p03.control", frame)
        for kind in ("join", "update"):
            await connection.publish(TOPOLOGY.up, f"p03.{kind}", frame)
        run.crowd.start("p03", lag_s=0.2)
        head = await run.running
    assert head.finished == "all 2 rounds done"
    reasons = [d.reason for d in await run.federation.ledger() if d.verdict == "refused"]
    assert reasons == ["a control message is nothing that a participant sends"] * 2


async def test_a_federation_without_an_aggregator_is_told_apart(tmp_path: Path) -> None:
    broker = MemoryBroker(TOPOLOGY.access)
    with pytest.raises(
        StateError, match=r"federation 'default' is not set up on this broker .* start its aggregator"
    ):
        await control.command(broker, TOPOLOGY, control.wish("pause"), 0.1)
    assert broker.stats().queues == {}


@pytest.mark.parametrize("name", ["operator", "all", "aggregator", "Not A Name"])
def test_nobody_is_called_that(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid name"):
        control.wish("remove", name)


async def told(broker: MemoryBroker, topology: Topology) -> list[Answer]:
    """Every answer that reached an operator who listens all the time."""
    connection = await broker.connect(AGGREGATOR, purpose="audit")
    await connection.declare(*topology.aggregator_declarations(), *topology.operator_declarations("audit"))
    inbox = await connection.consume(topology.operator_inbox("audit"))
    answers: list[Answer] = []

    async def listen() -> None:
        while (delivery := await inbox.get()) is not None:
            message, _ = decode(delivery.body)
            assert isinstance(message, Answer)
            answers.append(message)

    broker.listening = asyncio.create_task(listen())  # type: ignore[attr-defined] # lest it be collected
    return answers


SAID = [control.wish("pause"), control.wish("remove", "p09"), control.wish("admit", "p09"), control.wish("resume")]


async def run_with(faults: Faults, directory: Path) -> tuple[HeadRecord, list[Answer]]:
    """A leader and a standby behind `faults`, and an operator whose words end as they began."""
    memory = MemoryBroker(TOPOLOGY.access)
    answers = await told(memory, TOPOLOGY)
    federation = Federation(memory, directory, names(3), heartbeat_s=0.1)
    async with asyncio.timeout(60), federation.crowd() as crowd:
        crowd.start("p01", "p02")
        crowd.start("p03", lag_s=0.15)
        federation.broker = FaultyBroker(memory, faults)
        aggregators = [asyncio.create_task(federation.aggregator(settings(3, rounds=2)).run()) for _ in range(2)]
        await say(memory)
        done, waiting = await asyncio.wait(aggregators, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
    return done.pop().result(), answers


async def say(broker: MemoryBroker) -> None:
    """Speaks once the first update is in, and does not wait for answers."""
    connection = await broker.connect(AGGREGATOR, purpose="operator")
    log = await connection.read(TOPOLOGY.updates, offset="first")
    while (heard := await log.get()) is not None and not heard.key.endswith(".update"):
        pass
    for wish in SAID:
        await connection.publish("", TOPOLOGY.updates, encode(wish))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("purpose", ["lead", "publish"])
async def test_a_cut_at_any_operation_changes_neither_the_model_nor_what_is_wanted(
    purpose: str, tmp_path: Path
) -> None:
    watch = NoFaults()
    quiet, answers = await run_with(watch, tmp_path / "quiet")
    assert [answer.nonce for answer in answers] == [wish.nonce for wish in SAID]
    said = {answer.nonce: answer.text for answer in answers}
    for index in range(0, watch.count(AGGREGATOR, purpose), 5):
        fault = FaultAt(AGGREGATOR, purpose, index, Fault("disconnect"))
        head, answers = await run_with(fault, tmp_path / str(index))
        assert (digest(head), head.wanted, head.removed) == (digest(quiet), "run", ())
        assert {answer.nonce for answer in answers} == set(said), index
        first = ("paused: ", "removed p09: ", "admitted p09: ", "resumed: ")  # and never "already paused"
        assert all(answer.text.startswith(first) for answer in answers)
