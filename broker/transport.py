"""The narrow seam between Fluffle and a message broker.

A `Transport` is one connection of one user. It is plain, never self-healing: when it is lost, every
pending and later call raises `ConnectionLost`, and whoever holds it connects again and decides what to
do. `broker/memory.py` and `broker/rabbitmq.py` implement it; `tests/contract` states what both promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

StreamOffset = int | Literal["first", "next"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A topic exchange."""

    name: str


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue. `replicated` asks for a quorum queue; lengths and expiry bound what it may hold."""

    name: str
    replicated: bool = False
    single_active_consumer: bool = False
    delivery_limit: int | None = None
    max_length: int | None = None  # the oldest message makes room for the newest
    expires_s: float | None = None  # an unused queue is deleted


@dataclass(frozen=True, slots=True)
class Stream:
    """An append-only log, read by offset. Whole segments are dropped once it exceeds `max_bytes`."""

    name: str
    max_bytes: int
    segment_bytes: int


@dataclass(frozen=True, slots=True)
class Binding:
    """Messages published to `exchange` with a routing key that matches `pattern` reach `destination`."""

    exchange: str
    pattern: str
    destination: str


Declaration = Exchange | Queue | Stream | Binding


class Settle(Protocol):
    """What a delivery calls to settle itself: accept it, or give it back (`requeue`) or drop it."""

    async def __call__(self, *, accept: bool, requeue: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it arrived. `sender` is the user the broker verified; `offset` is set by streams.

    `id` is another one for every publish, if the publisher is honest.
    """

    body: bytes
    key: str
    sender: str
    settle: Settle
    offset: int = -1
    delivery_count: int = 0  # how often it was delivered before
    id: str = ""

    async def ack(self) -> None:
        await self.settle(accept=True, requeue=False)

    async def reject(self, *, requeue: bool) -> None:
        await self.settle(accept=False, requeue=requeue)


class Inbox(Protocol):
    """Where a consumer's deliveries wait, in order, at most `prefetch` of them unsettled."""

    async def get(self, timeout_s: float | None = None) -> Delivery | None:
        """The next delivery, or None when `timeout_s` seconds passed. Raises ConnectionLost."""

    async def close(self) -> None:
        """Stops consuming. What was not acked goes back to its queue."""


class Transport(Protocol):
    """One connection of one user. Every method raises ConnectionLost once the connection is gone."""

    user: str

    @property
    def blocked(self) -> str:
        """Why the broker takes nothing that is published, as "low on memory"; empty if it does.

        A connection is told when it publishes, not before, and what it published then may have arrived.
        """

    async def declare(self, *things: Declaration) -> None:
        """Makes sure that these exist. Declaring the same thing again changes nothing.

        Raises AccessRefused, or TransportError if something else of that name exists.
        """

    async def publish(self, exchange: str, key: str, body: bytes, *, timeout_s: float = 10.0) -> None:
        """Publishes a persistent message and returns once the broker has taken responsibility for it.

        `exchange` "" is the default exchange: `key` names a queue or stream. While publishers are blocked it waits.
        After PublishFailed or ConnectionLost the message may or may not have arrived. Raises Unroutable,
        AccessRefused, MessageTooLarge.
        """

    async def consume(self, queue: str, *, prefetch: int = 0) -> Inbox:
        """Takes messages from a queue; each must be acked or rejected. `prefetch` 0 sets no limit.

        A stream cannot be consumed, nor a queue read: that raises TransportError here or at the first delivery.
        """

    async def read(self, stream: str, *, offset: StreamOffset, prefetch: int = 64) -> Inbox:
        """Reads a stream from `offset` on; an older one than is kept starts at the oldest kept.

        An offset beyond the end waits for it. Deliveries settle themselves when they are taken.
        """

    async def delete(self, name: str) -> None:
        """Deletes a queue or stream and whatever it holds; it need not exist. Raises AccessRefused."""

    async def close(self) -> None:
        """Closes the connection. May be called twice."""


class Broker(Protocol):
    """What connections are made from: an address, or the embedded broker."""

    async def connect(self, user: str, *, purpose: str) -> Transport:
        """Opens a connection, shown as `user purpose` in the broker's own tools. Raises ConnectionLost."""
