"""What the embedded broker holds: exchanges, queues and streams, and the inboxes on them.

Whatever changes state is plain synchronous code, so nothing can come between. Only an empty inbox waits.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from typing import NamedTuple

from broker.errors import TransportError, Unroutable
from broker.inbox import WaitingInbox
from broker.transport import Binding, Declaration, Delivery, Exchange, Queue, Stream, StreamOffset

WAYS_KEPT = 4096  # routing keys whose way is known without matching patterns again


@dataclass(frozen=True, slots=True)
class Stats:
    """What passed through one exchange, queue or stream, and what it holds now."""

    published: int
    published_bytes: int
    delivered: int
    delivered_bytes: int
    depth: int = 0  # messages ready to be delivered, or kept in a stream
    unacked: int = 0
    evicted: int = 0  # made room for newer ones (`max_length`)
    given_up: int = 0  # came back more often than `delivery_limit` allows


@dataclass(frozen=True, slots=True)
class BrokerStats:
    """The statistics of everything on the broker, by name."""

    exchanges: dict[str, Stats]
    queues: dict[str, Stats]
    streams: dict[str, Stats]


class Message(NamedTuple):
    """What lies in a queue. It keeps its `place` when it comes back: places order the queue."""

    place: int
    body: bytes
    key: str
    sender: str
    deliveries: int = 0  # earlier ones


class Entry(NamedTuple):
    """What lies in a stream."""

    body: bytes
    key: str
    sender: str
    id: str


class Place:
    """Something messages pass through; it counts them."""

    def __init__(self) -> None:
        self._published = 0
        self._published_bytes = 0
        self._delivered = 0
        self._delivered_bytes = 0

    def _came(self, body: bytes) -> None:
        self._published += 1
        self._published_bytes += len(body)

    def _went(self, body: bytes, copies: int = 1) -> None:
        self._delivered += copies
        self._delivered_bytes += copies * len(body)

    def stats(self) -> Stats:
        return Stats(self._published, self._published_bytes, self._delivered, self._delivered_bytes)


class Router(Place):
    """A topic exchange. It remembers where a routing key leads until its bindings change."""

    def __init__(self, spec: Exchange) -> None:
        super().__init__()
        self.spec = spec
        self._bindings: dict[str, dict[str, Holder]] = {}  # by pattern and name
        self._wild: list[str] = []  # patterns that fit more than one key
        self._ways: dict[str, tuple[Holder, ...]] = {}

    def bind(self, pattern: str, holder: Holder) -> None:
        if pattern not in self._bindings and ("*" in pattern or "#" in pattern):
            self._wild.append(pattern)
        self._bindings.setdefault(pattern, {})[holder.spec.name] = holder
        self._ways.clear()

    def unbind(self, holder: Holder) -> None:
        for bound in self._bindings.values():
            bound.pop(holder.spec.name, None)
        self._ways.clear()

    def holders(self, key: str) -> tuple[Holder, ...]:
        """Every queue and stream that the key leads to, once each."""
        if key not in self._ways:
            if len(self._ways) >= WAYS_KEPT:
                self._ways.clear()
            words = key.split(".") if key else []
            patterns = (key, *(pattern for pattern in self._wild if matches(pattern.split("."), words)))
            holders = (holder for pattern in patterns for holder in self._bindings.get(pattern, {}).values())
            self._ways[key] = tuple(dict.fromkeys(holders))
        return self._ways[key]

    def passed(self, body: bytes, copies: int) -> None:
        self._came(body)
        self._went(body, copies)


def matches(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """Whether a topic pattern fits: `*` stands for one word, `#` for any number of words."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(matches(pattern[1:], words[i:]) for i in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and matches(pattern[1:], words[1:])


class Backlog(Place):
    """A queue: what is ready, in order of place, and who consumes. What is unacked lies with its consumer."""

    def __init__(self, spec: Queue) -> None:
        super().__init__()
        self.spec = spec
        self._ready: list[Message] = []  # a heap: what comes back finds its old place
        self._consumers: deque[Consumer] = deque()
        self._places = 0
        self._evicted = 0
        self._given_up = 0
        self.renew()

    def renew(self) -> None:
        """Notes that the queue is used: only an unused one expires."""
        if self.spec.expires_s is not None:
            self._expires_at = asyncio.get_running_loop().time() + self.spec.expires_s

    def expired(self) -> bool:
        if self.spec.expires_s is None or self._consumers:
            return False
        return asyncio.get_running_loop().time() >= self._expires_at

    def put(self, body: bytes, key: str, sender: str) -> None:
        self._came(body)
        self._places += 1
        heappush(self._ready, Message(self._places, body, key, sender))
        self.flow()

    def take_back(self, messages: Iterable[Message]) -> None:
        """Puts unacked messages where they were, unless they came back too often."""
        limit = self.spec.delivery_limit
        for message in messages:
            if limit is not None and message.deliveries >= limit:
                self._given_up += 1
            else:
                heappush(self._ready, message._replace(deliveries=message.deliveries + 1))
        self.flow()

    def flow(self) -> None:
        """Drops the oldest beyond `max_length` (of the ready ones), then delivers what consumers have room for."""
        longest = self.spec.max_length
        while longest is not None and len(self._ready) > longest:
            heappop(self._ready)
            self._evicted += 1
        while self._ready and (consumer := self._next_consumer()) is not None:
            message = heappop(self._ready)
            self._went(message.body)
            consumer.push(message)

    def _next_consumer(self) -> Consumer | None:
        """The consumer whose turn it is among those with room; with single active consumer only the first."""
        if self.spec.single_active_consumer:
            return self._consumers[0] if self._consumers and self._consumers[0].has_room() else None
        for _ in range(len(self._consumers)):
            self._consumers.rotate(-1)
            if self._consumers[-1].has_room():
                return self._consumers[-1]
        return None

    def join(self, consumer: Consumer) -> None:
        self._consumers.append(consumer)
        self.flow()

    def leave(self, consumer: Consumer) -> None:
        self._consumers.remove(consumer)
        self.renew()

    def dismiss(self, why: str) -> None:
        for consumer in tuple(self._consumers):
            consumer.leave(why)

    def stats(self) -> Stats:
        return replace(
            super().stats(),
            depth=len(self._ready),
            unacked=sum(consumer.unacked for consumer in self._consumers),
            evicted=self._evicted,
            given_up=self._given_up,
        )


@dataclass(slots=True)
class Segment:
    first: int
    size: int = 0


class Log(Place):
    """A stream. Readers keep their own position in it, so they cost nothing, however slow or many they are."""

    def __init__(self, spec: Stream, token: Callable[[int], str]) -> None:
        super().__init__()
        self.spec = spec
        self._token = token
        self.next = 0
        self._entries: dict[int, Entry] = {}
        self._segments = deque([Segment(0)])
        self._readers: list[Reader] = []

    @property
    def first(self) -> int:
        return self._segments[0].first

    def expired(self) -> bool:
        return False

    def put(self, body: bytes, key: str, sender: str) -> None:
        self._came(body)
        if self._segments[-1].size >= self.spec.segment_bytes:
            self._begin_segment()
        self._entries[self.next] = Entry(body, key, sender, self._token(8))
        self._segments[-1].size += len(body)
        self.next += 1
        for reader in self._readers:
            reader.wake()

    def _begin_segment(self) -> None:
        """Retention acts here and on whole segments, as in RabbitMQ."""
        self._segments.append(Segment(self.next))
        while len(self._segments) > 1 and sum(s.size for s in self._segments) > self.spec.max_bytes:
            gone = self._segments.popleft()
            for offset in range(gone.first, self.first):
                del self._entries[offset]

    def lose_tail(self, count: int) -> None:
        for _ in range(min(count, self.next - self.first)):
            self.next -= 1
            lost = self._entries.pop(self.next)
            if self.next < self._segments[-1].first:
                self._segments.pop()
            self._segments[-1].size -= len(lost.body)

    def entry(self, offset: int) -> Entry | None:
        """What lies at `offset`, counted as delivered; None if it is not written yet."""
        entry = self._entries.get(offset)
        if entry is not None:
            self._went(entry.body)
        return entry

    def join(self, reader: Reader) -> None:
        self._readers.append(reader)

    def leave(self, reader: Reader) -> None:
        self._readers.remove(reader)

    def dismiss(self, why: str) -> None:
        for reader in tuple(self._readers):
            reader.leave(why)

    def stats(self) -> Stats:
        return replace(super().stats(), depth=len(self._entries))


Holder = Backlog | Log


class Consumer(WaitingInbox):
    """An inbox on a queue. What was pushed to it is unacked, whether it was taken yet or not."""

    def __init__(self, backlog: Backlog, prefetch: int) -> None:
        super().__init__()
        self._backlog = backlog
        self._prefetch = prefetch
        self._unacked: dict[int, Message] = {}
        self._fresh: deque[Message] = deque()
        backlog.join(self)

    @property
    def unacked(self) -> int:
        return len(self._unacked)

    @property
    def _origin(self) -> str:
        return f"queue {self._backlog.spec.name!r}"

    def has_room(self) -> bool:
        return not self._prefetch or len(self._unacked) < self._prefetch

    def push(self, message: Message) -> None:
        self._unacked[message.place] = message
        self._fresh.append(message)
        self.wake()

    def give_back(self) -> None:
        unacked, self._unacked = self._unacked, {}
        self._backlog.take_back(unacked.values())

    def _take(self) -> Delivery | None:
        if not self._fresh:
            return None
        message = self._fresh.popleft()
        settle = partial(self._settle, message)
        return Delivery(message.body, message.key, message.sender, settle, delivery_count=message.deliveries)

    def _depart(self) -> None:
        self._backlog.leave(self)

    async def _settle(self, message: Message, *, accept: bool, requeue: bool) -> None:
        self._check()
        if self._unacked.get(message.place) is not message:
            raise TransportError(f"a delivery from {self._origin} was settled twice: ack or reject it once")
        del self._unacked[message.place]
        if accept or not requeue:
            self._backlog.flow()
        else:
            self._backlog.take_back((message,))


class Reader(WaitingInbox):
    """An inbox on a stream: a position, nothing more."""

    def __init__(self, log: Log, offset: StreamOffset) -> None:
        super().__init__()
        self._log = log
        named = {"first": log.first, "next": log.next}
        self._position = offset if isinstance(offset, int) else named[offset]
        log.join(self)

    @property
    def _origin(self) -> str:
        return f"stream {self._log.spec.name!r}"

    def _take(self) -> Delivery | None:
        offset = max(self._position, self._log.first)
        entry = self._log.entry(offset)
        if entry is None:
            return None
        self._position = offset + 1
        return Delivery(entry.body, entry.key, entry.sender, _settled, offset, id=entry.id)

    def _depart(self) -> None:
        self._log.leave(self)


async def _settled(*, accept: bool, requeue: bool) -> None:
    """Streams keep their messages whatever is done with a delivery."""
    del accept, requeue


@dataclass(slots=True)
class Store:
    """Everything that outlives connections. `token` makes a text of so many random bytes."""

    token: Callable[[int], str] = secrets.token_hex
    exchanges: dict[str, Router] = field(default_factory=dict)
    holders: dict[str, Holder] = field(default_factory=dict)

    def declare(self, thing: Declaration) -> None:
        match thing:
            case Exchange():
                self.exchanges.setdefault(thing.name, Router(thing))
            case Binding():
                self.exchange(thing.exchange).bind(thing.pattern, self._holder(thing.destination))
            case Queue() | Stream():
                self._declare_holder(thing)

    def _declare_holder(self, spec: Queue | Stream) -> None:
        known = self._living(spec.name)
        if known is None:
            self.holders[spec.name] = _make(spec, self.token)
        elif known.spec != spec:
            raise TransportError(
                f"{spec.name!r} already exists as {known.spec}, not as {spec}: delete it, or declare it as it is"
            )
        elif isinstance(known, Backlog):
            known.renew()

    def exchange(self, name: str) -> Router:
        if name not in self.exchanges:
            raise TransportError(f"exchange {name!r} does not exist: declare it first")
        return self.exchanges[name]

    def backlog(self, name: str) -> Backlog:
        holder = self._holder(name)
        if isinstance(holder, Log):
            raise TransportError(f"{name!r} is a stream and cannot be consumed: read it")
        return holder

    def log(self, name: str) -> Log:
        holder = self._holder(name)
        if isinstance(holder, Backlog):
            raise TransportError(f"{name!r} is a queue and cannot be read: consume it")
        return holder

    def _holder(self, name: str) -> Holder:
        holder = self._living(name)
        if holder is None:
            raise TransportError(f"queue or stream {name!r} does not exist: declare it (again, if it expired)")
        return holder

    def _living(self, name: str) -> Holder | None:
        """What has that name. This is where an expired queue goes."""
        holder = self.holders.get(name)
        if holder is not None and holder.expired():
            self.delete(name)
            return None
        return holder

    def publish(self, exchange: str, key: str, body: bytes, sender: str) -> None:
        router = self.exchange(exchange) if exchange else None
        names = (key,) if router is None else (h.spec.name for h in router.holders(key))
        living = [holder for name in names if (holder := self._living(name)) is not None]
        if not living:
            where = f"exchange {exchange!r} with key {key!r}" if exchange else f"{key!r}"
            raise Unroutable(f"no queue or stream takes what is published to {where}: declare and bind one first")
        if router is not None:
            router.passed(body, len(living))
        for holder in living:
            holder.put(body, key, sender)

    def delete(self, name: str) -> None:
        holder = self.holders.pop(name, None)
        if holder is not None:
            for router in self.exchanges.values():
                router.unbind(holder)
            holder.dismiss("it was deleted: declare it again")

    def renew(self) -> None:
        for holder in self.holders.values():
            if isinstance(holder, Backlog):
                holder.renew()

    def stats(self) -> BrokerStats:
        return BrokerStats(
            exchanges={name: router.stats() for name, router in self.exchanges.items()},
            queues={name: h.stats() for name, h in self.holders.items() if isinstance(h, Backlog)},
            streams={name: h.stats() for name, h in self.holders.items() if isinstance(h, Log)},
        )


def _make(spec: Queue | Stream, token: Callable[[int], str]) -> Holder:
    if isinstance(spec, Stream):
        return Log(spec, token)
    if spec.delivery_limit is not None and not spec.replicated:
        raise TransportError(f"queue {spec.name!r} has a delivery_limit, which RabbitMQ offers only if replicated")
    return Backlog(spec)
