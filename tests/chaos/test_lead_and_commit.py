"""A leader and a standby, and a fault at every single await of lead and commit.

Whatever breaks, every update is counted exactly once and the model is the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from aggregator.history import History
from aggregator.settings import RunSettings
from broker.errors import BadMessage
from broker.faults import Fault, FaultAt, Faults, FaultyBroker, NoFaults, Operation
from broker.head import Decision, HeadRecord
from broker.memory import MemoryBroker
from broker.messages import UpdateReady
from broker.topology import AGGREGATOR, Topology
from broker.wire import decode
from tests.federation import Federation, names, settings

PARTICIPANTS, ROUNDS = 3, 2
RUN = settings(PARTICIPANTS, ROUNDS)
LARGE = settings(PARTICIPANTS, ROUNDS, broker={"inline_bytes": 0, "chunk_bytes": 1024})
STATEFUL = settings(PARTICIPANTS, 3, strategy={"name": "fedadam"}, broker={"inline_bytes": 0, "chunk_bytes": 4096})
ROBUST = settings(PARTICIPANTS, ROUNDS, round={"quorum": PARTICIPANTS}, strategy={"name": "geometric-median"})


@dataclass(frozen=True)
class Outcome:
    head: HeadRecord
    ledger: list[Decision]
    published: list[int]  # offsets of everything that is an update


async def run_with(
    faults: Faults,
    directory: Path,
    run: RunSettings = RUN,
    worker_faults: Faults | None = None,
    memory: MemoryBroker | None = None,
) -> Outcome:
    """One run with a leader and a standby behind `faults`; every wait of it ends within a minute."""
    memory = memory or MemoryBroker(Topology("default").access)
    federation = Federation(memory, directory, names(PARTICIPANTS), size=600)
    federation.heartbeat_s = 0.2
    if worker_faults is not None:
        federation.broker = FaultyBroker(memory, worker_faults)
    async with asyncio.timeout(60), federation.workers():
        federation.broker = FaultyBroker(memory, faults)
        aggregators = [asyncio.create_task(federation.aggregator(run).run()) for _ in range(2)]
        done, waiting = await asyncio.wait(aggregators, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        head = done.pop().result()
    published = await offsets_of_updates(memory)
    return Outcome(head, await asyncio.to_thread(ledger, directory), published)


def ledger(directory: Path) -> list[Decision]:
    with History(directory / "history.sqlite") as history:
        return history.ledger("run-1")


async def offsets_of_updates(broker: MemoryBroker) -> list[int]:
    reader = await broker.connect(AGGREGATOR, purpose="audit")
    inbox = await reader.read(Topology("default").updates, offset="first")
    offsets = []
    while (delivery := await inbox.get(0)) is not None:
        try:
            if isinstance(decode(delivery.body)[0], UpdateReady):
                offsets.append(delivery.offset)
        except BadMessage:
            offsets.append(delivery.offset)
    return offsets


def check(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.head.finished
    rounds = undisturbed.head.version
    assert outcome.head.version == rounds
    assert (
        outcome.head.model == undisturbed.head.model or outcome.head.model.sha256 == undisturbed.head.model.sha256
    )
    assert [body.sha256 for body in outcome.head.bodies] == [body.sha256 for body in undisturbed.head.bodies]
    counted = Counter((d.participant, d.task) for d in outcome.ledger if d.verdict == "counted")
    assert len(counted) == PARTICIPANTS * rounds
    assert set(counted.values()) == {1}
    last_read = outcome.head.updates_from
    assert sorted(d.offset for d in outcome.ledger) == [o for o in outcome.published if o < last_read]


def briefest(directory: Path, run: RunSettings) -> tuple[Outcome, NoFaults]:
    """Of some runs the one with the fewest operations. In others a standby begins to lead what is finished, before
    it is told to go."""
    watches = [NoFaults() for _ in range(5)]
    outcomes = [asyncio.run(run_with(watch, directory / f"{n}", run)) for n, watch in enumerate(watches)]
    return min(zip(outcomes, watches, strict=True), key=lambda pair: len(pair[1].operations))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, NoFaults]:
    return briefest(tmp_path_factory.mktemp("undisturbed"), LARGE)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("purpose", ["lead", "publish"])
@pytest.mark.parametrize("part", [0, 2, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 3))])
async def test_a_cut_at_every_operation_changes_nothing(
    undisturbed: tuple[Outcome, NoFaults], purpose: str, part: int, tmp_path: Path
) -> None:
    quiet, watch = undisturbed
    operations = watch.count(AGGREGATOR, purpose)
    assert operations > 70
    faults = [FaultAt(AGGREGATOR, purpose, index, Fault("disconnect")) for index in range(part, operations, 4)]
    for fault in faults:
        check(await run_with(fault, tmp_path / f"{fault.index}", LARGE), quiet)
    # A run may need some operations fewer than another: the fewer heartbeats it hears, the quicker it is.
    assert sum(fault.struck is None for fault in faults) <= 4


@pytest.fixture(scope="module")
def undisturbed_stateful(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, NoFaults]:
    return briefest(tmp_path_factory.mktemp("undisturbed"), STATEFUL)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("purpose", ["lead", "publish"])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
async def test_a_strategys_state_survives_a_cut_at_every_operation(
    undisturbed_stateful: tuple[Outcome, NoFaults], purpose: str, part: int, tmp_path: Path
) -> None:
    quiet, watch = undisturbed_stateful
    assert quiet.head.state
    for index in range(part, watch.count(AGGREGATOR, purpose), 8):
        fault = FaultAt(AGGREGATOR, purpose, index, Fault("disconnect"))
        check(await run_with(fault, tmp_path / f"{index}", STATEFUL), quiet)


@pytest.mark.parametrize("purpose", ["lead", "publish"])
async def test_a_strategy_that_collects_has_the_same_bits_after_a_cut(purpose: str, tmp_path: Path) -> None:
    """What it had collected is lost with the term, and collected again."""
    watch = NoFaults()
    quiet = await run_with(watch, tmp_path / "quiet", ROBUST)
    averaged = await run_with(NoFaults(), tmp_path / "averaged")
    assert quiet.head.model != averaged.head.model
    for index in range(3, watch.count(AGGREGATOR, purpose), 11):
        fault = FaultAt(AGGREGATOR, purpose, index, Fault("disconnect"))
        check(await run_with(fault, tmp_path / f"{index}", ROBUST), quiet)


@pytest.mark.timeout(600)
async def test_a_lost_confirm_or_publish_at_any_point_changes_nothing(
    undisturbed: tuple[Outcome, NoFaults], tmp_path: Path
) -> None:
    quiet, watch = undisturbed
    for index in (o.index for o in watch.operations if (o.name, o.purpose) == ("publish", "publish")):
        fault = FaultAt(AGGREGATOR, "publish", index, Fault("fail_publish"))
        check(await run_with(fault, tmp_path / f"{index}", LARGE), quiet)


class Freeze:
    """Stops the leader just before its n-th publish of a head record, for longer than it takes to be replaced.

    Its lead connection is lost meanwhile, its publishing connection is not: so it wakes up and publishes.
    """

    def __init__(self, memory: MemoryBroker, nth: int, seconds: float = 0.5) -> None:
        self._memory, self._nth, self._seconds = memory, nth, seconds
        self.woken: list[Operation] = []

    def __call__(self, operation: Operation) -> Fault | None:
        if operation.purpose != "publish" or operation.name != "publish" or not operation.target.endswith(".head"):
            return None
        if operation.when == "after" and self.woken:
            self.woken.append(operation)
        self._nth -= operation.when == "before"
        if self._nth != 0 or operation.when == "after":
            return None
        next(c for c in self._memory.connections if (c.user, c.purpose) == (AGGREGATOR, "lead")).abort()
        self.woken.append(operation)
        return Fault("delay", self._seconds)


@pytest.mark.parametrize("nth", range(3, 9))
async def test_a_former_leader_that_wakes_up_changes_nothing(
    undisturbed: tuple[Outcome, NoFaults], nth: int, tmp_path: Path
) -> None:
    quiet, _ = undisturbed
    memory = MemoryBroker(Topology("default").access)
    freeze = Freeze(memory, nth)
    outcome = await run_with(freeze, tmp_path, LARGE, memory=memory)
    check(outcome, quiet)
    assert len(freeze.woken) >= 2


class NoCommits:
    """Cuts every connection that would publish a head record once the first round is open, until it is `over`."""

    def __init__(self) -> None:
        self.over = False
        self.published = 0
        self.cuts = 0

    def __call__(self, operation: Operation) -> Fault | None:
        is_record = operation.name == "publish" and operation.target.endswith(".head")
        if not is_record or operation.when == "after":
            return None
        self.published += 1
        if self.over or self.published <= 6:  # two of genesis, then barrier, claim, first record, round 1 opened
            return None
        self.cuts += 1
        return Fault("disconnect")


async def test_no_deadline_fires_before_the_replay_has_read_everything(tmp_path: Path) -> None:
    """All three answered in time, but no leader could commit until long after the deadline: all three count."""
    run = settings(PARTICIPANTS, 1, round={"quorum": 1, "deadline_s": 0.5})
    faults = NoCommits()
    asyncio.get_running_loop().call_later(1.5, setattr, faults, "over", True)
    outcome = await run_with(faults, tmp_path, run)
    assert faults.cuts > 1
    assert [d.verdict for d in outcome.ledger] == ["counted"] * PARTICIPANTS
    assert outcome.head.closed
    assert outcome.head.closed.attempt == 1
