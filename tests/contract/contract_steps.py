"""Short ways to say what contract tests do all the time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from broker.transport import Delivery, Inbox, Transport

SOON_S = 5.0  # what must come comes within this
QUIET_S = 0.2  # what has not come by then is taken not to come
KIB = 1 << 10


LOW = "low on memory"
Shortage = Callable[[], AbstractAsyncContextManager[None]]


class Connect(Protocol):
    """Opens a connection; the aggregator's, unless told otherwise."""

    async def __call__(self, user: str = ...) -> Transport: ...


async def send(transport: Transport, name: str, *bodies: bytes) -> None:
    """Publishes straight to a queue or stream."""
    for body in bodies:
        await transport.publish("", name, body)


async def receive(inbox: Inbox) -> Delivery:
    delivery = await inbox.get(SOON_S)
    assert delivery is not None, "nothing came"
    return delivery


async def receive_all(inbox: Inbox, count: int) -> list[Delivery]:
    return [await receive(inbox) for _ in range(count)]


async def bodies(inbox: Inbox, count: int) -> list[bytes]:
    return [delivery.body for delivery in await receive_all(inbox, count)]


async def is_quiet(inbox: Inbox) -> bool:
    return await inbox.get(QUIET_S) is None


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % i for i in range(start, start + count)]
