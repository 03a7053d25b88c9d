"""Whether a RabbitMQ is fit for a federation, as one user sees it: tried out, not read from its settings.

AMQP does not tell a broker's limits, plugins or permissions. So each check does what Fluffle will do, with
things under `fl.<f>.check.<token>` that are deleted again, and tells a finding and a remedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal, Protocol

from broker.errors import AccessRefused, ConnectionLost, FluffleError, TransportError, Unroutable
from broker.topology import AGGREGATOR, Topology
from broker.transport import Binding, Declaration, Delivery, Exchange, Inbox, Queue, Stream, Transport
from broker.wire import MAX_FRAME_BYTES

Level = Literal["ok", "warning", "failed"]

MEBI = 1 << 20
SOON_S = 10.0  # what was confirmed is delivered within this
LARGE_S = 60.0  # for the largest message, over a slow line
SLOW_S = 1.0  # a confirm that takes longer makes every commit slow
ENOUGH_CHANNELS = 32
UNUSED_S = 600.0  # a queue that could not be deleted goes by itself
SOMEBODY_ELSE = "fluffle-check-somebody-else"
LIMITS_OF_4 = "messages up to 16 MiB"
LIMITS_OF_3 = "messages up to 128 MiB"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a broker says when a connection is made."""

    product: str
    version: str
    heartbeat_s: int
    frame_max: int
    channel_max: int


class Probe(Protocol):
    """What checks ask beyond the seam of `broker/transport.py`. Raises TransportError, AccessRefused."""

    @property
    def facts(self) -> Facts: ...

    async def find_queue(self, name: str) -> None: ...

    async def find_exchange(self, name: str) -> None: ...

    async def publish_as(self, user: str, exchange: str, key: str) -> None: ...

    async def delete_exchange(self, name: str) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    finding: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Bench:
    """What checks work with."""

    transport: Transport
    probe: Probe
    topology: Topology
    token: str

    def name(self, what: str) -> str:
        return self.topology.check(f"{self.token}.{what}")


@dataclass(frozen=True, slots=True)
class Check:
    """`run` returns a finding that is fine, and raises one that is not: _Doubt, or an error.

    It is not tried unless the check that it `needs` was fine.
    """

    name: str
    remedy: str
    run: Callable[[Bench], Awaitable[str]]
    needs: str = ""


class _Doubt(Exception):
    """It works, but somebody should know this."""

    def __init__(self, finding: str, remedy: str = "") -> None:
        super().__init__(finding)
        self.remedy = remedy


async def examine(bench: Bench) -> list[Finding]:
    """All checks for this user, one after the other."""
    checks = AGGREGATOR_CHECKS if bench.transport.user == AGGREGATOR else PARTICIPANT_CHECKS
    findings: dict[str, Finding] = {}
    for check in checks:
        if check.needs and findings[check.needs].level != "ok":
            findings[check.name] = Finding(check.name, "warning", f"not tried: needs {check.needs!r} to be ok")
        else:
            findings[check.name] = await _tried(check, bench)
    return list(findings.values())


async def _tried(check: Check, bench: Bench) -> Finding:
    try:
        return Finding(check.name, "ok", await check.run(bench))
    except _Doubt as doubt:
        return Finding(check.name, "warning", str(doubt), doubt.remedy or check.remedy)
    except AccessRefused as error:
        return Finding(check.name, "failed", str(error), RIGHTS)
    except FluffleError as error:
        return Finding(check.name, "failed", str(error), check.remedy)


# -- the broker and the connection -------------------------------------------------------------------------------


async def _version(bench: Bench) -> str:
    facts = bench.probe.facts
    limits = LIMITS_OF_4 if int(facts.version.partition(".")[0]) >= 4 else LIMITS_OF_3
    return (
        f"{facts.product} {facts.version}; its defaults, which its settings may change: {limits}, "
        "deliveries held for up to 30 minutes"
    )


async def _tuning(bench: Bench) -> str:
    facts = bench.probe.facts
    channels = f"{facts.channel_max} channels" if facts.channel_max else "any number of channels"
    found = f"heartbeat every {facts.heartbeat_s} s, frames up to {facts.frame_max} bytes, {channels}"
    if 0 < facts.channel_max < ENOUGH_CHANNELS:
        raise _Doubt(f"{found}: few channels")
    return found


# -- what is declared, published and read ------------------------------------------------------------------------


async def _quorum_queue(bench: Bench) -> str:
    """A baton: held by one, and handed to the next when that one goes."""
    name = bench.name("quorum")
    queue = Queue(name, replicated=True, single_active_consumer=True, delivery_limit=1000, expires_s=UNUSED_S)
    async with _temporary(bench, queue):
        began = asyncio.get_running_loop().time()
        await bench.transport.publish("", name, b"baton", timeout_s=SOON_S)
        confirmed_s = asyncio.get_running_loop().time() - began
        first = await bench.transport.consume(name)
        second = await bench.transport.consume(name)
        await _next(first)
        await first.close()
        await (await _next(second)).ack()
        await second.close()
    found = f"confirmed in {confirmed_s * 1000:.0f} ms, and handed on to the second consumer"
    if confirmed_s > SLOW_S:
        raise _Doubt(f"{found}: a slow confirm")
    return found


async def _stream(bench: Bench) -> str:
    name = bench.name("stream")
    async with _temporary(bench, Stream(name, max_bytes=8 * MEBI, segment_bytes=MEBI)):
        for body in (b"0", b"1", b"2"):
            await bench.transport.publish("", name, body, timeout_s=SOON_S)
        inbox = await bench.transport.read(name, offset=1)
        delivery = await _next(inbox)
        await inbox.close()
        if (delivery.offset, delivery.body) != (1, b"1"):
            raise TransportError(f"read at offset 1, and got {delivery.body!r} of offset {delivery.offset}")
    return "written, and read again from the second message on"


async def _routing(bench: Bench) -> str:
    exchange, queue = bench.name("exchange"), bench.name("routed")
    declared = (Exchange(exchange), Queue(queue, expires_s=UNUSED_S), Binding(exchange, "*.yes", queue))
    async with _temporary(bench, *declared):
        await bench.transport.publish(exchange, "a.yes", b"")
        inbox = await bench.transport.consume(queue)
        await (await _next(inbox)).ack()
        await inbox.close()
        with suppress(Unroutable):
            await bench.transport.publish(exchange, "a.no", b"")
            raise TransportError("a message that nothing was bound for was not returned")
    return "by topic; what nobody takes comes back"


async def _largest_message(bench: Bench) -> str:
    name = bench.name("large")
    async with _temporary(bench, Queue(name, max_length=1, expires_s=UNUSED_S)):
        await bench.transport.publish("", name, bytes(MAX_FRAME_BYTES), timeout_s=LARGE_S)
    return f"{MAX_FRAME_BYTES // MEBI} MiB pass: Fluffle sends no larger ones"


async def _verified_names(bench: Bench) -> str:
    name = bench.name("names")
    async with _temporary(bench, Queue(name, expires_s=UNUSED_S)):
        await _refused_as_another(bench, "", name)
    return "publishing in another user's name is refused"


async def _refused_as_another(bench: Bench, exchange: str, key: str) -> None:
    """Raises TransportError if a name that is not the user's own passes."""
    try:
        with suppress(Unroutable):
            await bench.probe.publish_as(SOMEBODY_ELSE, exchange, key)
    except TransportError as error:
        if "user_id" not in str(error):
            raise
        return
    raise TransportError("a message in another user's name was taken")


# -- the federation ----------------------------------------------------------------------------------------------


async def _federation(bench: Bench) -> str:
    """Whether all of it is there, can be reached, and is what this version would declare."""
    things = bench.topology.aggregator_declarations()
    await _find(bench, things)
    await bench.transport.declare(*things)
    try:  # of a quorum queue that lost its home only this tells; whoever leads is not disturbed
        await _open_and_close(bench.transport.consume(bench.topology.head, prefetch=1))
    except TransportError as error:
        raise TransportError(f"{bench.topology.head}: {error}") from error
    return f"{bench.topology.federation!r} is set up"


async def _federation_for_participant(bench: Bench) -> str:
    await _find(bench, [Exchange(bench.topology.up), Exchange(bench.topology.down)])
    return f"{bench.topology.federation!r} is set up"


async def _find(bench: Bench, things: Sequence[Declaration]) -> None:
    """Raises _Doubt for what is missing, TransportError for what cannot be reached."""
    missing = []
    for thing in things:
        if isinstance(thing, Binding):
            continue
        find = bench.probe.find_exchange if isinstance(thing, Exchange) else bench.probe.find_queue
        try:
            await find(thing.name)
        except ConnectionLost:
            raise
        except TransportError as error:
            if "NOT_FOUND" not in str(error) or "home node" in str(error):
                raise TransportError(f"{thing.name}: {error}") from error
            missing.append(thing.name)
    if missing:
        raise _Doubt(f"missing: {', '.join(missing)}", SET_UP)


async def _inbox(bench: Bench) -> str:
    """Declares the inbox as its worker does; deletes it again if it was not there. Takes nothing from it."""
    name = bench.topology.inbox(bench.transport.user)
    try:
        await bench.probe.find_queue(name)
        there = True
    except TransportError:
        there = False
    try:
        await bench.transport.declare(*bench.topology.inbox_declarations(bench.transport.user))
    finally:
        if not there:
            await bench.transport.delete(name)
    return f"{name} can be declared and bound"


async def _speaking(bench: Bench) -> str:
    """With a key that is the participant's own, and that nothing is bound for."""
    me = bench.transport.user
    with suppress(Unroutable):
        await bench.transport.publish(bench.topology.up, f"{me}.check", b"")
    with suppress(Unroutable):
        await bench.transport.publish(bench.topology.up, f"{me}.check", bytes(MAX_FRAME_BYTES), timeout_s=LARGE_S)
    return f"may publish as {me}, up to {MAX_FRAME_BYTES // MEBI} MiB"


# -- rights ------------------------------------------------------------------------------------------------------


async def _own_name(bench: Bench) -> str:
    await _refused_as_another(bench, bench.topology.up, f"{bench.transport.user}.check")
    return "publishing in another user's name is refused"


async def _only_this_federation(bench: Bench) -> str:
    if await _is_allowed(lambda: _declare_and_delete(bench, f"fluffle-check-{bench.token}")):
        raise _Doubt(f"user {bench.transport.user!r} may declare things outside the federation")
    return "no rights outside the federation"


async def _nothing_else(bench: Bench) -> str:
    """All that a participant must not do and that leaves no trace if it may."""
    transport, names, token = bench.transport, bench.topology, bench.token
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "publish to any queue": lambda: transport.publish("", bench.name("none"), b""),
        "speak for others": lambda: transport.publish(names.up, f"{token}.check", b""),
        "write to another's outbox": lambda: transport.publish(names.chunks(token), f"{token}.check", b""),
        "tell others what to do": lambda: transport.publish(names.down, f"check.{token}", b""),
        "read what others send": lambda: _open_and_close(transport.read(names.updates, offset="next", prefetch=1)),
        "declare what it likes": lambda: _declare_and_delete(bench, bench.name("none")),
    }
    allowed = [deed for deed, attempt in attempts.items() if await _is_allowed(attempt)]
    if allowed:
        raise TransportError(f"user {transport.user!r} may {', '.join(allowed)}")
    return f"may not {', '.join(attempts)}"


async def _is_allowed(attempt: Callable[[], Awaitable[object]]) -> bool:
    try:
        await attempt()
    except ConnectionLost:
        raise
    except Unroutable:
        return True
    except TransportError:  # refused; or not there, which the other checks tell
        return False
    return True


async def _declare_and_delete(bench: Bench, name: str) -> None:
    await bench.transport.declare(Queue(name, expires_s=UNUSED_S))
    await bench.transport.delete(name)


async def _open_and_close(opening: Awaitable[Inbox]) -> None:
    await (await opening).close()


# -- tools -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _temporary(bench: Bench, *things: Declaration) -> AsyncIterator[None]:
    """These exist in the block, and not after it, whatever happened in it."""
    try:
        await bench.transport.declare(*things)
        yield
    finally:
        for thing in things:
            with suppress(TransportError):
                if isinstance(thing, Exchange):
                    await bench.probe.delete_exchange(thing.name)
                elif not isinstance(thing, Binding):
                    await bench.transport.delete(thing.name)


async def _next(inbox: Inbox) -> Delivery:
    delivery = await inbox.get(SOON_S)
    if delivery is None:
        raise TransportError(f"what was confirmed was not delivered within {SOON_S:g} s")
    return delivery


RIGHTS = "load the output of `fluffle broker definitions` for this federation, which gives exactly its rights"
SET_UP = (
    "run `fluffle broker setup`, or load the output of `fluffle broker definitions`; the aggregator does it, too"
)
REPLACE = (
    "if it stays so for minutes after the broker was started, delete the queue (what it holds is lost) with "
    "`rabbitmqctl delete_queue NAME`, or, if that does not find it, with `rabbitmqctl eval "
    '\'rabbit_amqqueue:internal_delete(rabbit_misc:r(<<"VHOST">>, queue, <<"NAME">>), <<"me">>).\'`; then run '
    "`fluffle broker setup`"
)
SIZE = f"set max_message_size in rabbitmq.conf to {16 * MEBI} or more"
NAMES = "take the tag `impersonator` from this user: `rabbitmqctl set_user_tags NAME`"
BROKER_CHECKS = (
    Check("version", "use RabbitMQ 3.10 or newer", _version),
    Check("tuning", f"set channel_max to at least {ENOUGH_CHANNELS} in rabbitmq.conf", _tuning),
)
AGGREGATOR_CHECKS = (
    *BROKER_CHECKS,
    Check("quorum queue", "look at the broker's disk, memory and the majority of its cluster", _quorum_queue),
    Check("stream", "enable the feature flag stream_queue; look at the broker's disk and memory", _stream),
    Check("routing", "look at the broker's log", _routing),
    Check("largest message", SIZE, _largest_message),
    Check("names", NAMES, _verified_names),
    Check("federation", REPLACE, _federation),
    Check("rights", RIGHTS, _only_this_federation),
)
PARTICIPANT_CHECKS = (
    *BROKER_CHECKS,
    Check("federation", REPLACE, _federation_for_participant),
    Check("inbox", REPLACE, _inbox, needs="federation"),
    Check("publishing", SIZE, _speaking, needs="federation"),
    Check("names", NAMES, _own_name, needs="federation"),
    Check("rights", RIGHTS, _nothing_else),
)
