"""Random schedules of faults for a leader, a standby and the workers; and of cuts for the head protocol alone.

Whatever comes together: the model is the undisturbed run's, bit for bit, every update is counted exactly once,
and commits form one chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from test_lead_and_commit import Outcome, check, ledger, offsets_of_updates

from aggregator.settings import RunSettings
from broker.faults import FaultyBroker, Rates, SeededFaults
from broker.memory import MemoryBroker
from broker.topology import Topology
from fluffle.logs import configure_logs
from tests.federation import Federation, names, settings
from workers.trainer import Sizes

TOPOLOGY = Topology("default")
SIZES = {"inline_bytes": 0, "chunk_bytes": 1024}
INLINE, STREAMS = settings(3, 2), settings(3, 2, broker=SIZES)
RATES = Rates(disconnect=0.008, delay=0.03, fail_publish=0.02, duplicate=0.03, hold_back=0.03)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = structlog.get_config()
    configure_logs("error")
    yield
    structlog.configure(**before)


# -- whole runs -----------------------------------------------------------------------------------------------


async def run_through(
    directory: Path, run: RunSettings, aggregators: SeededFaults, workers: SeededFaults
) -> Outcome:
    """One run with a leader and a standby; its every wait ends within a minute."""
    memory = MemoryBroker(TOPOLOGY.access)
    federation = Federation(memory, directory, names(3), size=600)
    federation.heartbeat_s = 0.2
    federation.sizes = Sizes(run.broker.inline_bytes, run.broker.chunk_bytes)
    federation.broker = FaultyBroker(memory, workers)
    async with asyncio.timeout(60), federation.workers():
        federation.broker = FaultyBroker(memory, aggregators)
        both = [asyncio.create_task(federation.aggregator(run).run()) for _ in range(2)]
        done, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        head = done.pop().result()
    published = await offsets_of_updates(memory)
    return Outcome(head, await asyncio.to_thread(ledger, directory), published)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    never = SeededFaults(0, Rates())
    return asyncio.run(run_through(tmp_path_factory.mktemp("undisturbed"), STREAMS, never, never))


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 112))]
)
async def test_no_schedule_of_faults_changes_what_is_counted(
    undisturbed: Outcome, seed: int, tmp_path: Path
) -> None:
    aggregators, workers = (SeededFaults(100 * seed + who, RATES, longest_s=0.05) for who in range(2))
    outcome = await run_through(tmp_path, STREAMS if seed % 2 else INLINE, aggregators, workers)
    assert aggregators.struck
    assert workers.struck
    check(outcome, undisturbed)
