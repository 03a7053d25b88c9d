"""Random schedules of faults for a leader, a standby and the workers; and of cuts for the head protocol alone.

Whatever comes together: the model is the undisturbed run's, bit for bit, every update is counted exactly once,
and commits form one chain.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from random import Random

import pytest
import structlog
from test_lead_and_commit import Outcome, check, ledger, offsets_of_updates

from aggregator.lead import Lead
from aggregator.settings import RunSettings
from broker import tensors
from broker.errors import LeadershipLost, TransportError
from broker.faults import Fault, Faults, FaultyBroker, Operation, Rates, SeededFaults
from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker
from fluffle.chaos.task import Pull
from fluffle.logs import configure_logs
from tests.federation import Federation, Step, counted, fedbuff, names, settings
from workers.trainer import Sizes

TOPOLOGY = Topology("default")
SIZES = {"inline_bytes": 0, "chunk_bytes": 1024}
INLINE, STREAMS = settings(3, 2), settings(3, 2, broker=SIZES)
CODED = settings(
    3, 4, codec={"up": "topk:0.05+zstd", "down": "int8+zstd"}, broker={"inline_bytes": 0, "chunk_bytes": 8192}
)
FEWER = Rates(disconnect=0.003, delay=0.03, fail_publish=0.01, duplicate=0.03, hold_back=0.03)
MOST = 40  # faults for each side: then the run must end
RATES = Rates(disconnect=0.008, delay=0.03, fail_publish=0.02, duplicate=0.03, hold_back=0.03)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = structlog.get_config()
    configure_logs("error")
    yield
    structlog.configure(**before)


# -- whole runs -----------------------------------------------------------------------------------------------


async def run_through(
    directory: Path,
    run: RunSettings,
    aggregators: SeededFaults,
    workers: SeededFaults,
    tasks: dict[str, Pull] | None = None,
) -> Outcome:
    """One run with a leader and a standby; its every wait ends within a minute."""
    memory = MemoryBroker(TOPOLOGY.access)
    participants = names(run.round.participants)
    federation = Federation(memory, directory, participants, size=5000 if run.codec.allowed else 600)
    federation.tasks = tasks or {}
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
    aggregators, workers = (SeededFaults(100 * seed + who, RATES, longest_s=0.05, most=MOST) for who in range(2))
    outcome = await run_through(tmp_path, STREAMS if seed % 2 else INLINE, aggregators, workers)
    assert aggregators.struck
    assert workers.struck
    check(outcome, undisturbed)


@pytest.fixture(scope="module")
def undisturbed_coded(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    never = SeededFaults(0, Rates())
    return asyncio.run(run_through(tmp_path_factory.mktemp("undisturbed"), CODED, never, never))


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))]
)
async def test_no_schedule_of_faults_changes_what_codecs_owe(
    undisturbed_coded: Outcome, seed: int, tmp_path: Path
) -> None:
    aggregators, workers = (SeededFaults(1000 * seed + who, FEWER, longest_s=0.05, most=MOST) for who in range(2))
    check(await run_through(tmp_path, CODED, aggregators, workers), undisturbed_coded)


STREAMED = settings(3, 4, strategy={"name": "diloco", "fragments": 2}, broker=SIZES)


@pytest.fixture(scope="module")
def undisturbed_streamed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    never = SeededFaults(0, Rates())
    return asyncio.run(run_through(tmp_path_factory.mktemp("undisturbed"), STREAMED, never, never))


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))]
)
async def test_no_schedule_of_faults_changes_what_is_kept_of_fragments(
    undisturbed_streamed: Outcome, seed: int, tmp_path: Path
) -> None:
    aggregators, workers = (SeededFaults(2000 * seed + who, FEWER, longest_s=0.05, most=MOST) for who in range(2))
    check(await run_through(tmp_path, STREAMED, aggregators, workers), undisturbed_streamed)


ASYNCHRONOUS = settings(
    4, 12, round={"policy": "buffered", "buffer": 3}, broker={"inline_bytes": 0, "chunk_bytes": 1024}
)


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 60))]
)
async def test_no_schedule_of_faults_counts_an_asynchronous_update_twice_or_loses_one(
    seed: int, tmp_path: Path
) -> None:
    """Which updates meet in a version depends on when they come, so there is no undisturbed model to compare with;
    but whatever comes is decided once, and the model is what FedBuff makes of what the ledger says."""
    aggregators, workers = (SeededFaults(500 * seed + who, RATES, longest_s=0.05, most=MOST) for who in range(2))
    outcome = await run_through(tmp_path, ASYNCHRONOUS, aggregators, workers, dict.fromkeys(names(4), Step()))
    assert aggregators.struck
    assert outcome.head.version == 12
    assert all(len(counted(outcome.ledger, version)) == 3 for version in range(1, 13))
    once = Counter((line.participant, line.task) for line in outcome.ledger if line.verdict == "counted")
    assert set(once.values()) == {1}
    told = sorted(line.offset for line in outcome.ledger)  # the standby may have read further by now
    assert told == outcome.published[: len(told)]
    assert len(told) >= sum(offset < outcome.head.updates_from for offset in outcome.published)
    assert outcome.head.model
    path = tmp_path / "checkpoints" / f"{outcome.head.model.sha256}.safetensors"
    model = tensors.decode(await asyncio.to_thread(path.read_bytes))
    assert model["w"] == pytest.approx(fedbuff(outcome.ledger, 12), rel=1e-5)


# -- the head protocol alone ----------------------------------------------------------------------------------


class Enough(Exception):
    """So many commits returned that the chain can be looked at."""


@dataclass
class Chain:
    """Every commit that was tried, by the name in its payload, and the ones that returned."""

    before: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    returned: list[str] = field(default_factory=list)

    def back_from(self, name: str) -> list[str]:
        """The names that lead to this one, newest first."""
        names = []
        while name:
            names.append(name)
            name = self.before[name]
        return names


async def lead_for_ever(broker: Broker, me: str, chain: Chain, dice: Random) -> None:
    """Stands by, leads, commits one record after another, and begins again whenever that breaks."""
    for term in count():
        with suppress(TransportError, LeadershipLost):
            reader = await broker.connect(AGGREGATOR, purpose=f"lead {me}")
            writer = await broker.connect(AGGREGATOR, purpose=f"publish {me}")
            try:
                lead = await Lead(reader, writer, TOPOLOGY, f"{me}-{term}", 5.0).acquire()
                while True:
                    await commit_next(lead, chain)
                    await asyncio.sleep(dice.choice([0, 0, 0.001, 0.01]))
            finally:
                await reader.close()
                await writer.close()
        await asyncio.sleep(dice.uniform(0, 0.01))


async def commit_next(lead: Lead, chain: Chain) -> None:
    record = lead.record.with_(seq=lead.record.seq + 1)
    name = f"{lead.name} {record.rank}"
    chain.before[name], chain.ranks[name] = bytes(lead.payload).decode(), record.rank
    await lead.commit(record, name.encode())
    chain.returned.append(name)
    if len(chain.returned) >= 25 and len({chain.ranks[name][0] for name in chain.returned}) >= 3:
        raise Enough


class Cuts:
    """Faults, and at some operations of anybody a cut of any connection, or of all of them at once."""

    def __init__(self, memory: MemoryBroker, faults: Faults, dice: Random) -> None:
        self._memory, self._faults, self._dice = memory, faults, dice

    def __call__(self, operation: Operation) -> Fault | None:
        luck = self._dice.random()
        if luck < 0.01 and self._memory.connections:
            self._dice.choice(self._memory.connections).abort()
        elif luck > 0.998:
            self._memory.stop()
            self._memory.start()
        return self._faults(operation)


async def contend(faulty: Broker, chain: Chain, seed: int) -> None:
    """Three who want to lead, until there are commits enough. Raises Enough."""
    try:
        async with asyncio.TaskGroup() as group:
            for me in "abc":
                group.create_task(lead_for_ever(faulty, me, chain, Random(f"{me} {seed}")))
    except* Enough as enough:
        raise Enough from enough


async def last_name(memory: MemoryBroker) -> str:
    """What the newest record says, as the next leader finds it."""
    connection = await memory.connect(AGGREGATOR, purpose="audit")
    lead = await Lead(connection, connection, TOPOLOGY, "audit", 5.0).acquire()
    return bytes(lead.payload).decode()


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 112))]
)
async def test_commits_form_one_chain_whoever_leads_and_whatever_breaks(seed: int) -> None:
    memory, chain = MemoryBroker(TOPOLOGY.access), Chain()
    rates = Rates(disconnect=0.01, delay=0.1, fail_publish=0.05, duplicate=0.05, hold_back=0.05)
    cuts = Cuts(memory, SeededFaults(seed, rates, longest_s=0.01), Random(f"cuts {seed}"))
    setup = await memory.connect(AGGREGATOR, purpose="setup")
    await setup.declare(*TOPOLOGY.aggregator_declarations())
    with suppress(Enough):
        async with asyncio.timeout(30):
            await contend(FaultyBroker(memory, cuts), chain, seed)
    memory.stop()  # whoever was cancelled while it closed its connection
    memory.start()
    committed = chain.back_from(await last_name(memory))
    assert len(chain.returned) >= 25
    assert set(chain.returned) <= set(committed)
    assert len({chain.before[name] for name in chain.returned}) == len(chain.returned)
    assert all(chain.ranks[newer] > chain.ranks[older] for newer, older in pairwise(committed))
