"""FedBuff over RabbitMQ: twenty workers, one of them fifty times slower than the others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median

import pytest

from broker import tensors
from tests.federation import Federation, Step, counted, fedbuff, names, settings
from tests.rabbit_node import Rabbit

pytestmark = [pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(120)]

FAST_S, SLOW_S = 0.06, 3.0
WORKERS, VERSIONS, BUFFER = 20, 100, 10


async def test_versions_come_at_the_pace_of_the_fast_ones_and_the_ledger_tells_of_the_slow_one(
    rabbit: Rabbit, tmp_path: Path
) -> None:
    everybody = names(WORKERS)
    run = settings(WORKERS, VERSIONS, round={"policy": "buffered", "buffer": BUFFER, "staleness_max": 900})
    federation = Federation(rabbit.broker(), tmp_path, everybody, topology=rabbit.topology())
    federation.tasks = {name: Step() for name in everybody}
    async with asyncio.timeout(90), federation.crowd() as crowd:
        leader = asyncio.create_task(federation.aggregator(run).run())
        crowd.start(everybody[-1], lag_s=SLOW_S)
        crowd.start(*everybody[:-1], lag_s=FAST_S)
        head = await leader
    ledger = await federation.ledger()
    assert all(len(counted(ledger, version)) == BUFFER for version in range(1, VERSIONS + 1))
    # Nineteen fast ones fill a buffer of ten about twice in the time that one of them trains.
    assert median(report.duration_s for report in federation.reports) < SLOW_S / 10
    slow = [line for line in ledger if line.participant == everybody[-1] and line.verdict == "counted"]
    assert slow
    assert min(line.staleness for line in slow) > 5
    fast = [line for line in ledger if line.participant != everybody[-1] and line.verdict == "counted"]
    assert median(line.staleness for line in fast) <= 3
    assert head.model
    path = tmp_path / "checkpoints" / f"{head.model.sha256}.safetensors"
    model = tensors.decode(await asyncio.to_thread(path.read_bytes))
    assert model["w"] == pytest.approx(fedbuff(ledger, VERSIONS), rel=1e-5)
    print(
        f"{VERSIONS} versions, median {median(r.duration_s for r in federation.reports):.3f} s; the slow one: "
        + ", ".join(f"version {line.version} with staleness {line.staleness}" for line in slow)
    )
