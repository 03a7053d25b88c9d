"""Faults on purpose: connections that break at any moment, lost confirms, duplicates, delays, overtaking.

`FaultyBroker(MemoryBroker(), faults)` is a broker whose every transport operation asks `faults` twice, before
and after its effect. A fault is always one that an honest broker and a bad network can produce: what was
confirmed has arrived. Without a FaultyBroker in between nothing of this costs anything.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from random import Random
from typing import Literal, Protocol

from broker.errors import ConnectionLost, PublishFailed
from broker.memory import MemoryBroker, MemoryTransport
from broker.transport import Declaration, Delivery, Inbox, Settle, StreamOffset

Name = Literal["connect", "declare", "publish", "consume", "read", "delete", "get", "ack", "reject", "close"]
When = Literal["before", "after"]
Kind = Literal["disconnect", "delay", "fail_publish", "duplicate", "hold_back"]


@dataclass(frozen=True, slots=True)
class Operation:
    """A moment at which a fault may strike; `index` counts those of this user and purpose, from 0."""

    index: int
    user: str
    purpose: str
    name: Name
    target: str  # what was declared, published to, consumed...
    when: When


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong. Where a kind makes no sense, nothing does.

    disconnect    the connection is cut; `after`: what was asked for has happened
    delay         `seconds` pass first (not after a get: a delivery in hand cannot be cancelled away)
    fail_publish  the publisher is told PublishFailed; `before`: it did not arrive, `after`: it did
    duplicate     (before a publish) the message arrives twice
    hold_back     (before a publish) the next message to the same place overtakes it, within `seconds`
    """

    kind: Kind
    seconds: float = 0.0


NOTHING = Fault("delay")


class Faults(Protocol):
    """Decides what goes wrong, if anything."""

    def __call__(self, operation: Operation) -> Fault | None: ...


class NoFaults:
    """Nothing goes wrong; it remembers every operation, so that a test knows where faults could strike."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def __call__(self, operation: Operation) -> Fault | None:
        self.operations.append(operation)
        return None

    def count(self, user: str, purpose: str) -> int:
        """How many operations that user's connections for that purpose made: their indexes lie below."""
        return sum((o.user, o.purpose) == (user, purpose) for o in self.operations)


@dataclass(slots=True)
class FaultAt:
    """One fault, at one operation of one user and purpose. `struck` is that operation, once it came."""

    user: str
    purpose: str
    index: int
    fault: Fault
    struck: Operation | None = None

    def __call__(self, operation: Operation) -> Fault | None:
        if (operation.user, operation.purpose, operation.index) != (self.user, self.purpose, self.index):
            return None
        self.struck = operation
        return self.fault


@dataclass(frozen=True, slots=True)
class Rates:
    """How probable each kind of fault is at each operation at which it makes sense."""

    disconnect: float = 0.0
    delay: float = 0.0
    fail_publish: float = 0.0
    duplicate: float = 0.0
    hold_back: float = 0.0


class SeededFaults:
    """Random faults that depend on the seed and each connection's own operations, not on how tasks interleave.

    After `most` of them nothing more goes wrong: whoever has to catch up on a long log would be cut off again for
    ever if it takes more operations than lie between two cuts.
    """

    def __init__(self, seed: int, rates: Rates, *, longest_s: float = 0.1, most: int = 1_000_000) -> None:
        self._seed = seed
        self._rates = rates
        self._longest_s = longest_s
        self._most = most
        self.struck: list[tuple[Operation, Fault]] = []

    def __call__(self, operation: Operation) -> Fault | None:
        if len(self.struck) >= self._most:
            return None
        dice = Random(f"{self._seed} {astuple(operation)}")  # noqa: S311 (not for secrets)
        luck = dice.random()
        for kind in _sensible(operation):
            luck -= getattr(self._rates, kind)
            if luck < 0:
                fault = Fault(kind, dice.uniform(0, self._longest_s))
                self.struck.append((operation, fault))
                return fault
        return None


def _sensible(operation: Operation) -> tuple[Kind, ...]:
    match operation.name, operation.when:
        case "publish", "before":
            return ("disconnect", "delay", "fail_publish", "duplicate", "hold_back")
        case "publish", "after":
            return ("disconnect", "delay", "fail_publish")
        case "get", "after":
            return ("disconnect",)
        case _:
            return ("disconnect", "delay")


class FaultyBroker:
    """A broker in front of the embedded one, at which `faults` strike."""

    def __init__(self, broker: MemoryBroker, faults: Faults) -> None:
        self._broker = broker
        self._faults = faults
        self._indexes: Counter[tuple[str, str]] = Counter()
        self._overtaken: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def connect(self, user: str, *, purpose: str) -> FaultyTransport:
        strike = _Strike(partial(self._decide, user, purpose))
        await strike("connect", "", "before")
        connection = await self._broker.connect(user, purpose=purpose)
        strike.cut = connection.abort
        await strike("connect", "", "after")
        return FaultyTransport(connection, strike, self)

    async def hold_back(self, place: str, at_most_s: float) -> None:
        """Waits until something was published to `place`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._overtaken[place].wait()

    def arrived(self, place: str) -> None:
        """Lets go of what was held back there."""
        if place in self._overtaken:
            self._overtaken.pop(place).set()

    def _decide(self, user: str, purpose: str, moment: _Moment) -> Fault | None:
        index = self._indexes[user, purpose]
        self._indexes[user, purpose] += 1
        return self._faults(Operation(index, user, purpose, *moment))


_Moment = tuple[Name, str, When]


class _Strike:
    """Where the faults meet one connection."""

    def __init__(self, decide: Callable[[_Moment], Fault | None]) -> None:
        self._decide = decide
        self.cut: Callable[[], None] = lambda: None

    async def __call__(self, name: Name, target: str, when: When) -> Fault | None:
        fault = self.at_once(name, target, when)
        if fault is not None and fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        return fault

    def at_once(self, name: Name, target: str, when: When) -> Fault | None:
        """The same without delays."""
        fault = self._decide((name, target, when))
        if fault is not None and fault.kind == "disconnect":
            self.cut()
            raise ConnectionLost(f"injected fault: the connection was cut {when} {name} {target!r}: connect again")
        return fault


class FaultyTransport:
    """A connection at whose every operation a fault may strike."""

    def __init__(self, inner: MemoryTransport, strike: _Strike, broker: FaultyBroker) -> None:
        self.user = inner.user
        self.purpose = inner.purpose
        self.abort = inner.abort
        self._inner = inner
        self._strike = strike
        self._broker = broker

    @property
    def blocked(self) -> str:
        return self._inner.blocked

    async def declare(self, *things: Declaration) -> None:
        target = " ".join(str(getattr(thing, "name", thing)) for thing in things)
        await self._strike("declare", target, "before")
        await self._inner.declare(*things)
        await self._strike("declare", target, "after")

    async def publish(self, exchange: str, key: str, body: bytes, *, timeout_s: float = 10.0) -> None:
        place = exchange or key
        before = await self._strike("publish", place, "before") or NOTHING
        if before.kind == "fail_publish":
            raise PublishFailed(f"injected fault: the message to {place!r} did not arrive: publish it again")
        if before.kind == "hold_back":
            await self._broker.hold_back(place, min(before.seconds, timeout_s))
        for _ in range(2 if before.kind == "duplicate" else 1):
            await self._inner.publish(exchange, key, body, timeout_s=timeout_s)
        self._broker.arrived(place)
        after = await self._strike("publish", place, "after") or NOTHING
        if after.kind == "fail_publish":
            raise PublishFailed(f"injected fault: the confirm from {place!r} was lost: publish it again")

    async def consume(self, queue: str, *, prefetch: int = 0) -> Inbox:
        await self._strike("consume", queue, "before")
        inbox = await self._inner.consume(queue, prefetch=prefetch)
        await self._strike("consume", queue, "after")
        return _FaultyInbox(inbox, self._strike, queue)

    async def read(self, stream: str, *, offset: StreamOffset, prefetch: int = 64) -> Inbox:
        await self._strike("read", stream, "before")
        inbox = await self._inner.read(stream, offset=offset, prefetch=prefetch)
        await self._strike("read", stream, "after")
        return _FaultyInbox(inbox, self._strike, stream)

    async def delete(self, name: str) -> None:
        await self._strike("delete", name, "before")
        await self._inner.delete(name)
        await self._strike("delete", name, "after")

    async def close(self) -> None:
        with suppress(ConnectionLost):
            await self._strike("close", "", "before")
            await self._inner.close()
            await self._strike("close", "", "after")


class _FaultyInbox:
    def __init__(self, inner: Inbox, strike: _Strike, target: str) -> None:
        self._inner = inner
        self._strike = strike
        self._target = target

    async def get(self, timeout_s: float | None = None) -> Delivery | None:
        await self._strike("get", self._target, "before")
        delivery = await self._inner.get(timeout_s)
        self._strike.at_once("get", self._target, "after")
        return delivery and replace(delivery, settle=partial(self._settle, delivery.settle))

    async def _settle(self, settle: Settle, *, accept: bool, requeue: bool) -> None:
        name: Name = "ack" if accept else "reject"
        await self._strike(name, self._target, "before")
        await settle(accept=accept, requeue=requeue)
        await self._strike(name, self._target, "after")

    async def close(self) -> None:
        with suppress(ConnectionLost):
            await self._strike("close", self._target, "before")
            await self._inner.close()
            await self._strike("close", self._target, "after")
