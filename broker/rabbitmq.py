"""RabbitMQ behind the seam of `broker/transport.py`: plain connections, and nothing that heals itself.

RabbitMQ closes a channel on every refusal. So each request has a channel of its own, each consumer keeps one,
and the publishing one is opened again after an error: a refusal costs whoever caused it, never the connection.
Readers of streams leave theirs to the next one, for RabbitMQ 3.10.8 never forgets a channel that read a stream
(5 KB each; mended in November 2022, https://github.com/rabbitmq/rabbitmq-server/pull/6325). A channel is closed
when some stream was read a hundred times on it: if a segment is dropped just when a reader begins, RabbitMQ may
leave its index open until then.

It is built on aio-pika's plain connection and on channels of the protocol layer under it (aiormq): they connect,
declare, consume, delete, and tell what went wrong. Messages themselves, their confirms and acks go past both
(`broker/frames.py`), because a library's way copies a body ten times and runs tasks for every message.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, SupportsIndex, TypeVar

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq import TransportFactory, spec
from aiormq.abc import AbstractChannel as UnderlayChannel
from aiormq.abc import AbstractConnection as UnderlayConnection
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelAccessRefused
from yarl import URL

from broker import refusals
from broker.blocking import BlockWatch
from broker.definitions import Arguments, arguments_of
from broker.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    MessageTooLarge,
    PublishFailed,
    QueueLost,
    TransportError,
    Unroutable,
)
from broker.fitness import Facts
from broker.frames import HEARTBEAT, Frames, Letter, Message, ack_frame, publish_frames, reject_frame
from broker.inbox import WaitingInbox
from broker.transport import Binding, Declaration, Delivery, Exchange, Inbox, Queue, Stream, StreamOffset

OFFSET = "x-stream-offset"
OLDEST_VERSION = (3, 10)  # the first whose streams and quorum queues do what is asked of them here
CLOSE_S = 5.0  # for the farewell; after that the broker finds out by itself
READINGS = 100  # of one stream on one channel, one after the other
LIFE_S = 1.0  # after so long without anything else aiormq is told that the connection lives, if it does
RETRY_S = 0.5  # between attempts to reach a queue that a restarted broker has not found yet

REFUSED = (AMQPError, ChannelInvalidStateError, TimeoutError)  # what a request that failed raises, if not lost

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RabbitSettings:
    """Waits on the way to RabbitMQ, which gives up whoever was silent for about twice `heartbeat_s`."""

    heartbeat_s: int = 5
    patience_s: float = 30.0  # for an answer to anything but a publish, which has its own time-out
    restart_s: float = 30.0  # for a restarted broker to find its queues again


class RabbitBroker:
    """A RabbitMQ at `amqp[s]://user:password@host:port/vhost`.

    In production every process has a user of its own, whose name is the participant's, or `aggregator`. An address
    without a name means that one. Where one process plays several (tests, simulation), or where the password is not
    in the address, `passwords` knows the password of each.
    """

    def __init__(
        self, url: str, passwords: Callable[[str], str] | None = None, settings: RabbitSettings | None = None
    ) -> None:
        # Whatever fails reaches the caller as an error; the libraries would tell the same again, with tracebacks.
        for library in ("aio_pika", "aiormq"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._url = URL(url)
        self._passwords = passwords
        self._settings = settings or RabbitSettings()

    async def connect(self, user: str, *, purpose: str) -> RabbitTransport:
        """Raises AccessRefused for a wrong password, and ConfigError if this broker or address will never do."""
        url, name = self._address(user), f"{user} {purpose}"
        where = f"{name}: {url.host}:{url.port or url.scheme}"
        try:
            async with asyncio.timeout(self._settings.patience_s):
                connection = await _connected(url, name)
        except ProbableAuthenticationError as error:
            raise AccessRefused(
                f"{where} refused user or password ({_text(error)}): correct the address"
            ) from error
        except (AMQPError, OSError, TimeoutError, EOFError) as error:
            raise ConnectionLost(f"{where} {refusals.not_connected(_text(error), user, url.path)}") from error
        try:
            check_broker(_underlay(connection).server_properties)
        except ConfigError:
            await connection.close()
            raise
        return RabbitTransport(connection, user, name, self._settings)

    async def probe(self, user: str) -> RabbitProbe:
        """A connection of its own for `fluffle broker check`. Raises ConnectionLost."""
        address, name = self._address(user), f"{user} probe"
        try:
            async with asyncio.timeout(self._settings.patience_s):
                connection = await _connected(address, name)
        except (AMQPError, OSError, TimeoutError, EOFError) as error:
            raise ConnectionLost(f"{name}: cannot connect once more ({_text(error)}): try again") from error
        return RabbitProbe(connection, self._settings)

    def _address(self, user: str) -> URL:
        url = self._url.update_query(heartbeat=negotiated_s(self._settings.heartbeat_s))
        if self._passwords is not None:
            return url.with_user(user).with_password(self._passwords(user))
        if url.user is None:
            return url.with_user(user)
        if url.user != user and url.query.get("auth", "").upper() != "EXTERNAL":
            raise ConfigError(
                f"the broker's address is that of user {url.user!r}, but this is {user!r}: RabbitMQ vouches for "
                f"names, so give {user!r} an address with a user of that name, or with none"
            )
        return url


def negotiated_s(heartbeat_s: int) -> int:
    """What RabbitMQ is told. It closes a connection two to three times that after it heard the last of it, because
    it looks once in each interval and needs two looks in vain: told four fifths, it takes about twice the whole."""
    return max(1, round(0.8 * heartbeat_s))


class _Wire(TransportFactory):
    """TCP or TLS as aiormq would make them; what carries messages goes past aiormq, both ways."""

    def __init__(self, watch: BlockWatch) -> None:
        self.frames = Frames()
        self._writer: asyncio.StreamWriter
        self._watch = watch

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        provider, loop = options.pop("ssl_context_provider"), asyncio.get_running_loop()
        context = await provider.get_context() if url.scheme == "amqps" else None
        reader = _Filter(self.frames, self._watch, loop.time)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            wire, _ = await loop.create_connection(
                lambda: protocol, url.host or "", url.port or 0, ssl=context, **options
            )
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        self._writer = asyncio.StreamWriter(wire, protocol, reader, loop)
        return reader, self._writer

    def write(self, frames: bytes) -> None:
        """Writes at once, behind all that was written before. Raises ConnectionLost.

        aiormq may have closed its side already, a moment before we are told that the connection is lost.
        """
        try:
            if not self._writer.is_closing():
                return self._writer.write(frames)
        except RuntimeError:  # it said that nothing follows
            pass
        raise ConnectionLost("the connection was lost: connect again")


class _Filter(asyncio.StreamReader):
    """Lets aiormq see what is not ours. It takes silence for a dead connection, so it is told of life otherwise."""

    def __init__(self, frames: Frames, watch: BlockWatch, clock: Callable[[], float]) -> None:
        super().__init__()
        self._frames, self._watch, self._clock = frames, watch, clock
        self._seen_at = clock()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        rest = b"".join(self._frames.feed(bytes(data)))
        if rest:
            self._watch.feed(rest)
        elif self._clock() - self._seen_at > LIFE_S:
            rest = HEARTBEAT
        if rest:
            self._seen_at = self._clock()
            super().feed_data(rest)


class _Connection(aio_pika.Connection):
    """A connection that knows whether its publishers are blocked."""

    def __init__(self, url: URL, name: str) -> None:
        super().__init__(url, client_properties={"connection_name": name})
        self.watch = BlockWatch(name)
        self.wire = _Wire(self.watch)
        self.kwargs["transport_factory"] = self.wire


async def _connected(url: URL, name: str) -> _Connection:
    connection = _Connection(url, name)
    try:
        await connection.connect()
    except BaseException:
        await connection.close()  # else its finaliser would, at a time of its own
        raise
    return connection


def _underlay(connection: AbstractConnection) -> UnderlayConnection:
    """What tells the broker's properties, and at once that it is lost: aio-pika's own classes do not."""
    assert connection.transport is not None, "it is connected"
    return connection.transport.connection


def check_broker(properties: Arguments) -> None:
    """Raises ConfigError unless this is a RabbitMQ that can do what is asked of it."""
    product, version = str(properties.get("product")), str(properties.get("version"))
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if product != "RabbitMQ" or number < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise ConfigError(f"the broker is {product} {version}: Fluffle needs RabbitMQ {oldest} or newer")


class RabbitTransport:
    """A connection to RabbitMQ."""

    def __init__(self, connection: _Connection, user: str, name: str, settings: RabbitSettings) -> None:
        self.user = user
        self._name = name
        self._connection = connection
        self._settings = settings
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._inboxes: set[_Inbox] = set()
        self._publisher: _Publisher | None = None
        self._spare: list[_Line] = []  # of readers that are gone
        self._tags = count(1)  # of consumers
        self._opening = asyncio.Lock()
        self._underlay = _underlay(connection)
        self._underlay.closing.add_done_callback(self._on_closing)

    @property
    def blocked(self) -> str:
        return self._connection.watch.reason

    async def declare(self, *things: Declaration) -> None:
        async def declare(channel: UnderlayChannel) -> None:
            for thing in things:
                await _declare(channel, thing)

        await self._request("declare", partial(self._briefly, declare))

    async def publish(self, exchange: str, key: str, body: bytes, *, timeout_s: float = 10.0) -> None:
        where = f"exchange {exchange!r} with key {key!r}" if exchange else f"{key!r}"
        try:
            await self._publish(exchange, key, body, timeout_s)
        except TimeoutError as error:
            raise PublishFailed(refusals.not_confirmed(where, timeout_s, self.blocked)) from error
        except _NotTaken as error:
            raise Unroutable(
                f"no queue or stream takes what is published to {where}: declare and bind one first"
            ) from error
        except (AMQPError, ChannelInvalidStateError) as error:
            if why := refusals.too_large(str(error), len(body)):
                raise MessageTooLarge(f"{self._name}: cannot publish to {where}: {why}") from error
            # The channel may have been closed because of a message that was published beside this one.
            own = _tells(error, f"'{exchange or 'amq.default'}'") and (
                not _tells(error, "topic '") or _tells(error, f"'{key}'")
            )
            raise self._refusal(error, f"publish to {where}", PublishFailed if not own else None) from error

    async def consume(self, queue: str, *, prefetch: int = 0) -> Inbox:
        return await self._open(_Consumer(self, queue, prefetch))

    async def read(self, stream: str, *, offset: StreamOffset, prefetch: int = 64) -> Inbox:
        if prefetch < 1:
            raise TransportError(f"reading stream {stream!r} needs a prefetch of at least 1, not {prefetch}")
        return await self._open(_Reader(self, stream, prefetch, offset))

    async def delete(self, name: str) -> None:
        async def delete(channel: UnderlayChannel) -> None:
            await channel.queue_delete(name)

        await self._request("delete", partial(self._briefly, delete))

    async def close(self) -> None:
        self._lose("the connection was closed: connect again")
        closing = asyncio.ensure_future(self._connection.close())
        closing.add_done_callback(_read_outcome)  # it is lost for us, whatever the broker makes of it
        await asyncio.wait((closing,), timeout=CLOSE_S)
        closing.cancel()  # which aio-pika may not heed, so nobody waits for that

    async def call(self, step: Callable[[], Awaitable[Result]], timeout_s: float | None = None) -> Result:
        """What the step returns or raises, unless the connection is lost before: then ConnectionLost.

        aiormq may cancel a step, or leave it waiting for ever, when its connection is lost.
        """
        if self._lost.done():
            raise ConnectionLost(self._lost.result())
        patience_s = self._settings.patience_s if timeout_s is None else timeout_s
        task = asyncio.ensure_future(step())
        task.add_done_callback(_read_outcome)
        try:
            await asyncio.wait((task, self._lost), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled() and task.exception() is None:
                return task.result()
            if task.done() and not self._underlay.is_opened:
                self._lose("the connection was lost: connect again")
            if self._lost.done():
                raise ConnectionLost(self._lost.result())
            if task.cancelled():
                raise ChannelInvalidStateError("its channel was closed")
            if not task.done():
                why = f", for {refusals.blocked(self.blocked)}" if self.blocked else ""
                raise TimeoutError(f"no answer within {patience_s:g} s{why}")
            return task.result()
        finally:
            task.cancel()

    def write(self, line: _Line, frame: bytes) -> None:
        """Writes to a channel at once, behind all that was written before. Raises ConnectionLost."""
        if self._lost.done():
            raise ConnectionLost(self._lost.result())
        if line.closed:  # what is written to a channel that RabbitMQ closed would cost the connection
            raise ConnectionLost(f"{self._name}: its channel was closed")
        self._connection.wire.write(frame)

    def leave(self, inbox: _Inbox) -> None:
        self._inboxes.discard(inbox)

    def next_tag(self) -> str:
        """The name of a consumer on this connection."""
        return f"fluffle-{next(self._tags)}"

    async def open_channel(self) -> UnderlayChannel:
        return await self._underlay.channel(publisher_confirms=False)

    async def open_line(self) -> _Line:
        """A channel to consume on."""
        line = _Line(await self.open_channel(), self._connection.wire.frames)
        line.listen()
        return line

    async def take_spare(self) -> _Line:
        """A channel on which streams were read before, if there is one."""
        while self._spare:
            if not (line := self._spare.pop()).channel.is_closed:
                return line
        return await self.open_line()

    async def leave_spare(self, line: _Line, stream: str) -> None:
        line.readings[stream] += 1
        if line.readings[stream] < READINGS:
            self._spare.append(line)
        else:
            await line.channel.close()

    def _on_closing(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._lose(f"the connection was lost ({_text(error)}): connect again")

    def _lose(self, why: str) -> None:
        if not self._lost.done():
            self._lost.set_result(f"{self._name}: {why}")
        for inbox in tuple(self._inboxes):
            inbox.leave(why)
        if self._publisher is not None:
            self._publisher.fail(ConnectionLost(self._lost.result()))

    async def _publish(self, exchange: str, key: str, body: bytes, timeout_s: float) -> None:
        """Waits until publishers are not blocked, for what is written to a blocked connection only piles up; then
        for the confirm."""
        if self._lost.done():
            raise ConnectionLost(self._lost.result())
        clock = asyncio.get_running_loop().time
        until, publisher = clock() + timeout_s, self._publisher
        if self.blocked:
            await self.call(self._connection.watch.unblocked.wait, timeout_s)
        if publisher is None or publisher.closed:
            publisher = await self.call(self._publishing, until - clock())
        confirmed = publisher.send(Letter(exchange, key, body, publisher.next_id(), self.user))
        timer = asyncio.get_running_loop().call_at(until, _give_up, confirmed)
        try:
            await confirmed
        finally:
            timer.cancel()

    async def _publishing(self) -> _Publisher:
        async with self._opening:
            if self._publisher is None or self._publisher.closed:
                channel = await self._underlay.channel(publisher_confirms=True, on_return_raises=False)
                self._publisher = _Publisher(
                    channel, self._connection.wire, self._underlay.connection_tune.frame_max
                )
                self._publisher.listen()
            return self._publisher

    async def _open(self, inbox: _Inbox) -> Inbox:
        await self._request("read from", inbox.open)
        self._inboxes.add(inbox)
        inbox.watch()
        return inbox

    async def _briefly(self, use: Callable[[UnderlayChannel], Awaitable[None]]) -> None:
        """Uses a channel that nobody else has."""
        channel = await self.open_channel()
        try:
            await use(channel)
        finally:
            await channel.close()

    async def _request(self, deed: str, request: Callable[[], Awaitable[None]]) -> None:
        """Makes a request, again and again while a restarted broker says that it is not ready for it."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.restart_s
        while True:
            try:
                return await self.call(request)
            except ChannelNotFoundEntity as error:
                why = refusals.homeless(str(error))
                if not why:
                    raise self._refusal(error, deed) from error
                if clock() > until:
                    raise QueueLost(f"{self._name}: cannot {deed} that: {why}") from error
                await asyncio.sleep(RETRY_S)
            except REFUSED as error:
                raise self._refusal(error, deed) from error

    def _refusal(self, error: Exception, deed: str, kind: type[TransportError] | None = None) -> TransportError:
        if kind is None and isinstance(error, ChannelAccessRefused):
            return AccessRefused(
                f"user {self.user!r} may not {deed} that ({_text(error)}): extend its permissions or connect as "
                "another user"
            )
        return (kind or TransportError)(f"{self._name}: cannot {deed} that: {_text(error)}")


async def _declare(channel: UnderlayChannel, thing: Declaration) -> None:
    match thing:
        case Exchange():
            await channel.exchange_declare(thing.name, exchange_type="topic", durable=True)
        case Binding():
            await channel.queue_bind(thing.destination, thing.exchange, thing.pattern)
        case Queue() | Stream():
            await channel.queue_declare(thing.name, durable=True, arguments=arguments_of(thing))


class _NotTaken(Exception):
    """Nothing takes a message that was published."""


class _Listener:
    """One who is told what comes on a channel past aiormq, as `frames.Channel` says; but for what it expects."""

    def __init__(self, channel: UnderlayChannel, frames: Frames) -> None:
        self.channel, self.number = channel, channel.number
        self.closed = False
        self._frames = frames

    def listen(self) -> None:
        self._frames.channels[self.number] = self
        self.channel.closing.add_done_callback(self._on_closing)

    def on_message(self, message: Message) -> None:
        """A delivery to somebody who is not there any more."""

    def on_return(self, message_id: str) -> None:
        """Nothing was published here."""

    def on_confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        """Nothing was published here."""

    def on_close(self) -> None:
        self.closed = True

    def _on_closing(self, closing: asyncio.Future[Any]) -> None:
        _read_outcome(closing)
        self.closed = True
        if self._frames.channels.get(self.number) is self:
            del self._frames.channels[self.number]


class _Publisher(_Listener):
    """A channel to publish on. Every message is confirmed, in whatever order."""

    def __init__(self, channel: UnderlayChannel, wire: _Wire, frame_max: int | None) -> None:
        super().__init__(channel, wire.frames)
        self._wire, self._frame_max = wire, frame_max or 0
        self._sent = 0
        self._pending: dict[int, tuple[str, asyncio.Future[None]]] = {}  # by tag: its id, and who waits
        self._returned: set[str] = set()
        self._prefix = secrets.token_hex(8)

    def next_id(self) -> str:
        """Unlike that of any other message."""
        return f"{self._prefix}{self._sent + 1:x}"

    def send(self, letter: Letter) -> asyncio.Future[None]:
        """Writes a message in one step; the result tells once it is confirmed."""
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        confirmed.add_done_callback(_read_outcome)
        frames = publish_frames(self.number, letter, self._frame_max)
        self._wire.write(frames)
        self._sent += 1
        self._pending[self._sent] = letter.id, confirmed
        return confirmed

    def fail(self, error: Exception) -> None:
        """Whoever waits is told this."""
        self.closed, pending = True, list(self._pending.values())
        self._pending.clear()
        for _, confirmed in pending:
            if not confirmed.done():
                confirmed.set_exception(error)

    def on_return(self, message_id: str) -> None:
        self._returned.add(message_id)

    def on_confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        for one in [t for t in self._pending if t <= tag] if multiple else [tag]:
            if one in self._pending:
                self._settle(*self._pending.pop(one), taken=taken)

    def _settle(self, message_id: str, confirmed: asyncio.Future[None], *, taken: bool) -> None:
        is_returned = message_id in self._returned
        self._returned.discard(message_id)
        if confirmed.done():  # nobody waits any more
            return
        if is_returned:
            confirmed.set_exception(_NotTaken())
        elif not taken:
            confirmed.set_exception(PublishFailed("the broker did not take it: it has no room, or is in trouble"))
        else:
            confirmed.set_result(None)

    def _on_closing(self, closing: asyncio.Future[Any]) -> None:
        super()._on_closing(closing)
        error = None if closing.cancelled() else closing.exception()
        self.fail(error if isinstance(error, Exception) else ChannelInvalidStateError("its channel was closed"))


class _Line(_Listener):
    """A channel to consume on. One that streams are read on is left by one reader to the next."""

    def __init__(self, channel: UnderlayChannel, frames: Frames) -> None:
        super().__init__(channel, frames)
        self.inboxes: dict[str, _Inbox] = {}  # by consumer
        self.readings: Counter[str] = Counter()  # of each stream

    def on_message(self, message: Message) -> None:
        if inbox := self.inboxes.get(message.consumer):
            inbox.arrived(message)


class _Inbox(WaitingInbox):
    """A consumer with a channel of its own."""

    def __init__(self, transport: RabbitTransport, name: str, prefetch: int) -> None:
        super().__init__()
        self._transport = transport
        self._name = name
        self._prefetch = prefetch
        self._fresh: deque[Message] = deque()
        self._arguments: Arguments = {}
        self._line: _Line
        self._closing: asyncio.Future[Any]
        self._tag = transport.next_tag()

    async def open(self) -> None:
        self._line = await self._take_line()
        channel, self._line.inboxes[self._tag] = self._line.channel, self
        try:
            if self._prefetch:
                await channel.basic_qos(prefetch_count=self._prefetch)
            channel.on_consumer_cancel_callbacks.add(self._on_cancel)
            await channel.basic_consume(self._name, _ignore, arguments=self._arguments, consumer_tag=self._tag)
        except BaseException:
            await channel.close()
            raise

    def watch(self) -> None:
        """From now on a channel that closes ends this inbox."""
        self._closing = self._line.channel.closing
        self._closing.add_done_callback(self._on_closing)

    def arrived(self, message: Message) -> None:
        self._fresh.append(message)
        self.wake()

    async def close(self) -> None:
        await super().close()
        with suppress(TransportError, *REFUSED):
            await self._transport.call(self._leave_line)
        self._line.inboxes.pop(self._tag, None)

    async def _take_line(self) -> _Line:
        return await self._transport.open_line()

    async def _leave_line(self) -> None:
        await self._line.channel.close()

    @property
    def _origin(self) -> str:
        return repr(self._name)

    def _on_cancel(self, frame: spec.Basic.Cancel) -> None:
        if frame.consumer_tag == self._tag:
            self.leave("it was deleted, or its node is gone: declare it again")

    def _on_closing(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self.leave(refusals.channel_closed(_text(error)))

    def _depart(self) -> None:
        self._transport.leave(self)


class _Consumer(_Inbox):
    """An inbox on a queue."""

    def __init__(self, transport: RabbitTransport, name: str, prefetch: int) -> None:
        super().__init__(transport, name, prefetch)
        self._unsettled: set[int] = set()

    def _take(self) -> Delivery | None:
        if not self._fresh:
            return None
        message = self._fresh.popleft()
        if OFFSET in message.numbers:
            self.leave("it is a stream and cannot be consumed: read it")
            self._check()
        self._unsettled.add(message.tag)
        before = max(message.numbers.get("x-delivery-count", 0), int(message.redelivered))
        return _delivery(message, partial(self._settle, message.tag), delivery_count=before)

    async def _settle(self, tag: int, *, accept: bool, requeue: bool) -> None:
        self._check()
        if tag not in self._unsettled:
            raise TransportError(f"a delivery from {self._origin} was settled twice: ack or reject it once")
        self._unsettled.discard(tag)
        number = self._line.number
        frame = ack_frame(number, tag) if accept else reject_frame(number, tag, requeue=requeue)
        self._transport.write(self._line, frame)


class _Reader(_Inbox):
    """An inbox on a stream. What was taken is acked in batches: that only asks RabbitMQ for more."""

    def __init__(self, transport: RabbitTransport, name: str, prefetch: int, offset: StreamOffset) -> None:
        super().__init__(transport, name, prefetch)
        self._arguments = {"x-stream-offset": offset}
        self._first = offset if isinstance(offset, int) else 0
        self._is_stream = False  # as far as we know
        self._owed = 0

    def _take(self) -> Delivery | None:
        while self._fresh:
            message = self._fresh.popleft()
            if OFFSET not in message.numbers:
                self.leave("it is a queue and cannot be read: consume it")
                self._check()
            self._is_stream = True
            self._acknowledge(message.tag)
            offset = message.numbers[OFFSET]
            if offset >= self._first:  # RabbitMQ begins with a whole chunk
                return _delivery(message, _settled, offset=offset)
        return None

    def _acknowledge(self, tag: int) -> None:
        self._owed += 1
        if 2 * self._owed >= self._prefetch:
            self._owed = 0
            self._transport.write(self._line, ack_frame(self._line.number, tag, multiple=True))

    async def _take_line(self) -> _Line:
        return await self._transport.take_spare()

    async def _leave_line(self) -> None:
        """Once RabbitMQ knows that this reader is gone, and no delivery is open, the next one may have it."""
        if not self._is_stream:  # what a queue delivered must go back, and so it does
            return await super()._leave_line()
        channel = self._line.channel
        await channel.basic_cancel(self._tag)
        await channel.basic_ack(0, multiple=True)
        channel.on_consumer_cancel_callbacks.discard(self._on_cancel)
        self._closing.cancel()  # which only ends this watching
        return await self._transport.leave_spare(self._line, self._name)


def _delivery(message: Message, settle: Any, *, offset: int = -1, delivery_count: int = 0) -> Delivery:
    return Delivery(message.body, message.key, message.sender, settle, offset, delivery_count, message.id)


def _give_up(confirmed: asyncio.Future[None]) -> None:
    if not confirmed.done():
        confirmed.set_exception(TimeoutError())


async def _ignore(message: DeliveredMessage) -> None:
    """Deliveries go past aiormq."""


async def _settled(*, accept: bool, requeue: bool) -> None:
    """Streams keep their messages whatever is done with a delivery."""
    del accept, requeue


def _text(error: BaseException | None) -> str:
    return (str(error) or repr(error)) if error else "closed"


def _tells(error: Exception, part: str) -> bool:
    return part in str(error)


def _read_outcome(task: asyncio.Future[Any]) -> None:
    """Lest asyncio complain that nobody did."""
    if not task.cancelled():
        task.exception()


class RabbitProbe:
    """What `fluffle broker check` asks beyond the seam. Every question has a channel of its own."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection, settings: RabbitSettings) -> None:
        self._connection = connection
        self._settings = settings

    @property
    def facts(self) -> Facts:
        """What the broker said when the connection was made."""
        assert self._connection.transport is not None, "it is connected"
        amqp = self._connection.transport.connection
        told, tune = amqp.server_properties, amqp.connection_tune
        return Facts(
            str(told.get("product")), str(told.get("version")), self._settings.heartbeat_s,
            tune.frame_max or 0, tune.channel_max or 0,
        )  # fmt: skip

    async def find_queue(self, name: str) -> None:
        """Raises TransportError unless there is such a queue or stream, and it can be reached."""
        await self._ask(lambda channel: channel.declare_queue(name, passive=True))

    async def find_exchange(self, name: str) -> None:
        """Raises TransportError unless there is such an exchange."""
        await self._ask(lambda channel: channel.declare_exchange(name, passive=True))

    async def publish_as(self, user: str, exchange: str, key: str) -> None:
        """Publishes a message in the name of that user."""

        async def publish(channel: aio_pika.abc.AbstractChannel) -> None:
            target = await channel.get_exchange(exchange, ensure=False)
            await target.publish(aio_pika.Message(b"", user_id=user), key)

        await self._ask(publish)

    async def delete_exchange(self, name: str) -> None:
        """Deletes an exchange; it need not exist."""
        await self._ask(lambda channel: channel.exchange_delete(name))

    async def close(self) -> None:
        with suppress(Exception):  # it is lost for us, whatever the broker makes of it
            async with asyncio.timeout(CLOSE_S):
                await self._connection.close()

    async def _ask(self, question: Callable[[aio_pika.abc.AbstractChannel], Awaitable[object]]) -> None:
        try:
            async with asyncio.timeout(self._settings.patience_s):
                channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
                try:
                    await question(channel)
                finally:
                    await channel.close()
        except PublishError as error:
            raise Unroutable(f"nothing takes it: {_text(error)}") from error
        except REFUSED as error:
            kind = AccessRefused if _tells(error, "ACCESS_REFUSED") else TransportError
            raise kind(_text(error)) from error
