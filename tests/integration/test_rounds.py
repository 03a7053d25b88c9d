"""Whole runs with participants that are slow, fail, vanish, come back, come late, or leave."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from aggregator.fairness import views_of
from aggregator.job import Surroundings
from aggregator.registry import sample
from aggregator.settings import RunSettings
from broker import tensors
from broker.errors import BadMessage, ConfigError, StateError
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.memory_store import Entry
from broker.messages import Heartbeat, Leave, Message, TrainFailed, UpdateReady
from broker.tensors import Arrays
from broker.topology import AGGREGATOR, Topology
from broker.wire import decode, encode
from tests.federation import Crowd, Federation, Pull, Step, names, settings
from workers.journal import FileJournal
from workers.task import TrainConfig, TrainResult, WorkAbandoned
from workers.trainer import Sizes

TOPOLOGY = Topology("default")
STREAMS = {"inline_bytes": 0, "chunk_bytes": 1024}
SLACK_S = 1.0  # a loaded machine is late, but not by more


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path, names(3))
    federation.heartbeat_s = 0.2
    return federation


@asynccontextmanager
async def running(federation: Federation, run: RunSettings, **options: object) -> AsyncIterator[Run]:
    """An aggregator at work, workers that come and go, and an end to all waiting."""
    connection = await federation.broker.connect(AGGREGATOR, purpose="audit")
    await connection.declare(*TOPOLOGY.aggregator_declarations())
    async with asyncio.timeout(30), federation.crowd() as crowd:
        yield Run(crowd, asyncio.create_task(federation.aggregator(run, **options).run()))


@dataclass(frozen=True)
class Run:
    crowd: Crowd
    aggregator: asyncio.Task[HeadRecord]


async def messages(federation: Federation, patience_s: float) -> AsyncIterator[tuple[str, Message]]:
    """Everything that participants say, oldest first, until nothing came for so long."""
    reader = await federation.broker.connect(AGGREGATOR, purpose="audit")
    inbox = await reader.read(TOPOLOGY.updates, offset="first")
    while (delivery := await inbox.get(patience_s)) is not None:
        with suppress(BadMessage):
            yield delivery.sender, decode(delivery.body)[0]
    await reader.close()


async def said(federation: Federation, kind: type[Message]) -> list[tuple[str, Message]]:
    """What participants said of that kind."""
    return [(sender, message) async for sender, message in messages(federation, 0) if isinstance(message, kind)]


def is_update(entry: Entry | None) -> bool:
    return entry is not None and isinstance(decode(entry.body)[0], UpdateReady)


async def updates_there(federation: Federation, count: int) -> None:
    """Returns once so many updates arrived."""
    async with aclosing(messages(federation, 10.0)) as heard:
        async for _, message in heard:
            count -= isinstance(message, UpdateReady)
            if count == 0:
                return


async def at_work(federation: Federation, name: str) -> None:
    """Returns once that participant said that it trains."""
    async with aclosing(messages(federation, 10.0)) as heard:
        async for sender, message in heard:
            if sender == name and isinstance(message, Heartbeat) and message.phase == "training":
                return


async def model_of(federation: Federation, head: HeadRecord) -> Arrays:
    path = federation.directory / "checkpoints" / f"{digest(head)}.safetensors"
    return tensors.decode(await asyncio.to_thread(path.read_bytes))


async def of_group(awaitable: Awaitable[HeadRecord]) -> HeadRecord:
    """The one error of task groups as itself."""
    try:
        return await awaitable
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            [error] = error.exceptions
        raise error from None


def digest(head: HeadRecord) -> str:
    assert head.model is not None
    return head.model.sha256


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest after four rounds of three participants with nothing in their way."""
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path_factory.mktemp("quiet"), names(3))
    return digest(asyncio.run(federation.run(settings(3, rounds=4))))


# -- slow ones and vanished ones ------------------------------------------------------------------------------


class Stubborn(Pull):
    """Takes its time and does not look whether that still makes sense."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name)
        self.seconds = seconds

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        time.sleep(self.seconds)
        return super().train(arrays, config)


async def test_rounds_close_at_the_deadline_with_the_quorum_whoever_is_slow_or_gone(
    federation: Federation,
) -> None:
    """Ten participants; p01 is five times slower than the deadline lets it be, p10 vanishes and returns."""
    deadline_s = 0.8
    run = settings(10, rounds=7, round={"quorum": 7, "deadline_s": deadline_s})
    federation.tasks["p01"] = Stubborn("p01", 5 * 0.24)
    async with running(federation, run) as job:
        job.crowd.start("p01", "p10")
        job.crowd.start(*names(9)[1:], lag_s=0.1)
        await federation.closed(1)
        await job.crowd.vanish("p10")
        away_from = len(federation.reports)
        await federation.closed(4)
        back_at = len(federation.reports) + 1
        job.crowd.start("p10")
        head = await job.aggregator
    rounds = federation.reports
    assert len(rounds) == 7
    assert all(report.accepted >= 7 and report.attempt == 1 for report in rounds)
    assert all(report.duration_s < deadline_s + SLACK_S for report in rounds)
    ledger = await federation.ledger()
    late = Counter(line.participant for line in ledger if line.verdict == "late")
    assert late["p01"] >= 2
    assert sum(report.late for report in rounds) == late.total()
    assert sum(report.accepted for report in rounds) == sum(line.verdict == "counted" for line in ledger)
    # It finds the task that is current when it returns, no older one, and takes part again.
    returned = [number for number in federation.tasks["p10"].trained if number > away_from + 1]
    assert returned
    assert returned[0] >= back_at
    assert returned == list(range(returned[0], 8))
    assert ("p10", "counted") in {(line.participant, line.verdict) for line in ledger if line.task >= back_at}
    assert head.version == 7


async def test_rounds_close_on_the_target_and_nobody_waits_for_the_slow_one(federation: Federation) -> None:
    federation.tasks["p03"] = Stubborn("p03", 0.5)
    async with running(federation, settings(3, rounds=8, round={"target": 2})) as job:
        job.crowd.start("p03")
        job.crowd.start("p01", "p02", lag_s=0.1)
        await job.aggregator
    assert all(report.accepted == 2 for report in federation.reports)
    assert all(report.duration_s < 0.4 + SLACK_S for report in federation.reports)
    late = [line for line in await federation.ledger() if line.verdict == "late"]
    assert {line.participant for line in late} == {"p03"}
    assert all((line.weight, line.staleness > 0) == (0, True) for line in late)


async def test_late_updates_fold_damped_by_staleness(federation: Federation) -> None:
    federation.tasks |= {"p01": Step(0.0), "p02": Step(0.0), "p03": Step(1.0)}
    run = settings(3, rounds=10, round={"target": 2, "late": "fold"})
    async with running(federation, run) as job:
        job.crowd.start("p03", lag_s=0.5)
        job.crowd.start("p01", "p02", lag_s=0.1)
        head = await job.aggregator
    ledger = await federation.ledger()
    late = [line for line in ledger if line.verdict == "late"]
    assert {line.participant for line in late} == {"p03"}
    assert all(line.weight == 1000 for line in late)
    assert max(line.staleness for line in late) >= 2
    # Each fold moves the model by its share of the round it came in, damped: with two updates as heavy.
    expected = sum(1 / math.sqrt(1 + line.staleness) / 3 for line in late)
    model = await model_of(federation, head)
    assert model["w"] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < len(late) / 3


async def test_a_robust_strategy_takes_a_folded_late_update_as_one_among_the_others(federation: Federation) -> None:
    federation.tasks |= {f"p0{i + 1}": Step(value) for i, value in enumerate((0.0, 1.0, 2.0, 9.0))}
    rounds = {"target": 3, "quorum": 3, "late": "fold"}
    async with running(federation, settings(4, rounds=8, round=rounds, strategy={"name": "median"})) as job:
        job.crowd.start("p04", lag_s=0.5)
        job.crowd.start("p01", "p02", "p03", lag_s=0.1)
        head = await job.aggregator
    folded = [line for line in await federation.ledger() if line.verdict == "late" and line.weight]
    assert {line.participant for line in folded} == {"p04"}
    model = await model_of(federation, head)
    assert model["w"] == pytest.approx(8 * 1.0 + 0.5 * len(folded))  # of 0, 1, 2; of 0, 1, 2, 9


# -- attempts, and who comes late -----------------------------------------------------------------------------


async def test_below_the_quorum_attempts_go_on_until_somebody_appears(federation: Federation) -> None:
    run = settings(3, rounds=2, round={"quorum": 3, "deadline_s": 0.3, "deadline_growth": 1.5})
    async with running(federation, run) as job:
        job.crowd.start("p01", "p02")
        job.crowd.start("p03", lag_s=60.0)
        await at_work(federation, "p03")
        await job.crowd.vanish("p03")
        await asyncio.sleep(1.0)
        assert federation.reports == []
        job.crowd.start("p03")
        head = await job.aggregator
    first = federation.reports[0]
    assert first.attempt >= 2
    assert (first.accepted, first.late, first.rejected, first.duplicate) == (3, 0, 0, 0)
    assert len(await said(federation, UpdateReady)) == 6  # nobody sent anything again for a further attempt
    quiet = Federation(MemoryBroker(), federation.directory / "quiet", names(3))
    assert digest(head) == digest(await quiet.run(settings(3, rounds=2)))


async def test_who_vanished_is_replaced_by_a_reserve(federation: Federation) -> None:
    run = settings(3, rounds=1, round={"cohort": 2, "deadline_s": 0.5}, broker={"liveness_s": 0.7})
    asked = sample(names(3), 2, run.seed, 1)
    [reserve] = set(names(3)) - set(asked)
    async with running(federation, run) as job:
        job.crowd.start(asked[0], reserve)
        job.crowd.start(asked[1], lag_s=60.0)
        await updates_there(federation, 1)
        await job.crowd.vanish(asked[1])
        await job.aggregator
    counted = [line.participant for line in await federation.ledger() if line.verdict == "counted"]
    assert sorted(counted) == sorted([asked[0], reserve])


async def test_who_joins_in_the_middle_is_asked_in_the_open_round(federation: Federation) -> None:
    async with running(federation, settings(2, rounds=2)) as job:
        job.crowd.start("p01", "p02", lag_s=0.6)
        await at_work(federation, "p01")
        job.crowd.start("p03")
        await job.aggregator
    assert [(report.cohort, report.accepted) for report in federation.reports] == [(3, 3), (3, 3)]
    assert federation.tasks["p03"].trained == [1, 2]


@pytest.mark.parametrize("journal", ["kept", "lost"])
async def test_a_worker_that_restarts_in_good_order_is_asked_again_in_the_open_round(
    federation: Federation, undisturbed: str, journal: str
) -> None:
    """It must not cost the round its deadline, which is half a minute here."""
    async with running(federation, settings(3, rounds=4)) as job:
        job.crowd.start("p01", "p02")
        job.crowd.start("p03", lag_s=60.0)
        await at_work(federation, "p03")
        await job.crowd.stop("p03")
        if journal == "lost":
            del federation.journals["p03"]
        job.crowd.start("p03")
        head = await job.aggregator
    assert digest(head) == undisturbed
    assert [report.attempt for report in federation.reports] == [1, 1, 1, 1]


# -- tasks that fail, workers that stop -----------------------------------------------------------------------


class Fails(Pull):
    """Raises, or returns nonsense, in its first round."""

    def __init__(self, name: str, fault: Callable[[Arrays], TrainResult]) -> None:
        super().__init__(name)
        self.fault = fault

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        return self.fault(arrays) if config.round == 1 else super().train(arrays, config)


def raises(error: Exception) -> Callable[[Arrays], TrainResult]:
    def fault(arrays: Arrays) -> TrainResult:
        raise error

    return fault


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raises(ValueError("no such column: age")), "ValueError: no such column: age"),
        (raises(RuntimeError("x" * 5000)), "RuntimeError: xxx"),
        (raises(OSError("cannot open \udcff\x00")), "OSError: cannot open"),
        (raises(MemoryError()), "MemoryError"),
        (raises(StopIteration()), "StopIteration"),
        (lambda arrays: TrainResult({**arrays, "v": np.zeros(1)}, 10), "other arrays .* unknown tensor 'v'"),
        (lambda arrays: TrainResult({"w": arrays["w"]}, 10), "other arrays .* 'steps' is missing"),
        (lambda arrays: TrainResult(dict(arrays), 10, {"loss": math.nan}), "metric 'loss' is nan"),
        (lambda arrays: TrainResult(dict(arrays), 0), "num_examples"),
        (lambda arrays: None, "'NoneType'"),
    ],
    ids=["raises", "a long error", "not text", "no memory", "stop", "more", "less", "NaN", "no examples", "none"],
)  # fmt: skip
async def test_a_task_that_fails_is_reported_and_its_worker_lives_on(
    federation: Federation, fault: Callable[[Arrays], TrainResult], reason: str
) -> None:
    federation.tasks["p03"] = Fails("p03", fault)
    async with running(federation, settings(3, rounds=2, round={"quorum": 2})) as job:
        job.crowd.start(*names(3))
        await job.aggregator
    assert [(report.cohort, report.accepted) for report in federation.reports] == [(3, 2), (3, 3)]
    assert federation.reports[0].duration_s < SLACK_S + 1  # nobody waits for what failed
    [(sender, failure)] = await said(federation, TrainFailed)
    assert isinstance(failure, TrainFailed)
    assert (sender, failure.task) == ("p03", 1)
    assert re.search(reason, failure.error)


async def test_a_failed_task_is_offered_again_with_the_next_attempt(federation: Federation) -> None:
    failures = 0

    def fault(arrays: Arrays) -> TrainResult:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise RuntimeError("not now")
        return TrainResult(dict(arrays), 10)

    federation.tasks["p03"] = Fails("p03", fault)
    run = settings(3, rounds=1, round={"deadline_s": 0.3, "deadline_growth": 1.0})
    async with running(federation, run) as job:
        job.crowd.start(*names(3))
        await job.aggregator
    assert (federation.reports[0].accepted, federation.reports[0].attempt) == (3, 3)


class Endless(Pull):
    """Trains until it is told that this became pointless."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.stopped: list[int] = []

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        while not config.should_stop():
            time.sleep(0.005)
        self.stopped.append(config.round)
        raise WorkAbandoned("told to stop")


async def test_a_newer_round_makes_running_work_stop(federation: Federation) -> None:
    endless = federation.tasks["p03"] = Endless("p03")
    async with running(federation, settings(3, rounds=4, round={"target": 2})) as job:
        job.crowd.start("p03")
        job.crowd.start("p01", "p02", lag_s=0.1)
        await job.aggregator
    assert endless.stopped[:3] == [1, 2, 3]
    assert await said(federation, TrainFailed) == []
    assert {sender for sender, _ in await said(federation, UpdateReady)} == {"p01", "p02"}


async def test_a_worker_that_is_stopped_abandons_its_training_and_leaves(federation: Federation) -> None:
    endless = federation.tasks["p03"] = Endless("p03")
    async with running(federation, settings(3, rounds=3, round={"quorum": 2})) as job:
        job.crowd.start(*names(3))
        await at_work(federation, "p03")
        await job.crowd.stop("p03")
        assert [name for name, _ in await said(federation, Leave)] == ["p03"]
        await job.aggregator
    assert endless.stopped == [1]
    assert [report.cohort for report in federation.reports] == [3, 2, 2]
    assert sum(report.duration_s for report in federation.reports) < 1 + SLACK_S  # nobody waited for it


class StopsItself(Pull):
    """Asks its worker to stop just before it has finished."""

    stop: Callable[[], None]

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        self.stop()
        time.sleep(0.1)
        return super().train(arrays, config)


async def test_a_worker_that_is_stopped_publishes_what_it_has_finished(federation: Federation) -> None:
    loop = asyncio.get_running_loop()
    task = federation.tasks["p03"] = StopsItself("p03")
    async with running(federation, settings(3, rounds=2, round={"quorum": 2})) as job:
        job.crowd.start(*names(3))
        task.stop = lambda: loop.call_soon_threadsafe(job.crowd.workers["p03"].stop)
        await job.crowd.running["p03"]
        await federation.closed(1)
        await job.aggregator
    assert federation.reports[0].accepted == 3
    assert federation.reports[1].accepted == 2
    told = [type(message) for sender, message in await said(federation, Message) if sender == "p03"]
    assert [kind for kind in told if kind is not Heartbeat][-2:] == [UpdateReady, Leave]


async def test_a_worker_stops_while_the_broker_cannot_be_reached(federation: Federation) -> None:
    assert isinstance(federation.broker, MemoryBroker)
    federation.broker.stop()
    async with asyncio.timeout(5), federation.crowd() as crowd:
        crowd.start("p01")
        await asyncio.sleep(0.1)
        await crowd.stop("p01")
        crowd.workers["p01"].stop()


async def test_a_worker_whose_disk_is_full_stops_and_says_so(federation: Federation) -> None:
    directory = federation.directory / "journal"
    await asyncio.to_thread(directory.mkdir)
    await asyncio.to_thread((directory / "update.new").symlink_to, "/dev/full")
    federation.journals["p03"] = FileJournal(directory)

    async def run() -> HeadRecord:
        async with running(federation, settings(3, rounds=2)) as job:
            job.crowd.start(*names(3))
            return await job.aggregator

    with pytest.raises(StateError, match=r"the journal cannot be written .*No space left"):
        await of_group(run())


# -- evaluation and the end -----------------------------------------------------------------------------------


async def test_participants_measure_each_version_on_their_own_data(
    federation: Federation, undisturbed: str
) -> None:
    run = settings(3, rounds=4, evaluation={"mode": "federated", "every": 2})
    head = await federation.run(run)
    assert [(report.round, report.work) for report in federation.reports] == [
        (1, "train"), (2, "train"), (2, "evaluate"), (3, "train"), (4, "train"), (4, "evaluate"),
    ]  # fmt: skip
    model = await model_of(federation, head)
    losses = [task.evaluate(model).metrics["loss"] for task in federation.tasks.values()]
    assert head.metrics["loss"] == pytest.approx(sum(losses) / 3)
    views = [head.metrics[name] for name in views_of("loss")]
    assert views == pytest.approx([sum(losses) / 3, max(losses), np.std(losses), min(losses), max(losses)])
    assert head.best
    assert head.best.round in (2, 4)
    assert digest(head) == undisturbed
    assert head.metrics["train_loss"] == federation.reports[-2].metrics["train_loss"]


async def test_a_metric_that_nobody_measured_is_told(federation: Federation) -> None:
    notices: list[tuple[str, Mapping[str, object]]] = []
    around = Surroundings(on_notice=lambda event, fields: notices.append((event, fields)))
    run = settings(3, rounds=2, evaluation={"mode": "federated", "every": 2})
    head = await federation.run(run, around=around, metric="dice")
    assert [fields for event, fields in notices if event == "metric_not_measured"] == [
        {"metric": "dice", "measured": "loss train_loss"}
    ]
    assert head.best is None


async def test_the_aggregator_measures_each_version_on_its_own_data(federation: Federation) -> None:
    seen: list[float] = []

    def evaluate(model: Arrays) -> dict[str, float]:
        seen.append(float(model["w"][0]))
        return {"accuracy": [0.5, 0.9, 0.7, 0.8][len(seen) - 1]}

    head = await federation.run(
        settings(3, rounds=4, evaluation={"mode": "central"}), evaluate=evaluate, metric="accuracy"
    )
    assert [report.metrics["accuracy"] for report in federation.reports] == [0.5, 0.9, 0.7, 0.8]
    assert len(set(seen)) == 4
    assert head.best
    assert (head.best.round, head.best.value) == (2, 0.9)
    best = federation.directory / "checkpoints" / f"{head.best.sha256}.safetensors"
    assert await asyncio.to_thread(best.exists)


async def test_a_metric_that_is_not_finite_is_told_and_left_out(federation: Federation, undisturbed: str) -> None:
    notices: list[tuple[str, Mapping[str, object]]] = []
    around = Surroundings(on_notice=lambda event, fields: notices.append((event, fields)))
    run = settings(3, rounds=4, evaluation={"mode": "central"})
    values = iter([0.5, math.nan, math.inf, 0.25])
    head = await federation.run(run, around=around, evaluate=lambda _: {"loss": next(values), "accuracy": 0.5})
    assert [fields for event, fields in notices if event == "metric_not_finite"] == [
        {"loss": "nan"},
        {"loss": "inf"},
    ]
    assert (head.metrics["loss"], head.metrics["accuracy"]) == (0.25, 0.5)
    assert head.best
    assert head.best.version == 4
    assert digest(head) == undisturbed


async def test_an_evaluation_that_raises_ends_the_run_and_says_so(federation: Federation) -> None:
    run = settings(3, rounds=4, evaluation={"mode": "central"})
    with pytest.raises(RuntimeError, match="StopIteration"):
        await of_group(federation.run(run, evaluate=lambda _: {"loss": next(iter([]))}))


@pytest.mark.parametrize(
    ("stop", "why", "rounds"),
    [
        ({"target_metric": "accuracy:0.85"}, "reached accuracy:0.85", 2),
        ({"patience": 2}, "no better version for 2 evaluations", 4),
        ({"max_seconds": 0.001}, "0.001 seconds passed", 1),
        ({}, "all 6 rounds done", 6),
    ],
)
async def test_a_run_ends_when_it_should(
    federation: Federation, stop: dict[str, object], why: str, rounds: int
) -> None:
    accuracy = iter([0.5, 0.9, 0.7, 0.8, 0.95, 0.9])
    run = settings(3, rounds=6, stop=stop, evaluation={"mode": "central"})
    async with federation.workers() as workers:
        aggregator = federation.aggregator(run, evaluate=lambda _: {"accuracy": next(accuracy)}, metric="accuracy")
        head = await aggregator.run()
        async with asyncio.timeout(5):
            for worker in workers:
                await worker.finished.wait()
    assert (head.finished, head.round, len(federation.reports)) == (why, rounds, rounds)


async def test_the_deadline_learns_how_long_participants_take(federation: Federation) -> None:
    """One of four is hopelessly slow. The first rounds wait for it as they were told to, later ones do not."""
    rounds = {"quorum": 3, "deadline_s": 2.0, "deadline": "auto", "deadline_min_s": 0.2}
    run = settings(4, rounds=6, round=rounds)
    async with running(federation, run) as job:
        job.crowd.start(*names(3))
        job.crowd.start("p04", lag_s=60.0)
        head = await job.aggregator
    assert [report.accepted for report in federation.reports] == [3] * 6
    waited = [report.duration_s for report in federation.reports]
    assert min(waited[:2]) >= 2.0, "until enough is known"
    assert max(waited[-2:]) < 1.5
    assert len(head.pace) == 6 * 4


async def test_an_update_of_a_round_that_never_closed_is_accounted_for(federation: Federation) -> None:
    """The run's time is up while its round waits for somebody slow."""
    run = settings(3, rounds=6, stop={"max_seconds": 1.0}, round={"deadline_s": 0.7})
    async with running(federation, run) as job:
        job.crowd.start("p01", "p02")
        job.crowd.start("p03", lag_s=20.0)
        head = await job.aggregator
    assert (head.finished, head.version) == ("1 seconds passed", 0)
    ledger = await federation.ledger()
    assert sorted((d.participant, d.task, d.verdict, d.weight) for d in ledger) == [
        ("p01", 1, "late", 0), ("p02", 1, "late", 0),
    ]  # fmt: skip
    assert "the run ended before its round closed: 1 seconds passed" in ledger[0].reason
    assert head.settled == {"p01": (1, "late"), "p02": (1, "late")}


# -- runs that follow, go on, or are given up -----------------------------------------------------------------


async def test_workers_serve_one_run_after_another(federation: Federation, undisturbed: str) -> None:
    async with asyncio.timeout(30), federation.workers():
        for number in (1, 2):
            federation.directory = federation.directory / f"{number}"
            head = await federation.aggregator(settings(3, rounds=4, run_id=f"run-{number}")).run()
            assert digest(head) == undisturbed
    assert [report.accepted for report in federation.reports] == [3] * 8


async def interrupted(federation: Federation, rounds: int = 4, after: int = 2) -> None:
    """A run whose aggregator is killed after some rounds."""
    async with running(federation, settings(3, rounds=rounds)) as job:
        job.crowd.start(*names(3), lag_s=0.05)
        await federation.closed(after)
        job.aggregator.cancel()


async def test_a_run_goes_on_after_its_aggregator_was_killed(federation: Federation, undisturbed: str) -> None:
    await interrupted(federation)
    assert digest(await federation.run(settings(3, rounds=4))) == undisturbed


@pytest.mark.parametrize("sections", [{}, {"broker": STREAMS}], ids=["inline", "streams"])
async def test_a_standby_on_another_machine_takes_over(
    federation: Federation, undisturbed: str, sections: dict[str, dict[str, int]]
) -> None:
    """Its run directory is empty: all it needs is on the broker."""
    run = settings(3, rounds=4, **sections)
    async with running(federation, run) as job:
        job.crowd.start(*names(3), lag_s=0.05)
        await federation.closed(1)
        federation.directory = federation.directory / "elsewhere"
        standby = asyncio.create_task(federation.aggregator(run).run())
        await federation.closed(2)
        job.aggregator.cancel()
        head = await standby
    assert digest(head) == undisturbed
    assert [report.round for report in federation.reports] == [1, 2, 3, 4]
    assert {report.epoch for report in federation.reports} == {1, 2}


async def test_a_run_goes_on_from_its_checkpoints_when_the_broker_lost_everything(
    federation: Federation, undisturbed: str
) -> None:
    await interrupted(federation)
    federation.broker = MemoryBroker(TOPOLOGY.access)
    with pytest.raises(StateError, match=r"run 'run-1' has checkpoints up to version \d, but the broker has no"):
        await of_group(federation.run(settings(3, rounds=4)))
    head = await federation.run(settings(3, rounds=4), from_checkpoint=True)
    assert digest(head) == undisturbed
    assert sum(len(task.trained) for task in federation.tasks.values()) < 2 * 12  # it did not begin again


async def test_a_run_can_begin_again_beside_its_checkpoints(federation: Federation, undisturbed: str) -> None:
    await interrupted(federation)
    federation.broker = MemoryBroker(TOPOLOGY.access)
    head = await federation.run(settings(3, rounds=4), fresh=True)
    assert (digest(head), head.version) == (undisturbed, 4)


async def test_checkpoints_of_another_run_are_not_taken_for_this_one(
    federation: Federation, undisturbed: str
) -> None:
    await interrupted(federation)
    federation.broker = MemoryBroker(TOPOLOGY.access)
    run = settings(3, rounds=4, run_id="run-2")
    for options in ({}, {"from_checkpoint": True}):
        with pytest.raises(StateError, match="checkpoints of another run, 'run-1': choose another directory"):
            await of_group(federation.run(run, **options))
    assert digest(await federation.run(run, fresh=True)) == undisturbed


async def test_an_unfinished_run_is_not_replaced_unless_it_is_named(
    federation: Federation, undisturbed: str
) -> None:
    await interrupted(federation)
    federation.directory = federation.directory / "next"
    run = settings(3, rounds=4, run_id="run-2")
    for named in ("", "run-0"):
        with pytest.raises(ConfigError, match=r"is in run 'run-1' .* give it up with --abandon run-1"):
            await of_group(federation.run(run, abandon=named))
    head = await federation.run(run, abandon="run-1")
    assert (head.run_id, digest(head)) == ("run-2", undisturbed)


# -- large models, and a broker that fails --------------------------------------------------------------------


@pytest.mark.parametrize("updates", ["inline", "chunks"])
async def test_large_models_and_updates_give_the_same_bits(tmp_path: Path, updates: str) -> None:
    digests = []
    for name, sections in (("inline", {}), ("stream", {"broker": STREAMS})):
        federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path / name, names(3), size=3000)
        if sections and updates == "chunks":
            federation.sizes = Sizes(**STREAMS)
        digests.append(digest(await federation.run(settings(3, rounds=3, **sections))))
        assert isinstance(federation.broker, MemoryBroker)
        streams = federation.broker.stats().streams
        assert (TOPOLOGY.model("run-1") in streams) == bool(sections)
        assert all(report.bytes_up > 3 * 4 * 3000 for report in federation.reports)
    outbox = streams[TOPOLOGY.outbox("p01")]
    assert (outbox.published > 3 * 10) == (updates == "chunks")
    assert digests[0] == digests[1]


@pytest.mark.parametrize("sizes", [{}, STREAMS], ids=["inline", "streams"])
@pytest.mark.parametrize("rounds_before", [0, 1, 2])
async def test_a_broker_that_restarts_changes_nothing(
    federation: Federation, undisturbed: str, sizes: dict[str, int], rounds_before: int
) -> None:
    assert isinstance(federation.broker, MemoryBroker)
    federation.sizes = Sizes(**sizes)
    async with running(federation, settings(3, rounds=4, broker=sizes)) as job:
        job.crowd.start("p01", "p02", lag_s=0.02)
        job.crowd.start("p03", lag_s=0.1)
        await federation.closed(rounds_before)
        await asyncio.sleep(0.05)
        federation.broker.stop()
        await asyncio.sleep(0.1)
        federation.broker.start()
        head = await job.aggregator
    assert digest(head) == undisturbed
    counted = Counter((d.participant, d.task) for d in await federation.ledger() if d.verdict == "counted")
    assert (len(counted), set(counted.values())) == (12, {1})


@pytest.mark.parametrize("lost", [1, 3, 1000])
async def test_updates_that_the_broker_lost_are_sent_again(
    federation: Federation, undisturbed: str, lost: int
) -> None:
    """A power loss takes the end of the stream: two updates are in it, or what came before them, too."""
    assert isinstance(federation.broker, MemoryBroker)
    with capture_logs() as logs:
        digest_after = await run_with_a_loss(federation, lost)
    assert digest_after == undisturbed
    assert [report.accepted for report in federation.reports] == [3, 3, 3, 3]
    noticed = any(line["event"] == "updates_stream_lost_its_tail" for line in logs)
    assert noticed or lost < 1000  # that few are missing, only their senders can tell


async def run_with_a_loss(federation: Federation, lost: int) -> str:
    assert isinstance(federation.broker, MemoryBroker)
    async with running(federation, settings(3, rounds=4)) as job:
        job.crowd.start("p01", "p02")
        job.crowd.start("p03", lag_s=0.5)
        await federation.closed(1)
        await updates_there(federation, 5)
        federation.broker.stop()
        federation.broker.lose_stream_tail(TOPOLOGY.updates, lost)
        federation.broker.start()
        return digest(await job.aggregator)


async def test_an_aggregator_whose_publishers_are_blocked_says_so_and_goes_on_after(tmp_path: Path) -> None:
    broker = MemoryBroker(Topology("default").access)
    federation = Federation(broker, tmp_path, names(2))
    aggregator = federation.aggregator(settings(2, rounds=2))
    broker.block("low on disk")
    async with federation.workers() as workers:
        running = asyncio.create_task(aggregator.run())
        async with asyncio.timeout(10):
            while True:
                if aggregator.status(time.time()).waits_for == "the broker, which blocks publishers (low on disk)":
                    break
                await asyncio.sleep(0)
        broker.unblock()
        assert (await running).version == 2
        assert all("blocks publishers" not in who.status(time.time()).waits_for for who in (aggregator, *workers))


async def test_places_of_lost_messages_that_others_took_are_read_again(
    federation: Federation, undisturbed: str
) -> None:
    """Nobody leads yet, and participants say more than was lost: the end of the stream tells nothing."""
    broker = federation.broker
    assert isinstance(broker, MemoryBroker)
    with capture_logs() as logs:
        async with running(federation, settings(3, rounds=4)) as job:
            job.crowd.start("p01", "p02")
            job.crowd.start("p03", lag_s=0.5)
            await federation.closed(1)
            log = broker.store.log(TOPOLOGY.updates)
            updates = [offset for offset in range(log.next) if is_update(log.entry(offset))]
            broker.stop()
            broker.lose_stream_tail(TOPOLOGY.updates, log.next - updates[2])  # the last one of round 1, for certain
            broker.start()
            again = await broker.connect("p01", purpose="test")
            for _ in range(20):
                beat = Heartbeat(participant="p01", run_id="run-1", epoch=1, phase="idle")
                await again.publish(TOPOLOGY.up, "p01.heartbeat", encode(beat))
            await again.close()
            head = await job.aggregator
    assert digest(head) == undisturbed
    [noticed] = [line for line in logs if line["event"] == "updates_stream_lost_its_tail"]
    assert noticed["read_again_from"] < noticed["read_to"] <= noticed["end"]
    counted = Counter((d.participant, d.task) for d in await federation.ledger() if d.verdict == "counted")
    assert (len(counted), set(counted.values())) == (12, {1})


async def test_a_standby_without_the_model_that_the_broker_lost_leaves_the_lead_to_one_who_has_it(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker(TOPOLOGY.access)
    here, there = (Federation(broker, tmp_path / name, names(2), heartbeat_s=0.2) for name in ("here", "there"))
    run = settings(2, rounds=3, broker={**STREAMS, "patience_s": 0.5})
    async with running(here, run) as job:
        job.crowd.start("p01")
        job.crowd.start("p02", lag_s=0.5)
        await here.closed(1)
        job.aggregator.cancel()
        await asyncio.wait([job.aggregator])
        broker.lose_stream_tail(TOPOLOGY.model("run-1"), 1000)
        other = there.aggregator(run)
        standby = asyncio.create_task(other.run())
        while True:
            if "neither on the broker nor" in other.status(time.time()).waits_for:
                break
            await asyncio.sleep(0.01)
        assert (await here.aggregator(run).run()).version == 3
        assert (await standby).version == 3
