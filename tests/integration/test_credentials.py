"""A participant's stolen password, tried against everything that it must not do. RabbitMQ refuses; nothing arrives.

The user and its rights are those of the definitions document. Attempts are made in raw AMQP: the seam of
`broker/transport.py` could not even express most of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

import aiormq
import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.exceptions import (
    AMQPError,
    ChannelAccessRefused,
    ChannelPreconditionFailed,
    ConnectionNotImplemented,
    PublishError,
)

from aggregator.intake import check_sender
from broker.definitions import INBOX_BYTES, MOST_CONNECTIONS
from broker.errors import BadMessage
from broker.messages import Join
from broker.topology import AGGREGATOR, UP_KINDS, Topology
from broker.transport import Delivery, Queue, Transport
from broker.wire import encode
from tests.rabbit_node import FOREIGN, SET_UP, Rabbit, password

pytestmark = pytest.mark.xdist_group("rabbitmq")

ME, OTHER = "p-1", "p-2"
MIB = 1 << 20
DIRECT, FOREIGN_F, SET_UP_F = "", Topology(FOREIGN), Topology(SET_UP)
Channel = AbstractChannel


@dataclass(frozen=True)
class Thief:
    """Who has p-1's password, and the federation it attacks."""

    rabbit: Rabbit
    names: Topology

    async def channel(self, user: str = ME) -> Channel:
        url = self.rabbit.url.with_user(user).with_password(password(user))
        connection = await aiormq.connect(url)
        return await connection.channel(publisher_confirms=True, on_return_raises=True)


Attempt = Callable[[Channel, Topology], Awaitable[object]]


# -- attempts ----------------------------------------------------------------------------------------------------


def consume(name: Callable[[Topology], str], **arguments: object) -> Attempt:
    async def attempt(channel: Channel, f: Topology) -> None:
        async def ignore(message: DeliveredMessage) -> None: ...

        await channel.basic_qos(prefetch_count=1)
        await channel.basic_consume(name(f), ignore, arguments=dict(arguments))

    return attempt


def get(name: Callable[[Topology], str]) -> Attempt:
    return lambda channel, f: channel.basic_get(name(f))


def publish(
    exchange: Callable[[Topology], str], key: Callable[[Topology], str] | str, user_id: str = ""
) -> Attempt:
    async def attempt(channel: Channel, f: Topology) -> None:
        routing_key = key if isinstance(key, str) else key(f)
        await send(channel, exchange(f), routing_key, user_id=user_id or ME)

    return attempt


async def send(channel: Channel, exchange: str, key: str, body: bytes = b"evil", **properties: object) -> None:
    await channel.basic_publish(
        body, exchange=exchange, routing_key=key, mandatory=True,
        properties=aiormq.spec.Basic.Properties(**properties),
    )  # fmt: skip


def bind(queue: Callable[[Topology], str], exchange: Callable[[Topology], str], key: str) -> Attempt:
    return lambda channel, f: channel.queue_bind(queue(f), exchange(f), key)


def link(destination: Callable[[Topology], str], source: Callable[[Topology], str], key: str) -> Attempt:
    return lambda channel, f: channel.exchange_bind(destination(f), source(f), key)


def queue(name: Callable[[Topology], str], **arguments: object) -> Attempt:
    return lambda channel, f: channel.queue_declare(name(f), durable=True, arguments=dict(arguments))


def exchange(name: Callable[[Topology], str]) -> Attempt:
    return lambda channel, f: channel.exchange_declare(name(f), exchange_type="topic", durable=True)


def dead_letters_to(target: Callable[[Topology], str]) -> Attempt:
    async def attempt(channel: Channel, f: Topology) -> None:
        await channel.queue_delete(f.inbox(ME))
        await channel.queue_declare(
            f.inbox(ME), durable=True, arguments={"x-dead-letter-exchange": target(f), "x-message-ttl": 0}
        )

    return attempt


def unroutable_to(target: Callable[[Topology], str]) -> Attempt:
    return lambda channel, f: channel.exchange_declare(
        f.inbox(ME), exchange_type="fanout", durable=True, arguments={"alternate-exchange": target(f)}
    )


def mine(f: Topology) -> str:
    return f.inbox(ME)


def others(f: Topology) -> str:
    return f.inbox(OTHER)


def up(f: Topology) -> str:
    return f.up


def down(f: Topology) -> str:
    return f.down


def updates(f: Topology) -> str:
    return f.updates


def head(f: Topology) -> str:
    return f.head


def rejected(f: Topology) -> str:
    return f.rejected


def my_outbox(f: Topology) -> str:
    return f.outbox(ME)


def others_outbox(f: Topology) -> str:
    return f.outbox(OTHER)


def my_chunks(f: Topology) -> str:
    return f.chunks(ME)


def others_chunks(f: Topology) -> str:
    return f.chunks(OTHER)


def model(f: Topology) -> str:
    return f.model("run")


def default(_: Topology) -> str:
    return DIRECT


def named(name: str) -> Callable[[Topology], str]:
    return lambda _: name


FIRST = {"x-stream-offset": "first"}
REFUSED: dict[str, Attempt] = {
    "read the updates stream": consume(updates, **FIRST),
    "read another's outbox": consume(others_outbox, **FIRST),
    "read the own outbox": consume(my_outbox, **FIRST),
    "consume another's inbox": consume(others),
    "consume the head queue": consume(head),
    "consume the rejected queue": consume(rejected),
    "get from another's inbox": get(others),
    "get from the rejected queue": get(rejected),
    "publish with another's key": publish(up, f"{OTHER}.update"),
    "publish with the aggregator's key": publish(up, f"{AGGREGATOR}.update"),
    "publish with no kind": publish(up, ME),
    "publish with an empty kind": publish(up, f"{ME}."),
    "publish with two kinds": publish(up, f"{ME}.update.update"),
    "publish with an empty key": publish(up, ""),
    "publish with the own key after another's": publish(up, f"{OTHER}.{ME}.update"),
    "publish with a name that begins like the own": publish(up, f"{ME}1.update"),
    "publish with wildcards": publish(up, "*.update"),
    "publish to another's outbox": publish(others_chunks, f"{OTHER}.chunk"),
    "publish to all": publish(down, "all"),
    "publish to another's inbox": publish(down, OTHER),
    "publish to oneself": publish(down, ME),
    "publish straight to the updates stream": publish(default, updates),
    "publish straight to the head queue": publish(default, head),
    "publish straight to the rejected queue": publish(default, rejected),
    "publish straight to another's inbox": publish(default, others),
    "publish straight to the own inbox": publish(default, mine),
    "publish straight to another's outbox": publish(default, others_outbox),
    "publish straight to the own outbox": publish(default, my_outbox),
    "publish straight to a model stream": publish(default, model),
    "publish to another federation": publish(named(FOREIGN_F.up), f"{ME}.update"),
    "tell another federation": publish(named(FOREIGN_F.down), "all"),
    "publish to amq.topic": publish(named("amq.topic"), f"{ME}.update"),
    "publish to amq.fanout": publish(named("amq.fanout"), ""),
    "bind the own inbox to what all send": bind(mine, up, "#"),
    "bind the own inbox to what it sends itself": bind(mine, up, f"{ME}.update"),
    "bind the own inbox to what another is told": bind(mine, down, OTHER),
    "bind the own inbox to everything with #": bind(mine, down, "#"),
    "bind the own inbox to everything with *": bind(mine, down, "*"),
    "bind the own inbox to all and more": bind(mine, down, "all.#"),
    "bind the own inbox to the own chunks": bind(mine, my_chunks, "#"),
    "bind the own inbox to another's chunks": bind(mine, others_chunks, "#"),
    "bind the own inbox to another federation": bind(mine, named(FOREIGN_F.down), "all"),
    "bind another's inbox": bind(others, down, "all"),
    "bind the updates stream": bind(updates, down, "all"),
    "bind the head queue": bind(head, down, "all"),
    "bind the own outbox": bind(my_outbox, down, "all"),
    "link everything told to what is sent": link(up, down, "#"),
    "link what is sent to what is told": link(down, up, "#"),
    "link what is told to all to itself": link(down, down, "all"),
    "link what it is told to another's outbox": link(others_chunks, down, ME),
    "unbind another's inbox": lambda channel, f: channel.queue_unbind(others(f), f.down, "all"),
    "unbind the updates stream": lambda channel, f: channel.queue_unbind(f.updates, f.up, "*.update"),
    "declare the exchange up": exchange(up),
    "declare the exchange down": exchange(down),
    "declare the exchange of its chunks": exchange(my_chunks),
    "declare another exchange": exchange(named("mine")),
    "declare an exchange in the federation": exchange(lambda f: f"fl.{f.federation}.mine"),
    "delete the exchange up": lambda channel, f: channel.exchange_delete(f.up),
    "delete the exchange of its chunks": lambda channel, f: channel.exchange_delete(f.chunks(ME)),
    "declare the head queue": queue(head),
    "declare another's inbox": queue(others),
    "declare the own outbox": queue(my_outbox, **{"x-queue-type": "stream"}),
    "declare a model stream": queue(lambda f: f.model("mine"), **{"x-queue-type": "stream"}),
    "declare a queue outside its name": queue(named("mine")),
    "declare a queue below its name": queue(lambda f: f"{f.inbox(ME)}.more"),
    "declare a queue in another federation": queue(named(FOREIGN_F.inbox(ME))),
    "declare a queue that the broker names": queue(named("")),
    "delete the head queue": lambda channel, f: channel.queue_delete(f.head),
    "delete the updates stream": lambda channel, f: channel.queue_delete(f.updates),
    "delete another's inbox": lambda channel, f: channel.queue_delete(f.inbox(OTHER)),
    "delete the own outbox": lambda channel, f: channel.queue_delete(f.outbox(ME)),
    "delete a model stream": lambda channel, f: channel.queue_delete(f.model("run")),
    "purge the updates stream": lambda channel, f: channel.queue_purge(f.updates),
    "purge the head queue": lambda channel, f: channel.queue_purge(f.head),
    "purge another's inbox": lambda channel, f: channel.queue_purge(f.inbox(OTHER)),
    "purge the rejected queue": lambda channel, f: channel.queue_purge(f.rejected),
    "dead-letter to all": dead_letters_to(down),
    "dead-letter straight to queues": dead_letters_to(default),
    "dead-letter to another's outbox": dead_letters_to(others_chunks),
    "dead-letter to another federation": dead_letters_to(named(FOREIGN_F.up)),
    "pass on what is unroutable to all": unroutable_to(down),
    "pass on what is unroutable straight to queues": unroutable_to(default),
    "pass on what is unroutable to another's outbox": unroutable_to(others_chunks),
}
IN_ANOTHERS_NAME = {
    "speak as another, with the own key": publish(up, f"{ME}.update", OTHER),
    "speak as the aggregator, with the own key": publish(up, f"{ME}.update", AGGREGATOR),
    "send chunks as another": publish(my_chunks, f"{ME}.chunk", OTHER),
}


# -- the federation that is attacked -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thief(rabbit: Rabbit) -> Thief:
    """In a federation that is set up, with large updates, and a model."""
    names = rabbit.topology()

    async def set_up() -> None:
        aggregator = await rabbit.broker().connect(AGGREGATOR, purpose="credentials")
        for f in (names, FOREIGN_F):
            await aggregator.declare(*f.aggregator_declarations())
        await aggregator.declare(*names.model_declarations("run", 1))
        for participant in (ME, OTHER):
            await aggregator.declare(*names.outbox_declarations(participant, 1))
            await aggregator.declare(*names.inbox_declarations(participant))
        await aggregator.close()

    asyncio.run(set_up())
    return Thief(rabbit, names)


@pytest.fixture
async def aggregator(thief: Thief) -> AsyncIterator[Transport]:
    transport = await thief.rabbit.broker().connect(AGGREGATOR, purpose="credentials")
    await transport.delete(thief.names.inbox(ME))
    await transport.declare(*thief.names.inbox_declarations(ME))
    yield transport
    await transport.close()


@pytest.fixture
async def channel(thief: Thief, aggregator: Transport) -> AsyncIterator[Channel]:
    opened = await thief.channel()
    yield opened
    await opened.connection.close()
    cleaning = await thief.channel()
    await cleaning.exchange_delete(thief.names.inbox(ME))
    await cleaning.connection.close()


async def arrived(aggregator: Transport, thief: Thief) -> dict[str, list[Delivery]]:
    """What lies in everything that the thief may not write to; what is in queues is taken out."""
    f = thief.names
    found = {name: await in_stream(aggregator, name) for name in (f.updates, f.outbox(ME), f.outbox(OTHER))}
    found[f.model("run")] = await in_stream(aggregator, f.model("run"))
    for name in (f.head, f.rejected, f.inbox(OTHER)):
        found[name] = await in_queue(aggregator, name)
    return {name: deliveries for name, deliveries in found.items() if deliveries}


async def in_stream(aggregator: Transport, name: str) -> list[Delivery]:
    """All but our own barriers."""
    barrier = uuid4().bytes
    inbox = await aggregator.read(name, offset="first")
    await aggregator.publish("", name, barrier)
    found: list[Delivery] = []
    while (delivery := await inbox.get(10)) and delivery.body != barrier:
        found.append(delivery)
    await inbox.close()
    assert delivery, "the barrier did not come"
    return [one for one in found if one.sender != AGGREGATOR]


async def in_queue(aggregator: Transport, name: str) -> list[Delivery]:
    inbox = await aggregator.consume(name)
    barrier = uuid4().bytes
    await aggregator.publish("", name, barrier)
    found: list[Delivery] = []
    while (delivery := await inbox.get(10)) and delivery.body != barrier:
        await delivery.ack()
        found.append(delivery)
    assert delivery, "the barrier did not come"
    await delivery.ack()
    await inbox.close()
    return found


# -- tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", REFUSED)
async def test_a_participant_cannot(channel: Channel, aggregator: Transport, thief: Thief, deed: str) -> None:
    with pytest.raises(ChannelAccessRefused, match="ACCESS_REFUSED"):
        await REFUSED[deed](channel, thief.names)
    assert await arrived(aggregator, thief) == {}


@pytest.mark.parametrize("deed", IN_ANOTHERS_NAME)
async def test_a_participant_has_no_other_name(
    channel: Channel, aggregator: Transport, thief: Thief, deed: str
) -> None:
    with pytest.raises(ChannelPreconditionFailed, match="user_id"):
        await IN_ANOTHERS_NAME[deed](channel, thief.names)
    assert await arrived(aggregator, thief) == {}


async def test_a_model_is_read_and_cannot_be_emptied(channel: Channel, thief: Thief) -> None:
    """Purging asks for the right to read only; but streams have no purge."""
    with pytest.raises(ConnectionNotImplemented):
        await channel.queue_purge(thief.names.model("run"))


async def test_an_exclusive_reader_of_a_model_excludes_nobody(channel: Channel, thief: Thief) -> None:
    async def ignore(message: DeliveredMessage) -> None: ...

    await channel.basic_qos(prefetch_count=1)
    await channel.basic_consume(thief.names.model("run"), ignore, exclusive=True, arguments=dict(FIRST))
    other = await thief.channel(OTHER)
    await consume(model, **FIRST)(other, thief.names)
    await other.connection.close()


# RabbitMQ checks routing keys on the straight way only. What follows is allowed, and must come to nothing.

DETOURS = ("its own exchange", "its own alternate exchange", "a dead letter", "a CC header")


async def by_detour(channel: Channel, f: Topology, detour: str, key: str, **properties: object) -> None:
    """Tries to bring a message into `up` with that key."""
    own = f.inbox(ME)
    if detour == "a CC header":
        await send(channel, f.up, f"{ME}.nothing", headers={"CC": [key]}, **properties)
        return
    alternate = {"alternate-exchange": f.up} if detour == "its own alternate exchange" else {}
    await channel.exchange_declare(own, exchange_type="fanout", durable=True, arguments=alternate)
    if detour == "its own exchange":
        await channel.exchange_bind(f.up, own, "")
    elif detour == "a dead letter":
        await channel.queue_delete(own)
        to_up = {"x-dead-letter-exchange": f.up, "x-dead-letter-routing-key": key, "x-message-ttl": 0}
        await channel.queue_declare(own, durable=True, arguments=to_up)
        await channel.queue_bind(own, own, "")
    await send(channel, own, key, **properties)


@pytest.mark.parametrize("detour", DETOURS)
async def test_no_detour_leads_into_anothers_outbox(
    channel: Channel, aggregator: Transport, thief: Thief, detour: str
) -> None:
    with suppress(PublishError):  # it comes back: nobody takes it
        await by_detour(channel, thief.names, detour, f"{OTHER}.chunk", user_id=ME)
    await asyncio.sleep(0.2)  # dead letters take their time
    assert await arrived(aggregator, thief) == {}


@pytest.mark.parametrize("user_id", [ME, None])
@pytest.mark.parametrize("detour", DETOURS)
async def test_what_took_a_detour_is_in_nobody_elses_name(
    rabbit: Rabbit, aggregator: Transport, detour: str, user_id: str | None
) -> None:
    """It reaches the updates stream, as what the thief sends in its own name does. The aggregator refuses it."""
    f = rabbit.topology()
    await aggregator.declare(*f.aggregator_declarations(), *f.inbox_declarations(ME))
    channel = await Thief(rabbit, f).channel()
    await by_detour(channel, f, detour, f"{OTHER}.join", **({"user_id": user_id} if user_id else {}))
    inbox = await aggregator.read(f.updates, offset="first")
    delivery = await inbox.get(1 if detour == "a dead letter" else 10)
    await channel.connection.close()
    if delivery is None and detour == "a dead letter":
        return  # RabbitMQ 3.10 takes no dead letters into streams
    assert delivery
    assert delivery.sender == (user_id or "")
    with pytest.raises(BadMessage, match="in the name of"):
        check_sender(Join(participant=OTHER), delivery)


async def test_what_is_told_to_all_cannot_be_turned_into_updates(
    channel: Channel, aggregator: Transport, thief: Thief
) -> None:
    """Linking `up` to what it may hear is allowed; nothing is bound there for such keys."""
    f = thief.names
    for key in ("all", ME):
        await channel.exchange_bind(f.up, f.down, key)
        await aggregator.publish(f.down, key, b"a TrainRound")
    inbox = await aggregator.read(f.updates, offset="first")
    await aggregator.publish("", f.updates, b"the end")
    while (delivery := await inbox.get(10)) and delivery.body != b"the end":
        assert delivery.body != b"a TrainRound"
    for key in ("all", ME):
        await channel.exchange_unbind(f.up, f.down, key)


async def test_an_inbox_without_limits_hoards_no_more_than_the_policy_says(channel: Channel) -> None:
    own = SET_UP_F.inbox(ME)
    await channel.queue_delete(own)
    await channel.queue_declare(own, durable=True)
    await channel.exchange_declare(own, exchange_type="fanout", durable=True)
    await channel.queue_bind(own, own, "")
    for _ in range(INBOX_BYTES // MIB + 8):
        await send(channel, own, "", bytes(MIB))
    found = await channel.queue_declare(own, passive=True)
    await channel.queue_delete(own)
    await channel.exchange_delete(own)
    assert found.message_count == INBOX_BYTES // MIB


async def test_a_participant_has_so_many_connections(thief: Thief) -> None:
    channels = [await thief.channel("p03") for _ in range(MOST_CONNECTIONS)]
    with pytest.raises(AMQPError):
        await thief.channel("p03")
    for channel in channels:
        await channel.connection.close()


async def test_what_a_participant_needs_is_allowed(rabbit: Rabbit, aggregator: Transport) -> None:
    f = rabbit.topology()
    await aggregator.declare(*f.aggregator_declarations(), *f.outbox_declarations(ME, 1))
    await aggregator.declare(*f.model_declarations("run", 1))
    me = await rabbit.broker().connect(ME, purpose="needs")
    for _ in range(2):  # as after a reconnect
        await me.declare(*f.inbox_declarations(ME))
    inbox = await me.consume(f.inbox(ME), prefetch=1)
    models = await me.read(f.model("run"), offset="first")
    for kind in UP_KINDS:
        await me.publish(f.up, f"{ME}.{kind}", encode(Join(participant=ME)))
    await me.publish(f.chunks(ME), f"{ME}.chunk", b"piece")
    await aggregator.publish(f.down, "all", b"to all")
    await aggregator.publish("", f.model("run"), b"weights")
    for source, body in ((inbox, b"to all"), (models, b"weights")):
        delivery = await source.get(10)
        assert delivery
        assert delivery.body == body
        await delivery.ack()
    chunks = await aggregator.read(f.outbox(ME), offset="first")
    piece = await chunks.get(10)
    assert piece
    assert (piece.body, piece.sender) == (b"piece", ME)
    await me.delete(f.inbox(ME))
    await me.close()


async def test_a_kind_that_nobody_knows_reaches_nobody(channel: Channel, thief: Thief) -> None:
    """New kinds of messages need no new rights: they need a binding."""
    with pytest.raises(PublishError):
        await send(channel, thief.names.up, f"{ME}.nonsense")


async def test_definitions_and_the_adapter_declare_the_same(aggregator: Transport) -> None:
    """Other arguments would be refused. This federation was there when the broker had booted."""
    f = SET_UP_F
    with pytest.raises(Exception, match="x-max-length"):
        await aggregator.declare(Queue(f.rejected, max_length=5))
    await aggregator.declare(*f.aggregator_declarations(), *f.inbox_declarations(OTHER))
