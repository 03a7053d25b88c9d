"""Faults strike where they are told to, and an honest broker stays honest through all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from broker.errors import ConnectionLost, PublishFailed, TransportError
from broker.faults import Fault, FaultAt, Faults, FaultyBroker, NoFaults, Operation, Rates, SeededFaults
from broker.memory import MemoryBroker
from broker.transport import Broker, Queue, Stream, Transport

MESSAGES = 5
EVERYTHING = Rates(disconnect=0.03, delay=0.03, fail_publish=0.05, duplicate=0.05, hold_back=0.05)


@asynccontextmanager
async def connected(broker: Broker, user: str, purpose: str) -> AsyncIterator[Transport]:
    transport = await broker.connect(user, purpose=purpose)
    try:
        await transport.declare(Queue("q", replicated=True))
        yield transport
    finally:
        await transport.close()


async def publish_all(broker: Broker) -> None:
    """Publishes b"0", b"1", ... and each one again until it is confirmed."""
    done = 0
    while done < MESSAGES:
        with suppress(TransportError):
            async with connected(broker, "p", "up") as transport:
                while done < MESSAGES:
                    await transport.publish("", "q", b"%d" % done)
                    done += 1


async def consume_all(broker: Broker) -> list[bytes]:
    """Takes and acks until it has seen every message; returns what it saw, in order."""
    seen: list[bytes] = []
    while len(set(seen)) < MESSAGES:
        with suppress(ConnectionLost):
            async with connected(broker, "c", "down") as transport:
                inbox = await transport.consume("q", prefetch=2)
                while len(set(seen)) < MESSAGES:
                    delivery = await inbox.get(5)
                    assert delivery is not None, "a confirmed message was lost"
                    seen.append(delivery.body)
                    await delivery.ack()
                await inbox.close()
    return seen


async def pipeline(faults: Faults) -> list[bytes]:
    """Both at once; returns what the consumer saw."""
    broker = MemoryBroker()
    faulty = FaultyBroker(broker, faults)
    async with asyncio.timeout(10):
        _, seen = await asyncio.gather(publish_all(faulty), consume_all(faulty))
    assert broker.connections == ()
    return seen


async def undisturbed() -> NoFaults:
    faults = NoFaults()
    assert await pipeline(faults) == [b"%d" % i for i in range(MESSAGES)]
    return faults


async def test_every_operation_passes_twice() -> None:
    faults = await undisturbed()
    mine = [o for o in faults.operations if o.user == "c"]
    assert faults.count("c", "down") == len(mine) == 2 * (3 + 2 * MESSAGES + 2)
    assert [o.index for o in mine] == list(range(len(mine)))
    assert {o.name for o in faults.operations} == {
        "connect",
        "declare",
        "publish",
        "consume",
        "get",
        "ack",
        "close",
    }
    assert mine[4] == Operation(4, "c", "down", "consume", "q", "before")
    assert faults.count("p", "down") == 0


@pytest.mark.parametrize(("user", "purpose"), [("p", "up"), ("c", "down")])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("disconnect"),
        Fault("fail_publish"),
        Fault("duplicate"),
        Fault("delay", 0.001),
        Fault("hold_back", 0.001),
    ],
    ids=lambda fault: fault.kind,
)
async def test_a_fault_at_any_operation_loses_nothing(user: str, purpose: str, fault: Fault) -> None:
    for index in range((await undisturbed()).count(user, purpose)):
        at = FaultAt(user, purpose, index, fault)
        seen = await pipeline(at)
        assert at.struck is not None
        assert set(seen) == {b"%d" % i for i in range(MESSAGES)}
        assert len(seen) <= MESSAGES + 2, at.struck


@pytest.mark.parametrize("seed", range(20))
async def test_random_faults_lose_nothing_and_can_be_had_again(seed: int) -> None:
    first, second = (SeededFaults(seed, EVERYTHING, longest_s=0.002) for _ in range(2))
    assert set(await pipeline(first)) == {b"%d" % i for i in range(MESSAGES)}
    for operation, fault in first.struck:
        assert second(operation) == fault


@pytest.mark.parametrize(
    ("when", "fault", "error", "arrived"),
    [
        ("before", Fault("disconnect"), ConnectionLost, 0),
        ("after", Fault("disconnect"), ConnectionLost, 1),
        ("before", Fault("fail_publish"), PublishFailed, 0),
        ("after", Fault("fail_publish"), PublishFailed, 1),
        ("before", Fault("duplicate"), None, 2),
        ("after", Fault("duplicate"), None, 1),
    ],
)
async def test_what_a_fault_does_to_a_publish(
    when: str, fault: Fault, error: type[TransportError] | None, arrived: int
) -> None:
    memory = MemoryBroker()
    index = {"before": 4, "after": 5}[when]  # after connect and declare
    transport = await FaultyBroker(memory, FaultAt("p", "x", index, fault)).connect("p", purpose="x")
    await transport.declare(Queue("q"))
    if error is None:
        await transport.publish("", "q", b"1")
    else:
        with pytest.raises(error, match="injected"):
            await transport.publish("", "q", b"1")
    assert memory.stats().queues["q"].depth == arrived
    await transport.close()


async def test_what_is_held_back_is_overtaken_and_confirmed_only_then() -> None:
    broker = FaultyBroker(MemoryBroker(), FaultAt("slow", "x", 4, Fault("hold_back", 5)))
    slow, fast = await broker.connect("slow", purpose="x"), await broker.connect("fast", purpose="x")
    await slow.declare(Stream("s", 1 << 20, 1 << 20))
    publishing = asyncio.create_task(slow.publish("", "s", b"slow"))
    await asyncio.sleep(0.01)
    assert not publishing.done()
    await fast.publish("", "s", b"fast")
    async with asyncio.timeout(1):
        await publishing
    inbox = await fast.read("s", offset="first")
    assert [d.body for d in (await inbox.get(1), await inbox.get(1)) if d] == [b"fast", b"slow"]


async def test_a_delivery_cut_off_comes_again() -> None:
    memory = MemoryBroker()
    faulty = await FaultyBroker(memory, FaultAt("c", "x", 7, Fault("disconnect"))).connect("c", purpose="x")
    plain = await memory.connect("p", purpose="x")
    await faulty.declare(Queue("q"))
    inbox = await faulty.consume("q")
    await plain.publish("", "q", b"1")
    with pytest.raises(ConnectionLost, match="after get"):
        await inbox.get(1)
    again = await (await plain.consume("q")).get(0)
    assert again is not None
    assert (again.body, again.delivery_count) == (b"1", 1)
