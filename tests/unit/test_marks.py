"""Which messages a record remembers, to know a stream that lost its tail."""

from __future__ import annotations

from itertools import pairwise

from aggregator.marks import MOST, Marks, fingerprint, marked
from broker.transport import Delivery


async def settled(*, accept: bool, requeue: bool) -> None:
    del accept, requeue


def delivery(offset: int, body: bytes = b"beat", number: str = "1") -> Delivery:
    return Delivery(body, "p01.heartbeat", "p01", settled, offset, id=number)


def test_two_messages_with_the_same_bytes_are_told_apart() -> None:
    assert len({fingerprint(delivery(1, body, number)) for body in (b"a", b"b") for number in "12"}) == 4
    assert fingerprint(delivery(1)) == fingerprint(delivery(2))


def test_the_first_and_the_newest_are_remembered_and_fewer_the_longer_ago() -> None:
    marks: Marks = ()
    for offset in range(0, 7000, 7):
        marks = marked(marks, delivery(offset))
        assert len(marks) <= MOST
    offsets = [offset for offset, _ in marks]
    assert offsets[0] == 0
    assert offsets[-MOST // 2 :] == list(range(7000 - 7 * (MOST // 2), 7000, 7))
    gaps = [after - before for before, after in pairwise(offsets)]
    assert gaps == sorted(gaps, reverse=True)


def test_nothing_new_changes_nothing() -> None:
    marks = marked((), delivery(5))
    assert marked(marks, None) == marked(marks, delivery(5)) == marked(marks, delivery(4)) == marks
