"""Messages that arrive again: later, in another order, and when the broker has lost the first ones."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR, Topology
from fluffle.chaos.copies import Copies
from tests.federation import Federation, names, settings
from workers.trainer import Sizes

TOPOLOGY = Topology("default")
IN_CHUNKS = {"inline_bytes": 0, "chunk_bytes": 1024}


def federation(directory: Path, sizes: dict[str, int]) -> Federation:
    found = Federation(MemoryBroker(TOPOLOGY.access), directory, names(3), size=1000, heartbeat_s=0.2)
    found.sizes = Sizes(**sizes)
    return found


@pytest.mark.parametrize("sizes", [{}, IN_CHUNKS], ids=["inline", "chunks"])
async def test_copies_of_everything_change_nothing(tmp_path: Path, sizes: dict[str, int]) -> None:
    run = settings(3, rounds=8, broker=dict[str, object](sizes))
    quiet, struck = (federation(tmp_path / name, sizes) for name in ("quiet", "struck"))
    undisturbed = await quiet.run(run)
    copies = Copies(struck.broker, TOPOLOGY, names(3), [struck.directory], large=bool(sizes))
    connection = await struck.broker.connect(AGGREGATOR, purpose="set up")
    await connection.declare(*TOPOLOGY.aggregator_declarations())
    await copies.keep_orders()
    dice = Random(7)
    async with asyncio.timeout(30), struck.crowd() as crowd:
        crowd.start("p01", "p02")
        crowd.start("p03", lag_s=0.3)
        running = asyncio.create_task(struck.aggregator(run).run())
        for closed in (1, 3, 5):
            await struck.closed(closed)
            assert await copies.repeat(24, await copies.of_updates(), dice) > 24
        record = await running
    assert record.model is not None
    assert undisturbed.model is not None
    assert record.model.sha256 == undisturbed.model.sha256
    fates = Counter(decision.verdict for decision in await struck.ledger())
    assert fates["counted"] == 3 * 8
    assert fates["duplicate"] > 0
    assert set(fates) <= {"counted", "duplicate", "late"}
