"""The adapters that are held to the contract. Every test has a federation of its own.

An adapter's broker enforces `Topology.access` for the users `aggregator`, `p-1` and `p-2`, so every name in a
contract test begins with `fl.<federation>.`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from uuid import uuid4

import pytest
from contract_steps import LOW, Connect, Shortage

from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Transport
from fluffle.chaos.node import Node
from tests.rabbit_node import in_thread


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.xdist_group("rabbitmq"))])
def adapter(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def topology(adapter: str, request: pytest.FixtureRequest) -> Topology:
    if adapter == "rabbitmq":
        return request.getfixturevalue("rabbit").topology()
    return Topology(f"t-{uuid4().hex[:12]}")


@pytest.fixture
def broker(adapter: str, request: pytest.FixtureRequest, topology: Topology) -> Broker:
    if adapter == "rabbitmq":
        return request.getfixturevalue("rabbit").broker()
    return MemoryBroker(topology.access)


@pytest.fixture
async def connect(broker: Broker, request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Opens connections that show the test's name in the broker's tools and are closed after it."""
    async with AsyncExitStack() as opened:

        async def connect(user: str = AGGREGATOR) -> Transport:
            transport = await broker.connect(user, purpose=request.node.name)
            opened.push_async_callback(transport.close)
            return transport

        yield connect


@pytest.fixture
def short_of_memory(adapter: str, request: pytest.FixtureRequest, broker: Broker) -> Shortage:
    """A block in which the broker is short of memory, so that it blocks publishers."""
    if isinstance(broker, MemoryBroker):
        return partial(blocked, broker)
    node: Node | None = request.getfixturevalue("rabbit").node
    if node is None:
        pytest.skip("alarms are raised in a broker of our own only")
    return partial(in_thread, node.short_of_memory)


@asynccontextmanager
async def blocked(broker: MemoryBroker) -> AsyncIterator[None]:
    broker.block(LOW)
    try:
        yield
    finally:
        broker.unblock()


@pytest.fixture
async def transport(connect: Connect) -> Transport:
    return await connect()


@pytest.fixture
def queue(topology: Topology) -> str:
    """The name of a queue that does not exist yet."""
    return f"fl.{topology.federation}.queue"


@pytest.fixture
def stream(topology: Topology) -> str:
    """The name of a stream that does not exist yet."""
    return f"fl.{topology.federation}.stream"
