"""Operators look at refused messages, which stay in their order, and clear them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from click.testing import CliRunner, Result

from broker.errors import StateError
from broker.memory import MemoryBroker
from broker.messages import Barrier, Leave, Rejected
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Transport
from broker.wire import encode
from fluffle import rejected
from fluffle.cli import cli
from fluffle.rejected import Refused, clear, look, page, table
from tests.rabbit_node import Rabbit, password

pytestmark = pytest.mark.timeout(120)

BAD = encode(Leave(participant="p01", reason="no reason"))


def refused(number: int, quoted: bytes = BAD) -> Refused:
    return Refused(number, "p01", f"reason {number}", quoted)


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.xdist_group("rabbitmq"))])
def place(request: pytest.FixtureRequest) -> tuple[Broker, Topology]:
    if request.param == "memory":
        topology = Topology("default")
        return MemoryBroker(topology.access), topology
    rabbit: Rabbit = request.getfixturevalue("rabbit")
    return rabbit.broker(), rabbit.topology()


@pytest.fixture
async def leader(place: tuple[Broker, Topology]) -> AsyncIterator[Transport]:
    """The aggregator's connection, in a federation that is set up."""
    broker, topology = place
    transport = await broker.connect(AGGREGATOR, purpose="test")
    await transport.declare(*topology.aggregator_declarations())
    yield transport
    await transport.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejected, "QUIET_S", 0.3)


async def put(leader: Transport, topology: Topology, *found: Refused) -> None:
    for one in found:
        note = Rejected(offset=one.offset, participant=one.participant, reason=one.reason)
        await leader.publish("", topology.rejected, encode(note, one.quoted))


async def test_looking_takes_nothing_away_and_keeps_the_order(
    place: tuple[Broker, Topology], leader: Transport
) -> None:
    broker, topology = place
    first, later = [refused(n) for n in range(300)], [refused(n) for n in range(300, 310)]
    await put(leader, topology, *first)
    for _ in range(21):  # more often than any delivery limit of a quorum queue by default
        async with rejected._held(broker, topology) as held:
            assert len(held) == 300
    async with rejected._held(broker, topology):
        await put(leader, topology, *later)
    assert await look(broker, topology) == first + later


async def test_clearing_shows_first_and_takes_only_what_it_showed(
    place: tuple[Broker, Topology], leader: Transport
) -> None:
    broker, topology = place
    found = [refused(n) for n in range(5)]
    await put(leader, topology, *found)

    def fail(_: list[Refused]) -> None:
        raise OSError("nobody reads it")

    with pytest.raises(OSError, match="nobody reads it"):
        await clear(broker, topology, fail)
    shown: list[Refused] = []
    await clear(broker, topology, shown.extend)
    assert shown == found
    await put(leader, topology, refused(9))
    assert await look(broker, topology) == [refused(9)]


async def test_at_most_so_many_are_read(
    place: tuple[Broker, Topology], leader: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejected, "MOST", 3)
    await put(leader, place[1], *(refused(n) for n in range(5)))
    assert await look(*place) == [refused(n) for n in range(3)]


async def test_what_is_no_note_of_the_aggregator_is_told_as_such(
    place: tuple[Broker, Topology], leader: Transport
) -> None:
    _, topology = place
    await leader.publish("", topology.rejected, b"rubbish")
    await leader.publish("", topology.rejected, encode(Barrier(nonce="n")))
    rubbish, barrier = await look(*place)
    assert (rubbish.offset, rubbish.quoted) == (-1, b"rubbish")
    assert "not a Fluffle message" in rubbish.reason
    assert "a barrier message of aggregator" in barrier.reason


async def test_a_federation_that_is_not_set_up(place: tuple[Broker, Topology]) -> None:
    with pytest.raises(StateError, match="start its aggregator, or correct --federation"):
        await look(*place)


# -- what people see ------------------------------------------------------------------------------------------


def test_the_list_is_numbered_and_strangers_words_are_harmless() -> None:
    assert table([]) == "nothing was rejected\n"
    lines = table([refused(812), Refused(-1, "p02", "bad \x1b[2J\nword \u202e", b"")]).splitlines()
    assert lines[1].split() == ["1", "812", "p01", str(len(BAD)), "reason", "812"]
    assert lines[2].split()[:4] == ["2", "-", "p02", "0"]
    assert lines[2].endswith(r"bad \x1b[2J\nword \u202e")
    assert len(lines) == 3


def test_one_is_shown_with_its_header_and_bytes() -> None:
    shown = page([refused(811), refused(812)], None)
    assert "reason 812" in shown
    assert "leave: {'participant': 'p01', 'reason': 'no reason'}" in shown
    assert "000000  46 4c 46 01 " in shown
    assert "  FLF" in shown
    assert "reason 811" in page([refused(811), refused(812)], 1)
    assert "cannot be read: not a Fluffle message" in page([refused(1, b"\x1b[2J")], 1)
    assert "\x1b" not in page([refused(1, b"\x1b[2J")], 1)
    with pytest.raises(StateError, match="no rejected message 3: `fluffle rejected list` has 2"):
        page([refused(811), refused(812)], 3)
    with pytest.raises(StateError, match="nothing was rejected"):
        page([], None)


@pytest.mark.xdist_group("rabbitmq")
async def test_the_commands_over_rabbitmq(rabbit: Rabbit) -> None:
    topology = rabbit.topology()
    leader = await rabbit.broker().connect(AGGREGATOR, purpose="test")
    await leader.declare(*topology.aggregator_declarations())
    await put(leader, topology, refused(1), refused(2))
    url = rabbit.url.with_user(AGGREGATOR).with_password(password(AGGREGATOR))

    async def typed(*command: str) -> Result:
        where = ("--broker", str(url), "--federation", topology.federation)
        return await asyncio.to_thread(CliRunner().invoke, cli, ["rejected", *command, *where])

    listed = await typed("list")
    assert [line.split()[1] for line in listed.stdout.splitlines()] == ["OFFSET", "1", "2"]
    assert "reason 1" in (await typed("show", "1")).stdout
    assert "reason 2" in (await typed("show")).stdout
    assert (await typed("show", "3")).exit_code == 1
    assert (await typed("clear")).stdout == listed.stdout
    assert (await typed("list")).stdout == "nothing was rejected\n"
    await leader.close()
