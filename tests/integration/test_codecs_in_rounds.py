"""Whole runs whose updates are encoded: what is sent, what is refused, and what is owed through every crash."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from aggregator.daemon import Aggregator
from aggregator.settings import RunSettings
from broker import tensors
from broker.codecs import packing
from broker.errors import BadMessage
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.messages import UpdateReady
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker
from broker.wire import decode
from fluffle.chaos.task import Pull
from tests.federation import Federation, names, settings
from workers import journal
from workers.choice import Measured
from workers.journal import FileJournal, MemoryJournal
from workers.link import WorkerSettings
from workers.task import TrainConfig, TrainResult
from workers.worker import Site, Worker, always

TOPOLOGY = Topology("default")
SIZE = 5000
ROUNDS = 5
TOP_K = {"up": "topk:0.02+zstd"}


def federation(directory: Path, size: int = SIZE) -> Federation:
    return Federation(MemoryBroker(TOPOLOGY.access), directory, names(3), size=size, heartbeat_s=0.2)


def digest(head: HeadRecord) -> str:
    assert head.model
    return head.model.sha256


async def model_of(directory: Path, head: HeadRecord) -> np.ndarray:
    path = directory / "checkpoints" / f"{digest(head)}.safetensors"
    return tensors.decode(await asyncio.to_thread(path.read_bytes))["w"]


async def updates(broker: MemoryBroker) -> list[UpdateReady]:
    """Every update that was published."""
    reader = await broker.connect(AGGREGATOR, purpose="audit")
    inbox = await reader.read(TOPOLOGY.updates, offset="first")
    found = []
    while (delivery := await inbox.get(0)) is not None:
        try:
            message, _ = decode(delivery.body)
        except BadMessage:
            continue
        found += [message] if isinstance(message, UpdateReady) else []
    return found


# -- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "most_bytes", "near"),
    [("none", 21_000, 0.2), ("fp16", 11_000, 0.2), ("int8+zstd", 6000, 0.2), ("qsgd:127", 6000, 0.25),
     ("topk:0.3", 5000, 0.4), ("sign", 1500, 0.9)],
)  # fmt: skip
async def test_a_run_learns_with_fewer_bytes(tmp_path: Path, codec: str, most_bytes: int, near: float) -> None:
    crowd = federation(tmp_path)
    head = await crowd.run(settings(3, ROUNDS, codec={"up": codec}))
    sent = await updates(crowd.broker)
    assert {update.codec for update in sent} == {codec}
    assert max(update.body.size_bytes for update in sent if update.body) < most_bytes
    points = np.mean([task.point for task in crowd.tasks.values()], axis=0)
    assert np.sqrt(np.square(await model_of(tmp_path, head) - points).mean()) < near
    assert [d.verdict for d in await crowd.ledger()] == ["counted"] * 3 * ROUNDS


async def test_large_encoded_updates_go_in_chunks(tmp_path: Path) -> None:
    crowd = federation(tmp_path)
    crowd.sizes = type(crowd.sizes)(inline_bytes=0, chunk_bytes=1024)
    run = settings(3, 2, codec={"up": "int8+zstd"}, broker={"inline_bytes": 0, "chunk_bytes": 1024})
    inline = federation(tmp_path / "inline")
    assert digest(await crowd.run(run)) == digest(await inline.run(settings(3, 2, codec={"up": "int8+zstd"})))


@pytest.mark.parametrize("codec", ["topk:0.02+zstd", "qsgd:7", "powersgd:1"])
async def test_two_runs_give_the_same_bits(tmp_path: Path, codec: str) -> None:
    run = settings(3, ROUNDS, codec={"up": codec})
    first, second = federation(tmp_path / "1"), federation(tmp_path / "2")
    assert digest(await first.run(run)) == digest(await second.run(run))


async def test_who_knows_none_of_the_codecs_sends_arrays_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.choice.is_known", lambda name: name == "none")
    crowd = federation(tmp_path)
    await crowd.run(settings(3, 1, codec={"up": "int8"}))
    assert {update.codec for update in await updates(crowd.broker)} == {"none"}
    assert [d.verdict for d in await crowd.ledger()] == ["counted"] * 3


async def test_a_worker_chooses_by_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """p03 believes that its link is slow; the others send small arrays as they are."""
    monkeypatch.setattr("workers.choice.UNKNOWN_ENCODER", 1e12)
    crowd = federation(tmp_path)
    third = Watched(crowd, "p03")
    crowd.participants = names(2)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group, crowd.workers():
        worker = third.worker()
        worker._seen = Measured(link=1000.0)
        running = group.create_task(worker.run())
        await crowd.aggregator(settings(3, 3, codec={"up": "auto"})).run()
        worker.stop()
        await running
    used = {name: {u.codec for u in await updates(crowd.broker) if u.participant == name} for name in names(3)}
    assert used == {"p01": {"none"}, "p02": {"none"}, "p03": {"topk:0.01+zstd"}}
    assert [d.verdict for d in await crowd.ledger()] == ["counted"] * 9


# -- what is refused ---------------------------------------------------------------------------------------------


class Strays(Worker):
    """Sends its first update in a codec, or with a body, that the run does not allow."""

    change: Callable[[UpdateReady, bytes], tuple[UpdateReady, bytes]]
    strayed = False

    async def _carry_out(self, order, progress):  # type: ignore[no-untyped-def]
        finished = await super()._carry_out(order, progress)
        if not self.strayed:
            self.strayed = True
            held = finished.held
            held.update, held.blob = type(self).change(held.update, held.blob)
        return finished


def with_body(update: UpdateReady, body: bytes, **changes: object) -> tuple[UpdateReady, bytes]:
    assert update.body
    where = {"size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    return update.model_copy(update={"body": update.body.model_copy(update=where), **changes}), body


def encoded_as(name: str) -> bytes:
    zeros = {"w": np.zeros(SIZE, np.float32), "steps": np.zeros((), np.int64)}
    return bytes(packing(name).pack(zeros, {}, np.random.default_rng(0)).body)


@pytest.mark.parametrize(
    ("codec", "body", "why"),
    [
        ("sign", encoded_as("sign"), "codec 'sign' is none that this run allows: none, int8+zstd"),
        ("int8", encoded_as("int8"), "codec 'int8' is none"),
        ("nonsense:1", b"", "is none that this run allows"),
        ("int8+zstd", b"junk", "no Zstandard frame"),
        ("int8+zstd", encoded_as("fp16+zstd"), "encoded array"),
        ("none", encoded_as("int8"), "unknown tensor"),
    ],
)
async def test_what_the_run_does_not_allow_is_refused_and_the_run_goes_on(
    tmp_path: Path, codec: str, body: bytes, why: str
) -> None:
    crowd = federation(tmp_path)
    run = settings(3, 2, codec={"up": "int8+zstd"}, round={"quorum": 2})
    Strays.change = staticmethod(lambda update, _: with_body(update, body, codec=codec))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        strays = Strays(Site("p03", always(Pull("p03", SIZE)), FileJournal(tmp_path / "j")), crowd.broker, TOPOLOGY)
        crowd.participants = names(2)
        async with crowd.workers():
            task = group.create_task(strays.run())
            head = await crowd.aggregator(run).run()
            strays.stop()
            await task
    assert head.round == 2
    refused = [d for d in await crowd.ledger() if d.verdict == "refused"]
    assert [d.participant for d in refused] == ["p03"]
    assert why in refused[0].reason


# -- what is owed ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_write_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that died writes no more; here its thread may still do so while the next one begins."""
    write, lock = journal._replace, threading.Lock()

    def locked(path: Path, content: tensors.Buffer, *, synced: bool = True) -> None:
        with lock:
            write(path, content, synced=synced)

    monkeypatch.setattr(journal, "_replace", locked)


class Died(BaseException):
    """The process is gone."""


@dataclass
class Mortal:
    """A worker with its journal on disk. It dies when it says `event` for the n-th time, and is started again."""

    crowd: Federation
    directory: Path
    event: str = ""
    nth: int = 0
    said: list[str] = field(default_factory=list)
    stopping: bool = False

    def hear(self, event: str, **fields: object) -> None:
        self.said.append(event)
        if event == self.event and self.said.count(event) == self.nth:
            raise Died

    def worker(self) -> Worker:
        waits = WorkerSettings(0.2, patience_s=5.0, retry_s=0.1, on_notice=self.hear)
        task = always(Pull("p03", self.crowd.size))
        return Worker(Site("p03", task, FileJournal(self.directory)), self.crowd.broker, TOPOLOGY, waits)

    async def run(self) -> None:
        try:
            self.now = self.worker()
            await self.now.run()
        except* Died:
            for connection in self.crowd.broker.connections:
                if connection.user == "p03":
                    connection.abort()
            self.now = self.worker()
            await self.now.run()


async def run_with_deaths(directory: Path, event: str = "", nth: int = 0) -> tuple[str, list[str]]:
    """The digest of a run in which one of three workers dies, and what that one said."""
    crowd = federation(directory)
    mortal = Mortal(crowd, directory / "journal", event, nth)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        crowd.participants = names(2)
        async with crowd.workers():
            running = group.create_task(mortal.run())
            head = await crowd.aggregator(settings(3, ROUNDS, codec=TOP_K)).run()
            mortal.now.stop()
            await running
    return digest(head), mortal.said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return asyncio.run(run_with_deaths(tmp_path_factory.mktemp("quiet")))[0]


@pytest.mark.parametrize("event", ["work_begun", "work_done", "update_sent", "update_settled"])
@pytest.mark.parametrize("nth", [1, 3])
async def test_a_worker_that_dies_at_any_step_owes_what_it_owed(
    tmp_path: Path, undisturbed: str, event: str, nth: int
) -> None:
    """The model has the undisturbed run's bits, so each residual was in force exactly when it should be."""
    reached, said = await run_with_deaths(tmp_path, event, nth)
    assert said.count(event) >= nth
    assert "residual_dropped" not in said
    assert reached == undisturbed


async def test_without_its_journal_the_bits_are_others(tmp_path: Path, undisturbed: str) -> None:
    """That the test above can fail: who forgets what it owes sends something else."""

    class Forgetful(FileJournal):
        async def residual(self) -> None:
            return None

    crowd = federation(tmp_path)
    crowd.journals["p03"] = Forgetful(tmp_path / "journal")
    assert digest(await crowd.run(settings(3, ROUNDS, codec=TOP_K))) != undisturbed


class RefusedOnce(Pull):
    """Its second update is far beyond the aggregator's bounds."""

    def train(self, arrays: tensors.Arrays, config: TrainConfig) -> TrainResult:
        result = super().train(arrays, config)
        if len(self.trained) == 2:
            result.arrays["w"] = arrays["w"] + np.float32(1e9)
        return result


async def test_what_a_refused_update_owed_is_not_owed(tmp_path: Path) -> None:
    """It is asked again in the next attempt, and pays what was owed before. With its residual in force the next
    update would be beyond the bounds, too."""
    crowd = federation(tmp_path)
    kept, owed = MemoryJournal(), []

    def hear(event: str, **fields: object) -> None:
        if event == "work_begun":
            owed.append(kept._owed and kept._owed.round)

    crowd.participants = names(2)
    run = settings(3, 4, codec={"up": "sign"}, round={"quorum": 3, "deadline_s": 1.0})
    waits = WorkerSettings(0.2, patience_s=5.0, retry_s=0.1, on_notice=hear)
    bad = Worker(Site("p03", always(RefusedOnce("p03", SIZE)), kept), crowd.broker, TOPOLOGY, waits)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group, crowd.workers():
        running = group.create_task(bad.run())
        await crowd.aggregator(run).run()
        bad.stop()
        await running
    verdicts = [(d.participant, d.verdict) for d in await crowd.ledger()]
    assert verdicts.count(("p03", "refused")) == 1
    assert verdicts.count(("p03", "counted")) == 4
    assert owed == [None, 1, 1, 2, 3]


class LateOnce(Pull):
    """Answers round 1 only after it has closed."""

    def train(self, arrays: tensors.Arrays, config: TrainConfig) -> TrainResult:
        time.sleep(1.5 if config.round == 1 else 0.0)
        return super().train(arrays, config)


async def test_what_a_late_update_owed_is_not_owed(tmp_path: Path) -> None:
    """It was dropped, so none of it arrived: whether it is told so first, or goes on to the round that is open."""
    crowd = federation(tmp_path)
    kept, owed = MemoryJournal(), []

    def hear(event: str, **fields: object) -> None:
        if event == "work_begun":
            owed.append(kept._owed)

    crowd.participants = names(2)
    run = settings(3, 20, codec=TOP_K, round={"quorum": 2, "deadline_s": 0.5, "late": "discard"})
    waits = WorkerSettings(0.2, patience_s=5.0, retry_s=0.1, on_notice=hear)
    slow = Worker(Site("p03", always(LateOnce("p03", SIZE)), kept), crowd.broker, TOPOLOGY, waits)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group, crowd.workers():
        running = group.create_task(slow.run())
        await crowd.aggregator(run).run()
        slow.stop()
        await running
    verdicts = {d.task: d.verdict for d in await crowd.ledger() if d.participant == "p03"}
    assert verdicts[1] == "late"
    assert owed[:2] == [None, None]
    assert owed[-1]


async def test_a_residual_of_the_run_before_is_dropped_and_said_so(tmp_path: Path) -> None:
    crowd = federation(tmp_path)
    mortal = Mortal(crowd, tmp_path / "journal")
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        crowd.participants = names(2)
        async with crowd.workers():
            running = group.create_task(mortal.run())
            await crowd.aggregator(settings(3, 2, codec=TOP_K)).run()
            other = Aggregator(
                crowd.job(settings(3, 2, codec=TOP_K, run_id="run-2")), crowd.broker, tmp_path / "second"
            )
            await other.run()
            mortal.now.stop()
            await running
    assert mortal.said.count("residual_dropped") == 1


# -- models on the way down --------------------------------------------------------------------------------------

LARGE = {"inline_bytes": 0, "chunk_bytes": 4096}


@dataclass
class Watched:
    """A worker that is heard."""

    crowd: Federation
    name: str
    heard: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def worker(self, broker: Broker | None = None) -> Worker:
        def hear(event: str, **fields: object) -> None:
            self.heard.append((event, fields))

        waits = WorkerSettings(0.2, patience_s=5.0, retry_s=0.1, on_notice=hear)
        site = Site(self.name, always(Pull(self.name, self.crowd.size)), MemoryJournal())
        return Worker(site, broker or self.crowd.broker, TOPOLOGY, waits)

    def said(self, event: str) -> list[dict[str, object]]:
        return [fields for said, fields in self.heard if said == event]


async def watched(crowd: Federation, run: RunSettings) -> tuple[HeadRecord, Watched]:
    """A run in which p03 is heard."""
    third = Watched(crowd, "p03")
    crowd.participants = names(2)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group, crowd.workers():
        worker = third.worker()
        running = group.create_task(worker.run())
        head = await crowd.aggregator(run).run()
        worker.stop()
        await running
    return head, third


async def test_a_difference_without_loss_changes_no_bit(tmp_path: Path) -> None:
    plain = settings(3, 5, broker=LARGE)
    head, _ = await watched(federation(tmp_path / "plain"), plain)
    crowd = federation(tmp_path / "xor")
    same, third = await watched(crowd, settings(3, 5, broker=LARGE, codec={"down": "xor+zstd"}))
    assert digest(same) == digest(head)
    assert len(third.said("difference_applied")) == 3  # the first two versions were fetched whole
    assert third.said("difference_not_used") == []


@pytest.mark.parametrize("codec", ["int8+zstd", "fp16"])
async def test_a_rounded_step_is_the_model_for_everybody(tmp_path: Path, codec: str) -> None:
    """Who fetched all of it has the same bits as who came to it step by step, or its update would be refused."""
    run = settings(3, 6, broker=LARGE, codec={"up": "int8+zstd", "down": codec})
    crowd = federation(tmp_path / "1")
    head, third = await watched(crowd, run)
    again, _ = await watched(federation(tmp_path / "2"), run)
    assert digest(head) == digest(again)
    assert [d.verdict for d in await crowd.ledger()] == ["counted"] * 18
    [*_, applied] = third.said("difference_applied")
    assert applied["bytes"] < 0.6 * applied["of"]
    assert crowd.reports[-2].bytes_down < 0.7 * crowd.reports[1].bytes_down
    points = np.mean([Pull(name, SIZE).point for name in names(3)], axis=0)
    assert np.sqrt(np.square(await model_of(tmp_path / "1", head) - points).mean()) < 0.1


async def test_a_difference_that_leads_elsewhere_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(codec: str, base: tensors.Arrays, body: tensors.Buffer) -> tensors.Arrays:
        return {name: array + array.dtype.type(1) for name, array in base.items()}

    monkeypatch.setattr("workers.link.advanced", wrong)
    crowd = federation(tmp_path)
    run = settings(3, 4, broker=LARGE, codec={"down": "xor+zstd"})
    head, third = await watched(crowd, run)
    assert head.version == 4
    assert third.said("difference_applied") == []
    assert len(third.said("difference_not_used")) == 2
    assert [d.verdict for d in await crowd.ledger()] == ["counted"] * 12


async def test_small_models_travel_with_the_order_as_ever(tmp_path: Path) -> None:
    crowd = federation(tmp_path)
    head, third = await watched(crowd, settings(3, 3, codec={"down": "int8"}))
    assert head.difference is None
    assert third.said("difference_applied") == []
    plain, _ = await watched(federation(tmp_path / "plain"), settings(3, 3))
    assert digest(head) == digest(plain)
