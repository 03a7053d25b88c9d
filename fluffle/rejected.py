"""What lies in the queue of refused messages: looked at and given back in order, or taken out for good.

The aggregator put it there, with the reason and the first bytes of what was refused. Those bytes are a stranger's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from broker.errors import BadMessage, StateError
from broker.messages import Rejected
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Delivery, Inbox, Transport
from broker.wire import decode
from fluffle.control import expected
from fluffle.text import columns

MOST = 10_000  # the queue holds no more
QUIET_S = 2.0  # when nothing more came for so long, that was all
BYTES_A_LINE = 16


@dataclass(frozen=True, slots=True)
class Refused:
    """One refused message. `offset` is where it lies in the updates stream; -1 if that is not known."""

    offset: int
    participant: str
    reason: str
    quoted: bytes


async def look(broker: Broker, topology: Topology) -> list[Refused]:
    """All that lies there, the oldest first; it stays there, in that order."""
    async with _held(broker, topology) as deliveries:
        return [_read(delivery) for delivery in deliveries]


async def clear(broker: Broker, topology: Topology, show: Callable[[list[Refused]], None]) -> None:
    """Shows all that lies there and then takes it out. What comes meanwhile stays."""
    async with _held(broker, topology) as deliveries:
        show([_read(delivery) for delivery in deliveries])
        for delivery in deliveries:
            await delivery.ack()


@asynccontextmanager
async def _held(broker: Broker, topology: Topology) -> AsyncIterator[list[Delivery]]:
    """Everything in the queue, unacked: what is not acked goes back to its place when the connection closes."""
    transport = await broker.connect(AGGREGATOR, purpose="operator")
    try:
        yield await _all(await _inbox(transport, topology))
    finally:
        await transport.close()


async def _inbox(transport: Transport, topology: Topology) -> Inbox:
    with expected(topology):
        return await transport.consume(topology.rejected, prefetch=MOST)


async def _all(inbox: Inbox) -> list[Delivery]:
    found: list[Delivery] = []
    while len(found) < MOST and (delivery := await inbox.get(QUIET_S)) is not None:
        found.append(delivery)
    return found


def _read(delivery: Delivery) -> Refused:
    try:
        note, quoted = decode(delivery.body)
        if isinstance(note, Rejected) and delivery.sender == AGGREGATOR:
            return Refused(note.offset, note.participant, note.reason, bytes(quoted))
        why = f"a {note.kind} message of {delivery.sender or 'nobody'}, which has no place here"
    except BadMessage as bad:
        why = f"unreadable: {bad.reason}"
    return Refused(-1, delivery.sender, why, delivery.body)


# -- for people: what strangers wrote must not move the cursor ------------------------------------------------


def table(found: Sequence[Refused]) -> str:
    """One line each, numbered from 1, the oldest first."""
    if not found:
        return "nothing was rejected\n"
    rows = [
        (str(number), _offset(one), printable(one.participant), str(len(one.quoted)), printable(one.reason))
        for number, one in enumerate(found, 1)
    ]
    return columns([("N", "OFFSET", "PARTICIPANT", "BYTES", "REASON"), *rows])


def page(found: Sequence[Refused], number: int | None) -> str:
    """All of the one with that number, or of the newest. Raises StateError if there is none."""
    if not found:
        raise StateError("nothing was rejected: there is nothing to show")
    if not 1 <= (number or len(found)) <= len(found):
        raise StateError(f"there is no rejected message {number}: `fluffle rejected list` has {len(found)}")
    one = found[(number or len(found)) - 1]
    facts = [
        ("participant", printable(one.participant)),
        ("offset", _offset(one)),
        ("reason", printable(one.reason)),
        ("message", printable(_kind(one.quoted))),
        ("quoted", f"{len(one.quoted)} bytes, the first of the message"),
    ]
    return columns(facts) + "\n" + "".join(f"{line}\n" for line in hexdump(one.quoted))


def hexdump(data: bytes) -> Iterator[str]:
    """Offset, bytes and characters, sixteen a line."""
    for at in range(0, len(data), BYTES_A_LINE):
        part = data[at : at + BYTES_A_LINE]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        yield f"{at:06x}  {part.hex(' '):<{3 * BYTES_A_LINE - 1}}  {text}"


def printable(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _kind(quoted: bytes) -> str:
    """What the header says, if all of it was quoted and it can be read."""
    try:
        message, _ = decode(quoted)
    except BadMessage as bad:
        return f"cannot be read: {bad.reason}"
    return f"{message.kind}: {message.model_dump(mode='json', exclude_defaults=True)}"


def _offset(one: Refused) -> str:
    return str(one.offset) if one.offset >= 0 else "-"
