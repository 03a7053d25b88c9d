"""Whatever consumers and connections do: no message of a queue is lost, and none that was acked comes again."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import ConnectionLost
from broker.memory import MemoryBroker, MemoryTransport
from broker.transport import Delivery, Inbox, Queue

Step = tuple[str, int]
NAMES = ["publish", "publish", "consume", "take", "take", "ack", "requeue", "cancel", "abort", "restart"]
STEPS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 7)), max_size=80)


class Schedule:
    """Runs random steps and remembers what must hold."""

    def __init__(self, broker: MemoryBroker, publisher: MemoryTransport) -> None:
        self.broker = broker
        self.publisher = publisher
        self.published = 0
        self.settled: set[int] = set()
        self.consumers: list[tuple[MemoryTransport, Inbox]] = []
        self.held: list[Delivery] = []
        self.newest: dict[Inbox, int] = {}

    async def run(self, steps: list[Step]) -> None:
        for name, which in steps:
            await getattr(self, name)(which)

    async def publish(self, _: int) -> None:
        await self.publisher.publish("", "q", b"%d" % self.published)
        self.published += 1

    async def consume(self, prefetch: int) -> None:
        transport = await self.broker.connect("c", purpose="test")
        self.consumers.append((transport, await transport.consume("q", prefetch=prefetch)))

    async def take(self, which: int) -> None:
        if not self.consumers:
            return
        inbox = self.consumers[which % len(self.consumers)][1]
        delivery = await inbox.get(0)
        if delivery is not None:
            assert int(delivery.body) not in self.settled, "what was acked must not come again"
            self._check_order(inbox, delivery)
            self.held.append(delivery)

    def _check_order(self, inbox: Inbox, delivery: Delivery) -> None:
        if delivery.delivery_count == 0:
            assert int(delivery.body) > self.newest.get(inbox, -1), "first deliveries keep their order"
            self.newest[inbox] = int(delivery.body)

    async def ack(self, which: int) -> None:
        if self.held:
            delivery = self.held.pop(which % len(self.held))
            try:
                await delivery.ack()
            except ConnectionLost:
                return
            self.settled.add(int(delivery.body))

    async def requeue(self, which: int) -> None:
        if self.held:
            try:
                await self.held.pop(which % len(self.held)).reject(requeue=True)
            except ConnectionLost:
                return

    async def cancel(self, which: int) -> None:
        if self.consumers:
            transport, inbox = self.consumers.pop(which % len(self.consumers))
            await inbox.close()
            await transport.close()

    async def abort(self, which: int) -> None:
        if self.consumers:
            self.consumers.pop(which % len(self.consumers))[0].abort()

    async def restart(self, _: int) -> None:
        self.broker.stop()
        self.broker.start()
        self.consumers.clear()
        self.publisher = await self.broker.connect("p", purpose="test")

    async def drain(self) -> list[int]:
        """What is left once all consumers are gone, in the order of the queue."""
        await self.restart(0)
        inbox = await self.publisher.consume("q")
        left = []
        while delivery := await inbox.get(0):
            left.append(int(delivery.body))
        return left


@given(steps=STEPS, single=st.booleans())
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_nothing_acked_comes_again(*, steps: list[Step], single: bool) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        publisher = await broker.connect("p", purpose="test")
        await publisher.declare(Queue("q", single_active_consumer=single))
        schedule = Schedule(broker, publisher)
        await schedule.run(steps)
        left = await schedule.drain()
        assert left == [i for i in range(schedule.published) if i not in schedule.settled]

    asyncio.run(main())
