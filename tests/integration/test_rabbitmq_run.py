"""Whole runs over RabbitMQ: the same bits as on the embedded broker, whatever happens to connections and broker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aggregator.settings import RunSettings
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.topology import Topology
from broker.transport import Broker
from tests.federation import Federation, names, settings
from tests.proxy import Proxy, proxied
from tests.rabbit_node import Rabbit

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


@pytest.fixture(scope="module", params=["small", "large"])
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


@asynccontextmanager
async def after_each_round(federation: Federation, happen: Callable[[], None]) -> AsyncIterator[None]:
    """Something happens soon after every round that closes, at another moment of the next one each time."""

    async def watch() -> None:
        for closed in range(1, ROUNDS):
            await federation.closed(closed)
            await asyncio.sleep(0.02 * closed)
            happen()

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()


@pytest.mark.parametrize("who", ["aggregator", "workers"])
async def test_cut_connections_change_nothing(
    rabbit: Rabbit, federation: Federation, run: tuple[RunSettings, int], expected: str, who: str
) -> None:
    direct = federation.broker
    async with proxied(rabbit.url.port or 5672) as proxy:
        behind = rabbit.broker(port=proxy.port)
        federation.broker = behind if who == "workers" else direct
        async with federation.workers(), after_each_round(federation, proxy.cut):
            federation.broker = behind if who == "aggregator" else direct
            head = await federation.aggregator(run[0]).run()
        at_least = 2 * ROUNDS if who == "aggregator" else 2 * PARTICIPANTS * ROUNDS
        assert proxy.served >= at_least - 2 * PARTICIPANTS, "it was cut and connected again"
    await check(federation, head, expected)


async def test_a_restarted_broker_changes_nothing(
    rabbit: Rabbit, federation: Federation, run: tuple[RunSettings, int], expected: str
) -> None:
    node = rabbit.node
    if node is None:
        pytest.skip("the broker that FLUFFLE_AMQP_URL names is not ours to kill")

    def restart() -> None:
        node.kill()
        node.start()

    async with asyncio.timeout(280), federation.workers():
        running = asyncio.create_task(federation.aggregator(run[0]).run())
        await federation.closed(2)
        await asyncio.to_thread(restart)
        head = await running
    await check(federation, head, expected)
