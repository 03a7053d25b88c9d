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
from broker.errors import BadMessage
from broker.faults import Fault, FaultAt, Faults, FaultyBroker, NoFaults
from broker.head import Decision, HeadRecord
from broker.memory import MemoryBroker
from broker.messages import UpdateReady
from broker.topology import AGGREGATOR, Topology
from broker.wire import decode
from tests.federation import Federation, names, settings

PARTICIPANTS, ROUNDS = 3, 2
RUN = settings(PARTICIPANTS, ROUNDS)
LARGE = settings(PARTICIPANTS, ROUNDS, broker={"inline_bytes": 0, "chunk_bytes": 1024})


@dataclass(frozen=True)
class Outcome:
    head: HeadRecord
    ledger: list[Decision]
    published: list[int]  # offsets of everything that is an update


async def run_with(faults: Faults, directory: Path, run=RUN, worker_faults: Faults | None = None) -> Outcome:
    """One run with a leader and a standby behind `faults`; every wait of it ends within a minute."""
    memory = MemoryBroker(Topology("default").access)
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
    with History(directory / "history.sqlite") as history:
        return Outcome(head, history.ledger("run-1"), published)


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
    assert outcome.head.version == ROUNDS
    assert (
        outcome.head.model == undisturbed.head.model or outcome.head.model.sha256 == undisturbed.head.model.sha256
    )
    counted = Counter((d.participant, d.task) for d in outcome.ledger if d.verdict == "counted")
    assert len(counted) == PARTICIPANTS * ROUNDS
    assert set(counted.values()) == {1}
    last_read = outcome.head.updates_from
    assert sorted(d.offset for d in outcome.ledger) == [o for o in outcome.published if o < last_read]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, NoFaults]:
    watch = NoFaults()
    return asyncio.run(run_with(watch, tmp_path_factory.mktemp("undisturbed"))), watch


@pytest.mark.parametrize("purpose", ["lead", "publish"])
@pytest.mark.timeout(600)
async def test_a_cut_at_every_operation_changes_nothing(undisturbed, purpose: str, tmp_path: Path) -> None:
    quiet, watch = undisturbed
    operations = watch.count(AGGREGATOR, purpose)
    assert operations > 50
    for index in range(operations):
        fault = FaultAt(AGGREGATOR, purpose, index, Fault("disconnect"))
        outcome = await run_with(fault, tmp_path / f"{index}")
        check(outcome, quiet)
        assert fault.struck
