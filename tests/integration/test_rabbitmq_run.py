"""Whole runs over RabbitMQ: the same bits as on the embedded broker, whatever happens to connections and broker."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aggregator.settings import RunSettings
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.tensors import Arrays
from broker.topology import Topology
from broker.transport import Broker
from fluffle.chaos.proxy import proxied
from tests.federation import Federation, Pull, names, settings
from tests.rabbit_node import Rabbit, in_thread
from workers.task import TrainConfig, TrainResult
from workers.worker import Worker

pytestmark = [pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(300)]

PARTICIPANTS, ROUNDS = 4, 5
SMALL = settings(PARTICIPANTS, ROUNDS, round={"deadline_s": 200.0}, broker={"patience_s": 20.0})
LARGE = settings(
    PARTICIPANTS, ROUNDS, round={"deadline_s": 200.0},
    broker={"patience_s": 20.0, "inline_bytes": 0, "chunk_bytes": 1 << 16},
)  # fmt: skip
LARGE_SIZE = 300_000  # values, so 19 chunks


def make(broker: Broker, topology: Topology, directory: Path, size: int) -> Federation:
    return Federation(broker, directory, names(PARTICIPANTS), size=size, topology=topology)


@pytest.fixture(scope="module", params=[pytest.param("small", marks=pytest.mark.slow), "large"])
def run(request: pytest.FixtureRequest) -> tuple[RunSettings, int]:
    return (SMALL, 7) if request.param == "small" else (LARGE, LARGE_SIZE)


@pytest.fixture(scope="module")
def expected(run: tuple[RunSettings, int], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest on the embedded broker."""
    topology = Topology("default")
    federation = make(MemoryBroker(topology.access), topology, tmp_path_factory.mktemp("memory"), run[1])
    return digest(asyncio.run(federation.run(run[0])))


@pytest.fixture
def federation(rabbit: Rabbit, run: tuple[RunSettings, int], tmp_path: Path) -> Federation:
    return make(rabbit.broker(), rabbit.topology(), tmp_path, run[1])


def digest(head: HeadRecord) -> str:
    assert head.finished
    assert head.model is not None
    return head.model.sha256


async def check(federation: Federation, head: HeadRecord, expected: str) -> None:
    assert digest(head) == expected
    counted = Counter((d.participant, d.task) for d in await federation.ledger() if d.verdict == "counted")
    assert set(counted.values()) == {1}
    assert len(counted) == PARTICIPANTS * ROUNDS


async def test_the_model_is_the_embedded_brokers(
    federation: Federation, run: tuple[RunSettings, int], expected: str
) -> None:
    await check(federation, await federation.run(run[0]), expected)


class Slow(Pull):
    """Trains long enough for something to happen meanwhile."""

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        time.sleep(0.1)
        return super().train(arrays, config)


@asynccontextmanager
async def after_each_round(federation: Federation, happen: Callable[[], None]) -> AsyncIterator[None]:
    """Something happens after every round that closes, at another moment of the next one each time."""

    async def watch() -> None:
        for closed in range(1, ROUNDS):
            await federation.closed(closed)
            await asyncio.sleep(0.04 * closed)
            happen()

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()


@pytest.mark.parametrize("who", ["aggregator", "workers"])
async def test_cut_connections_change_nothing(
    rabbit: Rabbit, federation: Federation, run: tuple[RunSettings, int], expected: str, who: str
) -> None:
    federation.tasks = {name: Slow(name, run[1]) for name in names(PARTICIPANTS)}
    direct = federation.broker
    async with proxied(rabbit.url.port or 5672) as proxy:
        behind = rabbit.broker(port=proxy.port)
        federation.broker = behind if who == "workers" else direct
        async with asyncio.timeout(120), federation.workers():
            federation.broker = behind if who == "aggregator" else direct
            async with after_each_round(federation, proxy.cut):
                head = await federation.aggregator(run[0]).run()
        clients = 1 if who == "aggregator" else PARTICIPANTS
        assert proxy.served >= 2 * clients * (ROUNDS - 1), "it was cut and connected again"
    await check(federation, head, expected)


class Gated(Pull):
    """Its third round lasts until the gate opens."""

    def __init__(self, name: str, size: int, gate: threading.Event) -> None:
        super().__init__(name, size)
        self.gate = gate

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        if config.round == 3:
            self.gate.wait(200)
        return super().train(arrays, config)


async def test_a_restarted_broker_changes_nothing(
    rabbit: Rabbit, federation: Federation, run: tuple[RunSettings, int], expected: str
) -> None:
    """kill -9 of RabbitMQ while two participants train and two updates are in."""
    node, gate = rabbit.node, threading.Event()
    if node is None:
        pytest.skip("the broker that FLUFFLE_AMQP_URL names is not ours to kill")
    federation.tasks = {name: Gated(name, run[1], gate) for name in ("p01", "p02")}
    try:
        async with asyncio.timeout(200), federation.workers():
            running = asyncio.create_task(federation.aggregator(run[0]).run())
            await federation.closed(2)
            await asyncio.to_thread(node.settle)
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start)
            gate.set()
            head = await running
    finally:
        gate.set()
    await check(federation, head, expected)


BLOCKED = "the broker, which blocks publishers (low on memory)"


async def test_an_alarm_stops_a_run_which_says_so_and_goes_on_after(
    rabbit: Rabbit, federation: Federation, run: tuple[RunSettings, int], expected: str
) -> None:
    """RabbitMQ is short of memory in the third round; two updates are in, two are finished meanwhile."""
    node, gate = rabbit.node, threading.Event()
    if node is None:
        pytest.skip("alarms are raised in a broker of our own only")
    federation.tasks = {name: Gated(name, run[1], gate) for name in ("p01", "p02")}
    try:
        async with asyncio.timeout(200), federation.workers() as workers:
            running = asyncio.create_task(federation.aggregator(run[0]).run())
            await federation.closed(2)
            async with in_thread(node.short_of_memory):
                gate.set()
                for who in workers[:2]:
                    await says(who, BLOCKED)
                assert len(federation.reports) == 2
            head = await running
    finally:
        gate.set()
    await check(federation, head, expected)


async def says(who: Worker, waits_for: str) -> None:
    """Returns once it says that it waits for that; the test's own time-out ends it."""
    while True:
        if waits_for in who.status(time.time()).waits_for:
            return
        await asyncio.sleep(0.05)
