"""The adapters that are held to the contract. Every test has a federation of its own.

An adapter's broker enforces `Topology.access` for the users `aggregator`, `p-1` and `p-2`, so every name in a
contract test begins with `fl.<federation>.`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from contract_steps import Connect

from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Transport


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
