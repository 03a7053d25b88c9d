"""The embedded broker: all that Fluffle asks of RabbitMQ, inside one process and one event loop.

It serves the demo, simulation and tests. It is no mock: it keeps the promises of `broker/transport.py`, and
`tests/contract` holds it to the same ones as RabbitMQ. Here are connections and permissions; what outlives
them is in `broker/memory_store.py`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from broker import refusals
from broker.errors import AccessRefused, ConnectionLost, PublishFailed, TransportError
from broker.inbox import WaitingInbox
from broker.memory_store import BrokerStats, Consumer, Reader, Store
from broker.topology import Access
from broker.transport import Binding, Declaration, Inbox, StreamOffset

ANYTHING = r"(?s:.*)"
EVERYTHING = Access(ANYTHING, ANYTHING, ANYTHING, {}, {})
PERMISSIONS_KEPT = 4096  # (exchange, key) pairs that a connection is known to be allowed


@dataclass(frozen=True, slots=True)
class _Guard:
    """What one user may do. Every method raises AccessRefused if it may not."""

    user: str
    access: Access

    def configure(self, name: str) -> None:
        self._require(self.access.configure, name, "declare or delete")

    def write(self, name: str) -> None:
        self._require(self.access.write, name, "write to")

    def read(self, name: str) -> None:
        self._require(self.access.read, name, "read from")

    def publish(self, exchange: str, key: str) -> None:
        self.write(exchange or "amq.default")
        self._require(self.access.publish.get(exchange, ANYTHING), key, f"publish to {exchange!r} with key")

    def declare(self, thing: Declaration) -> None:
        if not isinstance(thing, Binding):
            return self.configure(thing.name)
        self.write(thing.destination)
        self.read(thing.exchange)
        pattern = self.access.bind.get(thing.exchange, ANYTHING)
        return self._require(pattern, thing.pattern, f"bind to {thing.exchange!r} with key")

    def _require(self, pattern: str, name: str, deed: str) -> None:
        literal = re.escape(name)  # most patterns are lists of names: to compile one takes as long as a message
        if literal not in pattern.strip("()").split("|") and not re.fullmatch(pattern, name):
            raise AccessRefused(
                f"user {self.user!r} may not {deed} {name!r}, only what matches {pattern!r}: "
                "extend its permissions or connect as another user"
            )


class MemoryTransport:
    """A connection to the embedded broker."""

    def __init__(self, broker: MemoryBroker, guard: _Guard, purpose: str) -> None:
        self.user = guard.user
        self.purpose = purpose
        self._broker = broker
        self._store = broker.store
        self._guard = guard
        self._may_publish = lru_cache(PERMISSIONS_KEPT)(guard.publish)
        self._inboxes: list[WaitingInbox] = []
        self._lost = ""
        self._publishes = False
        self._resumed = asyncio.Event()

    @property
    def blocked(self) -> str:
        return self._broker.blocks_publishers if self._publishes else ""

    async def declare(self, *things: Declaration) -> None:
        await self._round_trip()
        for thing in things:
            self._guard.declare(thing)
            self._store.declare(thing)

    async def publish(self, exchange: str, key: str, body: bytes, *, timeout_s: float = 10.0) -> None:
        await self._round_trip()
        self._may_publish(exchange, key)
        self._publishes = True
        if self.blocked:
            await self._wait_unblocked(exchange or key, timeout_s)
        self._store.publish(exchange, key, body, self.user)

    async def consume(self, queue: str, *, prefetch: int = 0) -> Inbox:
        await self._round_trip()
        self._guard.read(queue)
        return self._keep(Consumer(self._store.backlog(queue), prefetch))

    async def read(self, stream: str, *, offset: StreamOffset, prefetch: int = 64) -> Inbox:
        await self._round_trip()
        self._guard.read(stream)
        if prefetch < 1:
            raise TransportError(f"reading stream {stream!r} needs a prefetch of at least 1, not {prefetch}")
        return self._keep(Reader(self._store.log(stream), offset))

    async def delete(self, name: str) -> None:
        await self._round_trip()
        self._guard.configure(name)
        self._store.delete(name)

    async def close(self) -> None:
        self._broker.cut([self], "the connection was closed: connect again")

    def abort(self) -> None:
        """Cuts the connection, as if the network had failed."""
        self._broker.cut([self], "the connection was cut: connect again")

    def lose(self, why: str) -> list[WaitingInbox]:
        """Ends the connection; its inboxes are left for the broker to end."""
        self._lost = self._lost or f"{self.user} {self.purpose}: {why}"
        inboxes, self._inboxes = self._inboxes, []
        self.resume()
        return inboxes

    def knows_nothing(self) -> None:
        """Until it publishes again, it is not told that publishers are blocked."""
        self._publishes = False

    def resume(self) -> None:
        """Whoever waits to publish looks again."""
        self._resumed.set()

    async def _wait_unblocked(self, where: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self.blocked and not self._lost:
                    self._resumed.clear()
                    await self._resumed.wait()
        except TimeoutError:
            raise PublishFailed(refusals.not_confirmed(repr(where), timeout_s, self.blocked)) from None
        if self._lost:
            raise ConnectionLost(self._lost)

    async def _round_trip(self) -> None:
        """Gives others their turn before anything happens. The connection may be gone after it."""
        await asyncio.sleep(0)
        if self._lost:
            raise ConnectionLost(self._lost)

    def _keep(self, inbox: WaitingInbox) -> Inbox:
        self._inboxes = [*(i for i in self._inboxes if not i.ended), inbox]
        return inbox


class MemoryBroker:
    """The embedded broker. `access` says what each user may do; without it everybody may do everything. `token`
    makes a text of so many random bytes, by which messages are told apart."""

    def __init__(
        self, access: Callable[[str], Access] | None = None, token: Callable[[int], str] = secrets.token_hex
    ) -> None:
        self._access = access
        self._running = True
        self.blocks_publishers = ""  # why
        self._connections: list[MemoryTransport] = []
        self.store = Store(token)

    async def connect(self, user: str, *, purpose: str) -> MemoryTransport:
        await asyncio.sleep(0)
        if not self._running:
            raise ConnectionLost(f"{user} {purpose}: the embedded broker is stopped: start it, or try again later")
        guard = _Guard(user, self._access(user) if self._access else EVERYTHING)
        connection = MemoryTransport(self, guard, purpose)
        self._connections.append(connection)
        return connection

    @property
    def connections(self) -> tuple[MemoryTransport, ...]:
        """Who is connected now."""
        return tuple(self._connections)

    def stop(self) -> None:
        """Stops the broker: every connection is lost, and none can be made; what it holds is kept."""
        self._running = False
        self.cut(self.connections, "the broker stopped: connect again")

    def start(self) -> None:
        """Starts it again; the time until unused queues expire begins anew."""
        self._running = True
        self.store.renew()

    def block(self, reason: str) -> None:
        """Takes nothing that is published until `unblock`, as RabbitMQ with an alarm of memory or disk."""
        self.blocks_publishers = reason
        for connection in self._connections:
            connection.knows_nothing()

    def unblock(self) -> None:
        self.blocks_publishers = ""
        for connection in self._connections:
            connection.resume()

    def lose_stream_tail(self, name: str, count: int) -> None:
        """Forgets the newest `count` messages of a stream, as a power loss may: streams are not fsynced."""
        self.store.log(name).lose_tail(count)

    def stats(self) -> BrokerStats:
        return self.store.stats()

    def cut(self, connections: Sequence[MemoryTransport], why: str) -> None:
        """Ends connections together: what one gives back must not be delivered to another that goes too."""
        self._connections = [c for c in self._connections if c not in connections]
        inboxes = [inbox for connection in connections for inbox in connection.lose(why)]
        for inbox in inboxes:
            inbox.leave(why)
        for inbox in inboxes:
            inbox.give_back()
