"""Large bodies over links that break: what arrived does not travel again, and what the broker lost does."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aggregator.settings import RunSettings
from broker.faults import Fault, FaultyBroker, Operation, When
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.payloads import WINDOW
from broker.tensors import Arrays
from broker.topology import Topology
from broker.transport import Broker
from fluffle.chaos.proxy import proxied
from tests.federation import Federation, Pull, names, settings
from tests.rabbit_node import Rabbit
from workers.journal import FileJournal
from workers.task import TrainConfig, TrainResult
from workers.trainer import Sizes
from workers.upload import NOTE_CHUNKS

TOPOLOGY = Topology("default")
WHO = "p01"
CHUNK_BYTES = 4096
CHUNKS = 25
CUT = Fault("disconnect")
SIZE = (CHUNKS * CHUNK_BYTES - 200) // 4  # values; the manifest takes the rest
RUN = settings(1, rounds=1, broker={"inline_bytes": 0, "chunk_bytes": CHUNK_BYTES})


@dataclass
class Strikes:
    """Something goes wrong at some of the operations of one kind; those that had an effect are counted."""

    name: str
    target: str
    at: tuple[int, ...] = ()
    when: When = "before"
    fault: Fault = CUT
    begun: int = 0
    count: int = 0
    struck: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, operation: Operation) -> Fault | None:
        if (operation.name, operation.target) != (self.name, self.target):
            return None
        self.begun += operation.when == "before"
        self.count += operation.when == "after"
        if operation.when != self.when or self.begun - 1 not in self.at:
            return None
        self.struck.set()
        return self.fault


def chunk_publishes(*at: int, when: When = "before") -> Strikes:
    return Strikes("publish", TOPOLOGY.chunks(WHO), at, when)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(
        MemoryBroker(TOPOLOGY.access), tmp_path, names(1), size=SIZE, heartbeat_s=0.2,
        sizes=Sizes(inline_bytes=0, chunk_bytes=CHUNK_BYTES),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    federation = Federation(
        MemoryBroker(TOPOLOGY.access), tmp_path_factory.mktemp("quiet"), names(1), size=SIZE,
        sizes=Sizes(inline_bytes=0, chunk_bytes=CHUNK_BYTES),
    )  # fmt: skip
    return digest(asyncio.run(federation.run(RUN)))


def digest(head: HeadRecord) -> str:
    assert head.finished
    assert head.model is not None
    return head.model.sha256


async def run_behind(federation: Federation, behind: Broker, run: RunSettings = RUN) -> HeadRecord:
    """A run whose only worker has that way to the broker."""
    worker = federation.worker(WHO, broker=behind)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(worker.run())
        head = await federation.aggregator(run).run()
        worker.stop()
    return head


def faulty(federation: Federation, strikes: Strikes) -> FaultyBroker:
    assert isinstance(federation.broker, MemoryBroker)
    return FaultyBroker(federation.broker, strikes)


# -- on the embedded broker -----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [(0,), (1,), (5,), (CHUNKS - 1,), (2, 9, 10, 17, 24)], ids=str)
async def test_a_cut_upload_goes_on(
    federation: Federation, undisturbed: str, at: tuple[int, ...], when: When
) -> None:
    strikes = chunk_publishes(*at, when=when)
    assert digest(await run_behind(federation, faulty(federation, strikes))) == undisturbed
    assert CHUNKS <= strikes.count <= CHUNKS + len(at) * WINDOW
    assert [d.verdict for d in await federation.ledger()] == ["counted"]


@pytest.mark.parametrize("at", [(0,), (7,), (3, 8, 9, 20, 30)], ids=str)
async def test_a_cut_download_goes_on(federation: Federation, undisturbed: str, at: tuple[int, ...]) -> None:
    """What was delivered when the connection broke is the most that comes twice."""
    strikes = Strikes("get", TOPOLOGY.model(RUN.run_id), at, "after")
    assert digest(await run_behind(federation, faulty(federation, strikes))) == undisturbed
    assert CHUNKS <= strikes.count <= CHUNKS + len(at)


@pytest.mark.parametrize("at", [3, 4, 12, 24])
async def test_a_restarted_worker_goes_on_as_its_journal_says(
    federation: Federation, undisturbed: str, tmp_path: Path, at: int
) -> None:
    """It dies with the connection. The next one has the files alone, and need not train again."""
    strikes = chunk_publishes(at)
    federation.journals[WHO] = FileJournal(tmp_path / "journal")
    running = asyncio.create_task(federation.aggregator(RUN).run())
    async with asyncio.timeout(60):
        first = asyncio.create_task(federation.worker(WHO, broker=faulty(federation, strikes)).run())
        await strikes.struck.wait()
        await cancelled(first)
        federation.journals[WHO] = FileJournal(tmp_path / "journal")
        second = asyncio.create_task(federation.worker(WHO, broker=faulty(federation, strikes)).run())
        assert digest(await running) == undisturbed
        await cancelled(second)
    assert strikes.count <= CHUNKS + WINDOW + NOTE_CHUNKS
    assert federation.tasks[WHO].trained == [1]


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_a_restarted_aggregator_finds_chunks_that_came_before_it(
    federation: Federation, undisturbed: str
) -> None:
    strikes = chunk_publishes(12)
    leader = asyncio.create_task(federation.aggregator(RUN).run())
    worker = federation.worker(WHO, broker=faulty(federation, strikes))
    async with asyncio.timeout(60):
        serving = asyncio.create_task(worker.run())
        await strikes.struck.wait()
        await cancelled(leader)  # type: ignore[arg-type]
        assert digest(await federation.aggregator(RUN).run()) == undisturbed
        worker.stop()
        await serving
    assert strikes.count <= CHUNKS + WINDOW


async def test_chunks_that_the_broker_lost_are_sent_again_all(federation: Federation, undisturbed: str) -> None:
    """A power loss takes what was confirmed. The update that names it is not refused for good, but asked for."""
    broker = federation.broker
    assert isinstance(broker, MemoryBroker)
    strikes = chunk_publishes(20)
    leader = asyncio.create_task(federation.aggregator(RUN).run())
    worker = federation.worker(WHO, broker=faulty(federation, strikes))
    async with asyncio.timeout(60):
        serving = asyncio.create_task(worker.run())
        await strikes.struck.wait()
        broker.lose_stream_tail(TOPOLOGY.outbox(WHO), 9)
        assert digest(await leader) == undisturbed
        worker.stop()
        await serving
    assert 2 * CHUNKS <= strikes.count <= 2 * CHUNKS + WINDOW
    told = [(d.verdict, d.reason.partition(" are ")[2]) for d in await federation.ledger()]
    assert told == [("refused", "missing"), ("counted", "")]
    assert [(report.attempt, report.accepted) for report in federation.reports] == [(1, 1)]


class Gated(Pull):
    """Trains until the gate opens."""

    def __init__(self, name: str, gate: threading.Event) -> None:
        super().__init__(name, SIZE)
        self.gate = gate

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        self.gate.wait(60)
        return super().train(arrays, config)


async def test_an_upload_that_can_no_longer_count_stops(federation: Federation) -> None:
    """Another one's update ends the run, while a window of this one's chunks is on its way."""
    strikes = chunk_publishes(8, 9, 10, 11)
    strikes.fault = Fault("hold_back", 30.0)
    run = settings(2, 1, round={"target": 1}, broker={"inline_bytes": 0, "chunk_bytes": CHUNK_BYTES})
    behind, gate = faulty(federation, strikes), threading.Event()
    federation.tasks["p02"] = Gated("p02", gate)
    slow, fast = federation.worker(WHO, broker=behind), federation.worker("p02")
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        leader = group.create_task(federation.aggregator(run).run())
        group.create_task(slow.run())
        group.create_task(fast.run())
        await strikes.struck.wait()
        gate.set()
        assert (await leader).finished
        await slow.finished.wait()
        behind.arrived(TOPOLOGY.chunks(WHO))
        slow.stop()
        fast.stop()
    assert strikes.count == 12
    assert (await federation.journals[WHO].load()).held is None


# -- over RabbitMQ --------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("rabbitmq")
@pytest.mark.timeout(300)
async def test_an_upload_over_rabbitmq_that_is_cut_five_times(rabbit: Rabbit, tmp_path: Path) -> None:
    """All that the worker sends is counted: also AMQP's own, and what it fetches is acked."""
    chunks, chunk_bytes, cuts = 100, 1 << 16, 5
    large = {
        "size": chunks * chunk_bytes // 4 - 50,
        "sizes": Sizes(inline_bytes=0, chunk_bytes=chunk_bytes),
    }
    run = settings(
        1, rounds=1, round={"deadline_s": 200.0},
        broker={"inline_bytes": 0, "chunk_bytes": chunk_bytes, "patience_s": 20.0},
    )  # fmt: skip
    quiet = Federation(MemoryBroker(TOPOLOGY.access), tmp_path / "quiet", names(1), **large)
    federation = Federation(rabbit.broker(), tmp_path / "run", names(1), topology=rabbit.topology(), **large)
    payload_bytes = chunks * chunk_bytes
    async with proxied(rabbit.url.port or 5672) as proxy:
        for number in range(1, cuts + 1):
            proxy.when_sent(number * payload_bytes // (cuts + 1), proxy.cut)
        head = await run_behind(federation, rabbit.broker(port=proxy.port), run)
        assert proxy.served >= 2 * (1 + cuts)
        overhead_bytes = payload_bytes // 50
        assert payload_bytes <= proxy.sent <= payload_bytes + cuts * WINDOW * chunk_bytes + overhead_bytes
    assert digest(head) == digest(await quiet.run(run))
    assert [d.verdict for d in await federation.ledger()] == ["counted"]
