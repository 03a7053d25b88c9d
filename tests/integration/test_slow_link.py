"""A participant behind a link of 10 Mbit/s that is cut, again and again, or hangs for longer than anybody waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker.memory import MemoryBroker
from broker.payloads import PREFETCH, WINDOW
from broker.topology import Topology
from fluffle.chaos.proxy import Proxy, proxied
from tests.federation import Federation, names, settings
from tests.rabbit_node import Rabbit
from workers.trainer import Sizes

BYTES_PER_S = 10e6 / 8
CHUNK_BYTES = 1 << 13
SMALL, LARGE = 1_000_000, 25_000_000  # bytes of a model
FEAR = {"deadline_s": 400.0}


@dataclass
class Weather:
    """Cuts the link whenever so many more bytes went or down; every third time it stays away for a while."""

    proxy: Proxy
    every: int
    away_s: float
    cuts: int = 0
    cut_at: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def blow(self) -> None:
        while not self.over.is_set():
            await asyncio.sleep(0.05)
            if self.proxy.sent + self.proxy.received < self.cut_at + self.every:
                continue
            self.cuts, self.cut_at = self.cuts + 1, self.proxy.sent + self.proxy.received
            if self.cuts % 3 == 0:
                self.proxy.freeze()
                await asyncio.sleep(self.away_s)
                self.proxy.thaw()
            self.proxy.cut()


@pytest.mark.xdist_group("rabbitmq")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("size", "away_s"), [(SMALL, 1.0), pytest.param(LARGE, 20.0, marks=pytest.mark.slow)], ids=["1MB", "25MB"]
)
async def test_it_finishes_the_round_with_everybody_s_model(
    rabbit: Rabbit, tmp_path: Path, size: int, away_s: float
) -> None:
    """The other participant has no such link. Both are counted, and the model is that of a quiet run."""
    sizes = {"size": size // 4, "sizes": Sizes(inline_bytes=0, chunk_bytes=CHUNK_BYTES)}
    run = settings(2, rounds=1, round=FEAR, broker={"inline_bytes": 0, "chunk_bytes": CHUNK_BYTES})
    quiet = await Federation(MemoryBroker(Topology("default").access), tmp_path / "quiet", names(2), **sizes).run(
        run
    )
    federation = Federation(
        rabbit.broker(), tmp_path / "run", names(2), topology=rabbit.topology(), patience_s=away_s / 2, **sizes
    )
    async with proxied(rabbit.url.port or 5672) as proxy, asyncio.TaskGroup() as group:
        proxy.slow(BYTES_PER_S)
        weather = Weather(proxy, size // 3, away_s)
        slow, fast = federation.worker("p01", broker=rabbit.broker(port=proxy.port)), federation.worker("p02")
        for worker in (slow, fast):
            group.create_task(worker.run())
        blowing = group.create_task(weather.blow())
        head = await federation.aggregator(run).run()
        slow.stop()
        fast.stop()
        weather.over.set()
        await blowing
    assert head.model == quiet.model or (head.model and quiet.model and head.model.sha256 == quiet.model.sha256)
    assert [d.verdict for d in await federation.ledger()] == ["counted", "counted"]
    assert weather.cuts >= 4
    again = weather.cuts * max(WINDOW, PREFETCH) * CHUNK_BYTES
    assert 2 * size <= proxy.sent + proxy.received <= 2.1 * size + again
    told = federation.transfers["p01"]
    assert {(status.what, status.done_bytes >= size) for status in told} >= {("model", True), ("update", True)}
    assert all(status.bytes_per_s < 1.5 * BYTES_PER_S for status in told if status.done_bytes > size // 2)
    assert any(status.left_s for status in told)
