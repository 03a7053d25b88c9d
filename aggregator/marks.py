"""Whether the stream still holds what was read of it.

A broker that lost the tail of a stream gives the same offsets again, to what comes next: participants may have
published more than was lost before anybody leads. So an offset alone does not tell; the record also names, for some
of the messages that were read, which one lay there.
"""

from __future__ import annotations

import hashlib

from broker.errors import LeadershipLost
from broker.transport import Delivery, Transport

MOST = 32  # in a record

Marks = tuple[tuple[int, str], ...]  # offset and fingerprint, the newest last


def fingerprint(delivery: Delivery) -> str:
    """Tells one message from every other, also from one with the same bytes."""
    return hashlib.sha256(delivery.id.encode() + delivery.body).hexdigest()[:16]


def marked(marks: Marks, delivery: Delivery | None) -> Marks:
    """With the message that was read last. If there are too many, every second of the older half goes: the first
    stays, and the longer ago, the wider apart they are."""
    if delivery is None or (marks and delivery.offset <= marks[-1][0]):
        return marks
    half = MOST // 2
    kept = marks if len(marks) < MOST else (*marks[:half:2], *marks[half:])
    return (*kept, (delivery.offset, fingerprint(delivery)))


async def surviving(marks: Marks, end: int, reader: Transport, stream: str, patience_s: float) -> Marks:
    """Those up to the newest whose message is there; the stream was read up to it. `end` is known to be there."""
    while marks and not (marks[-1][0] <= end and await _is_there(marks[-1], reader, stream, patience_s)):
        marks = marks[:-1]
    return marks


async def _is_there(mark: tuple[int, str], reader: Transport, stream: str, patience_s: float) -> bool:
    offset, known = mark
    inbox = await reader.read(stream, offset=offset, prefetch=1)
    delivery = await inbox.get(patience_s)
    await inbox.close()
    if delivery is None:
        raise LeadershipLost(f"{stream} gave nothing from offset {offset} on within {patience_s:g} s")
    return delivery.offset > offset or fingerprint(delivery) == known  # above: it made room for newer ones
