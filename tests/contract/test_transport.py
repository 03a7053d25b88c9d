"""What every transport promises about connections, exchanges and queues."""

from __future__ import annotations

import asyncio

import pytest
from contract_steps import Connect, bodies, is_quiet, numbered, receive, receive_all, send

from broker.errors import AccessRefused, ConnectionLost, TransportError, Unroutable
from broker.topology import UP_KINDS, Topology
from broker.transport import Binding, Declaration, Exchange, Queue, Stream, Transport


class TestPublishing:
    async def test_a_message_arrives_whole(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        inbox = await transport.consume(queue)
        await transport.publish("", queue, b"\x00\xff hello")
        delivery = await receive(inbox)
        assert (delivery.body, delivery.key) == (b"\x00\xff hello", queue)
        assert (delivery.sender, delivery.offset, delivery.delivery_count) == ("aggregator", -1, 0)
        await delivery.ack()

    async def test_messages_of_one_publisher_keep_their_order(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        inbox = await transport.consume(queue)
        await send(transport, queue, *numbered(200))
        assert await bodies(inbox, 200) == numbered(200)

    async def test_several_publishes_at_once_all_arrive(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        await asyncio.gather(*(transport.publish("", queue, body) for body in numbered(50)))
        inbox = await transport.consume(queue)
        assert sorted(await bodies(inbox, 50)) == sorted(numbered(50))

    async def test_nothing_to_take_it_is_an_error(
        self, transport: Transport, topology: Topology, queue: str
    ) -> None:
        await transport.declare(Exchange(topology.down))
        with pytest.raises(Unroutable, match=r"p-1"):
            await transport.publish(topology.down, "p-1", b"")
        with pytest.raises(Unroutable, match=queue):
            await transport.publish("", queue, b"")
        await transport.declare(Queue(queue))
        await transport.publish("", queue, b"the connection still works")

    async def test_an_unknown_exchange_is_an_error(self, transport: Transport, topology: Topology) -> None:
        with pytest.raises(TransportError, match=topology.down):
            await transport.publish(topology.down, "all", b"")

    async def test_many_connections_receive_what_is_published_to_all(
        self, connect: Connect, topology: Topology
    ) -> None:
        transport = await connect()
        await transport.declare(Exchange(topology.down))
        inboxes = []
        for user in ("p-1", "p-2"):
            participant = await connect(user)
            await participant.declare(*topology.inbox_declarations(user))
            inboxes.append(await participant.consume(topology.inbox(user), prefetch=1))
        await transport.publish(topology.down, "all", b"both")
        await transport.publish(topology.down, "p-2", b"second only")
        assert await bodies(inboxes[0], 1) == [b"both"]
        second = await receive(inboxes[1])
        await second.ack()
        assert (second.body, second.key, second.sender) == (b"both", "all", "aggregator")
        assert await bodies(inboxes[1], 1) == [b"second only"]
        assert await is_quiet(inboxes[0])


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("a.b", ["a.b"], ["a", "a.c", "a.b.c", "A.b"]),
        ("*.b", ["a.b", "x-1.b"], ["b", "a.a.b", "a.b.c"]),
        ("a.*", ["a.b"], ["a", "a.b.c"]),
        ("a.#", ["a", "a.b", "a.b.c"], ["b", "b.a"]),
        ("#.z", ["z", "a.z", "a.b.z"], ["a.z.b"]),
        ("a.#.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z"]),
        ("#", ["a", "a.b.c"], []),
    ],
)
async def test_topic_patterns(
    transport: Transport, topology: Topology, queue: str, pattern: str, fitting: list[str], others: list[str]
) -> None:
    await transport.declare(Exchange(topology.up), Queue(queue), Binding(topology.up, pattern, queue))
    for key in fitting:
        await transport.publish(topology.up, key, b"")
    for key in others:
        with pytest.raises(Unroutable):
            await transport.publish(topology.up, key, b"")
    inbox = await transport.consume(queue)
    assert [d.key for d in await receive_all(inbox, len(fitting))] == fitting
    assert await is_quiet(inbox)


class TestDeclaring:
    async def test_declaring_again_changes_nothing(
        self, transport: Transport, topology: Topology, queue: str
    ) -> None:
        things: list[Declaration] = [Exchange(topology.up), Queue(queue, max_length=5)]
        things.append(Binding(topology.up, "#", queue))
        await transport.declare(*things)
        await transport.publish(topology.up, "p-1.join", b"kept")
        await transport.declare(*things)
        inbox = await transport.consume(queue)
        assert await bodies(inbox, 1) == [b"kept"]
        assert await is_quiet(inbox)

    async def test_two_bindings_deliver_one_copy(
        self, transport: Transport, topology: Topology, queue: str
    ) -> None:
        both = [Binding(topology.up, "p-1.*", queue), Binding(topology.up, "*.join", queue)]
        await transport.declare(Exchange(topology.up), Queue(queue), *both)
        await transport.publish(topology.up, "p-1.join", b"once")
        inbox = await transport.consume(queue)
        assert await bodies(inbox, 1) == [b"once"]
        assert await is_quiet(inbox)

    @pytest.mark.parametrize("kind", ["length", "replicated", "stream"])
    async def test_declaring_it_differently_is_an_error(self, transport: Transport, queue: str, kind: str) -> None:
        await transport.declare(Queue(queue))
        await send(transport, queue, b"kept")
        different: dict[str, Declaration] = {
            "length": Queue(queue, max_length=1),
            "replicated": Queue(queue, replicated=True),
            "stream": Stream(queue, 1 << 20, 1 << 20),
        }
        with pytest.raises(TransportError, match=queue):
            await transport.declare(different[kind])
        inbox = await transport.consume(queue)
        assert await bodies(inbox, 1) == [b"kept"]

    async def test_a_later_binding_adds_to_earlier_ones(
        self, transport: Transport, topology: Topology, queue: str
    ) -> None:
        second = f"{queue}.second"
        await transport.declare(Exchange(topology.up), Queue(queue), Binding(topology.up, "#", queue))
        await transport.publish(topology.up, "p-1.join", b"0")
        await transport.declare(Queue(second), Binding(topology.up, "p-1.join", second))
        await transport.publish(topology.up, "p-1.join", b"1")
        assert await bodies(await transport.consume(queue), 2) == [b"0", b"1"]
        assert await bodies(await transport.consume(second), 1) == [b"1"]

    async def test_binding_needs_both_ends(self, transport: Transport, topology: Topology, queue: str) -> None:
        await transport.declare(Exchange(topology.up))
        with pytest.raises(TransportError, match=queue):
            await transport.declare(Binding(topology.up, "#", queue))
        await transport.declare(Queue(queue))
        with pytest.raises(TransportError, match=topology.down):
            await transport.declare(Binding(topology.down, "#", queue))

    async def test_consuming_what_does_not_exist_is_an_error(self, transport: Transport, queue: str) -> None:
        with pytest.raises(TransportError, match=queue):
            await transport.consume(queue)
        with pytest.raises(TransportError, match=queue):
            await transport.read(queue, offset="first")

    async def test_delivery_limits_need_replication(self, transport: Transport, queue: str) -> None:
        with pytest.raises(TransportError, match=r"delivery.limit"):
            await transport.declare(Queue(queue, delivery_limit=3))

    async def test_deleting(self, transport: Transport, topology: Topology, queue: str) -> None:
        await transport.delete(queue)
        await transport.declare(Exchange(topology.up), Queue(queue), Binding(topology.up, "#", queue))
        await send(transport, queue, b"gone")
        await transport.delete(queue)
        with pytest.raises(Unroutable):
            await transport.publish(topology.up, "p-1.join", b"")
        await transport.declare(Queue(queue, max_length=3))
        assert await is_quiet(await transport.consume(queue))
        with pytest.raises(Unroutable):
            await transport.publish(topology.up, "p-1.join", b"its bindings went with it")

    async def test_unused_queues_expire(self, transport: Transport, topology: Topology, queue: str) -> None:
        used = f"{queue}.used"
        await transport.declare(
            Exchange(topology.down), Queue(queue, expires_s=0.5), Queue(used, expires_s=0.5),
            Binding(topology.down, "x", queue), Binding(topology.down, "y", used),
        )  # fmt: skip
        inbox = await transport.consume(used)
        await asyncio.sleep(1.5)
        with pytest.raises(Unroutable):
            await transport.publish(topology.down, "x", b"")
        with pytest.raises(TransportError, match=queue):
            await transport.consume(queue)
        await transport.publish(topology.down, "y", b"there")
        assert await bodies(inbox, 1) == [b"there"]


class TestSettling:
    async def test_what_was_acked_is_gone(self, connect: Connect, queue: str) -> None:
        first, second = await connect(), await connect()
        await first.declare(Queue(queue))
        await send(first, queue, b"0", b"1")
        inbox = await first.consume(queue)
        for delivery in await receive_all(inbox, 2):
            await delivery.ack()
        await inbox.close()
        assert await is_quiet(await second.consume(queue))

    @pytest.mark.parametrize("replicated", [False, True])
    async def test_unacked_messages_outlive_their_connection_in_order(
        self, connect: Connect, queue: str, *, replicated: bool
    ) -> None:
        first, second = await connect(), await connect()
        await first.declare(Queue(queue, replicated=replicated))
        await send(first, queue, *numbered(6))
        held = await receive_all(await first.consume(queue, prefetch=4), 4)
        await held[1].ack()
        await first.close()
        again = await receive_all(await second.consume(queue), 5)
        assert [d.body for d in again] == [b"0", b"2", b"3", b"4", b"5"]
        assert [min(d.delivery_count, 1) for d in again[:3]] == [1, 1, 1]

    async def test_unacked_messages_come_back_when_their_inbox_closes(
        self, transport: Transport, queue: str
    ) -> None:
        await transport.declare(Queue(queue))
        await send(transport, queue, *numbered(4))
        inbox = await transport.consume(queue, prefetch=2)
        held = await receive(inbox)
        await inbox.close()
        assert await bodies(await transport.consume(queue), 4) == numbered(4)
        with pytest.raises(TransportError):
            await held.ack()

    async def test_rejecting(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue, replicated=True))
        inbox = await transport.consume(queue, prefetch=1)
        await send(transport, queue, b"0", b"1")
        await (await receive(inbox)).reject(requeue=True)
        again = await receive(inbox)
        assert (again.body, again.delivery_count) == (b"0", 1)
        await again.reject(requeue=False)
        assert await bodies(inbox, 1) == [b"1"]

    async def test_a_rejected_delivery_cannot_settle_the_next_one(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        await send(transport, queue, b"")
        inbox = await transport.consume(queue)
        rejected = await receive(inbox)
        await rejected.reject(requeue=True)
        again = await receive(inbox)
        with pytest.raises(TransportError):
            await rejected.ack()
        assert again.delivery_count > 0

    async def test_settling_twice_is_an_error(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        await send(transport, queue, b"")
        delivery = await receive(await transport.consume(queue))
        await delivery.ack()
        with pytest.raises(TransportError):
            await delivery.ack()

    async def test_a_message_is_given_up_at_the_delivery_limit(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue, replicated=True, delivery_limit=2))
        await send(transport, queue, b"poison")
        inbox = await transport.consume(queue)
        for count in range(3):
            delivery = await receive(inbox)
            assert delivery.delivery_count == count
            await delivery.reject(requeue=True)
        assert await is_quiet(inbox)


class TestConsuming:
    async def test_prefetch_bounds_what_is_unsettled(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        await send(transport, queue, *numbered(4))
        inbox = await transport.consume(queue, prefetch=2)
        held = await receive_all(inbox, 2)
        assert await is_quiet(inbox)
        await held[0].ack()
        assert await bodies(inbox, 1) == [b"2"]
        assert await is_quiet(inbox)

    async def test_consumers_take_turns(self, connect: Connect, queue: str) -> None:
        first, second = await connect(), await connect()
        await first.declare(Queue(queue))
        inboxes = [await first.consume(queue), await second.consume(queue)]
        await send(first, queue, *numbered(10))
        shares = [await bodies(inbox, 5) for inbox in inboxes]
        assert sorted(shares[0] + shares[1]) == numbered(10)
        assert all(share == sorted(share) for share in shares)

    async def test_a_full_consumer_leaves_the_rest_to_others(self, connect: Connect, queue: str) -> None:
        first, second = await connect(), await connect()
        await first.declare(Queue(queue))
        full = await first.consume(queue, prefetch=1)
        free = await second.consume(queue)
        await send(first, queue, *numbered(6))
        assert sorted(await bodies(full, 1) + await bodies(free, 5)) == numbered(6)
        assert await is_quiet(full)

    async def test_a_single_active_consumer_gets_everything(self, connect: Connect, queue: str) -> None:
        first, second = await connect(), await connect()
        await first.declare(Queue(queue, replicated=True, single_active_consumer=True))
        active = await first.consume(queue, prefetch=2)
        standby = await second.consume(queue)
        await send(first, queue, *numbered(4))
        held = await receive_all(active, 2)
        assert await is_quiet(standby), "a full active consumer must not leave anything to a standby"
        await held[0].ack()
        await first.close()
        assert await bodies(standby, 3) == [b"1", b"2", b"3"]

    async def test_the_head_record_is_handed_on_like_a_baton(self, connect: Connect, topology: Topology) -> None:
        leader, standby, publisher = await connect(), await connect(), await connect()
        await publisher.declare(*topology.aggregator_declarations())
        leads = await leader.consume(topology.head)
        waits = await standby.consume(topology.head)
        await send(publisher, topology.head, b"record 1")
        old = await receive(leads)
        await send(publisher, topology.head, b"record 2")
        assert (await receive(leads)).body == b"record 2"
        await old.ack()
        assert await is_quiet(waits)
        await leader.close()
        record = await receive(waits)
        assert (record.body, record.delivery_count) == (b"record 2", 1)
        assert await is_quiet(waits)

    async def test_an_inbox_of_one_holds_only_the_newest(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue, max_length=1))
        await send(transport, queue, *numbered(7))
        inbox = await transport.consume(queue, prefetch=1)
        held = await receive(inbox)
        assert held.body == b"6"
        await send(transport, queue, b"7", b"8")
        await held.ack()
        newest = await receive(inbox)
        assert newest.body == b"8", "what is unacked does not count as length"
        await newest.ack()
        assert await is_quiet(inbox)

    async def test_what_comes_back_makes_room_for_the_newest(self, connect: Connect, queue: str) -> None:
        first, second = await connect(), await connect()
        await first.declare(Queue(queue, max_length=1))
        await send(first, queue, b"old")
        await receive(await first.consume(queue, prefetch=1))
        await send(second, queue, b"new")
        await first.close()
        inbox = await second.consume(queue)
        assert await bodies(inbox, 1) == [b"new"]
        assert await is_quiet(inbox)

    async def test_cancelling_a_get_loses_nothing(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        inbox = await transport.consume(queue)
        for body in numbered(20):
            waiting = asyncio.create_task(inbox.get())
            await asyncio.sleep(0)
            publishing = asyncio.create_task(transport.publish("", queue, body))
            await asyncio.sleep(0)
            waiting.cancel()
            await publishing
            (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
            delivery = await receive(inbox) if isinstance(outcome, asyncio.CancelledError) else outcome
            assert delivery is not None
            assert not isinstance(delivery, BaseException)
            assert delivery.body == body

    async def test_get_waits_no_longer_than_told(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        inbox = await transport.consume(queue)
        assert await inbox.get(0) is None
        started = asyncio.get_running_loop().time()
        assert await inbox.get(0.1) is None
        assert 0.09 < asyncio.get_running_loop().time() - started < 2


class TestConnections:
    async def test_closing_twice_is_allowed(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        inbox = await transport.consume(queue)
        await inbox.close()
        await inbox.close()
        await transport.close()
        await transport.close()
        await inbox.close()

    async def test_a_closed_connection_refuses_everything(self, connect: Connect, queue: str) -> None:
        transport, other = await connect(), await connect()
        await other.declare(Queue(queue))
        await send(other, queue, b"0", b"1")
        inbox = await transport.consume(queue)
        delivery = await receive(inbox)
        await transport.close()
        for refused in (
            transport.declare(Queue(queue)), transport.publish("", queue, b""), transport.consume(queue),
            transport.read(queue, offset="first"), transport.delete(queue), inbox.get(), inbox.get(0),
            delivery.ack(), delivery.reject(requeue=True),
        ):  # fmt: skip
            with pytest.raises(ConnectionLost):
                await refused
        assert await bodies(await other.consume(queue), 2) == [b"0", b"1"]

    async def test_who_waits_is_told_that_the_connection_is_gone(self, transport: Transport, queue: str) -> None:
        await transport.declare(Queue(queue))
        waiting = asyncio.create_task((await transport.consume(queue)).get())
        await asyncio.sleep(0.05)
        await transport.close()
        with pytest.raises(ConnectionLost):
            await waiting


class TestPermissions:
    """`Topology.access`, as the broker enforces it."""

    @pytest.fixture
    async def participant(self, connect: Connect, topology: Topology, queue: str, stream: str) -> Transport:
        aggregator = await connect()
        await aggregator.declare(
            *topology.aggregator_declarations(), *topology.inbox_declarations("p-2"),
            *topology.outbox_declarations("p-1", 1), *topology.model_declarations("run", 1),
            *topology.state_declarations("run", 1), Queue(queue), Stream(stream, 1 << 20, 1 << 20),
        )  # fmt: skip
        participant = await connect("p-1")
        await participant.declare(*topology.inbox_declarations("p-1"))
        return participant

    async def test_what_a_participant_may_do(
        self, connect: Connect, participant: Transport, topology: Topology
    ) -> None:
        updates = await (await connect()).read(topology.updates, offset="first")
        for kind in UP_KINDS:
            await participant.publish(topology.up, f"p-1.{kind}", b"")
        await participant.publish(topology.chunks("p-1"), "p-1.chunk", b"")
        first = await receive(updates)
        assert (first.key, first.sender) == ("p-1.join", "p-1")
        await participant.consume(topology.inbox("p-1"), prefetch=1)
        await participant.read(topology.model("run"), offset="first")

    async def test_a_participant_speaks_only_for_itself(self, participant: Transport, topology: Topology) -> None:
        for exchange, key in (
            (topology.up, "p-2.update"), (topology.up, "p-1"), (topology.up, "p-1.a.b"), (topology.down, "all"),
            (topology.chunks("p-2"), "p-1.chunk"),
            ("", topology.updates), ("", topology.head), ("", topology.inbox("p-1")),
        ):  # fmt: skip
            with pytest.raises(AccessRefused, match=r"p-1"):
                await participant.publish(exchange, key, b"")
        await participant.publish(topology.up, "p-1.update", b"the connection still works")

    async def test_a_participant_reads_only_what_is_for_it(
        self, participant: Transport, topology: Topology
    ) -> None:
        for name in (topology.head, topology.inbox("p-2"), topology.rejected):
            with pytest.raises(AccessRefused, match=name):
                await participant.consume(name)
        for name in (topology.updates, topology.outbox("p-1")):
            with pytest.raises(AccessRefused, match=name):
                await participant.read(name, offset="first")

    async def test_a_participant_declares_only_its_inbox(self, participant: Transport, topology: Topology) -> None:
        own, others = topology.inbox("p-1"), topology.inbox("p-2")
        for thing in (
            Queue(others), Queue(topology.head), Exchange(topology.up), *topology.outbox_declarations("p-1", 1),
            Binding(topology.down, "p-2", own), Binding(topology.down, "#", own), Binding(topology.up, "#", own),
            Binding(topology.down, "p-1", others),
        ):  # fmt: skip
            with pytest.raises(AccessRefused):
                await participant.declare(thing)
        for name in (others, topology.head, topology.updates):
            with pytest.raises(AccessRefused, match=name):
                await participant.delete(name)
        await participant.delete(own)
