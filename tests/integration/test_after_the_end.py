"""What arrives when a run is over is counted nowhere, and the ledger says so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from aggregator.history import RoundReport
from aggregator.job import Surroundings
from broker.head import Decision, HeadRecord
from broker.memory import MemoryBroker
from broker.messages import UpdateReady
from broker.topology import Topology
from broker.wire import encode
from tests.federation import Federation, names, settings

TOPOLOGY = Topology("default")
RUN = settings(3, rounds=1)
LATE = ("p04", 1, "late", 0, 0)
AGAIN = ("p01", 1, "duplicate", 0, 0)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(MemoryBroker(TOPOLOGY.access), tmp_path / "1", names(3))


async def publish(federation: Federation, participant: str, base_sha256: str) -> None:
    """An answer to the first task."""
    update = UpdateReady(
        participant=participant, run_id="run-1", epoch=1, task=1, base_sha256=base_sha256, arrays="none",
        num_examples=1,
    )  # fmt: skip
    connection = await federation.broker.connect(participant, purpose="publish")
    await connection.publish(TOPOLOGY.up, f"{participant}.update", encode(update))
    await connection.close()


def first_model(record: HeadRecord) -> str:
    return record.lineage[0][2]


def fates(lines: list[Decision]) -> list[tuple[str, int, str, int, int]]:
    return [(d.participant, d.task, d.verdict, d.weight, d.version) for d in lines]


def records_in(checkpoints: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text())["head"] for path in sorted(checkpoints.glob("v*.json"))]


async def test_the_ledger_tells_into_which_version_an_update_went(federation: Federation) -> None:
    await federation.run(settings(3, rounds=2))
    counted = [("p01", 10, 1), ("p02", 10, 1), ("p03", 10, 1), ("p01", 10, 2), ("p02", 10, 2), ("p03", 10, 2)]
    lines = [(d.participant, d.weight, d.version) for d in await federation.ledger()]
    assert sorted(lines) == sorted(counted)


async def test_what_comes_while_the_leader_takes_its_leave_is_late(federation: Federation) -> None:
    sent: list[asyncio.Task[None]] = []

    def on_report(report: RoundReport) -> None:
        sent.append(asyncio.create_task(publish(federation, "p04", report.model_sha256)))

    async with federation.workers():
        head = await federation.aggregator(RUN, Surroundings(on_report=on_report)).run()
    await asyncio.gather(*sent)
    last = (await federation.ledger())[-1]
    assert (last.participant, last.verdict) == ("p04", "refused"), "version 1 is no base of task 1"
    assert head.updates_from > last.offset


async def test_whoever_leads_next_reads_what_came_after_the_end(federation: Federation) -> None:
    head = await federation.run(RUN)
    for participant in ("p04", "p01", "p04"):
        await publish(federation, participant, first_model(head))
    after = await federation.aggregator(RUN).run()
    assert fates(await federation.ledger())[3:] == [LATE, AGAIN, ("p04", 1, "duplicate", 0, 0)]
    assert (after.model, after.round, after.finished) == (head.model, head.round, head.finished)
    await federation.aggregator(RUN).run()
    assert len(await federation.ledger()) == 6, "it is read once"


async def test_the_next_runs_leader_reads_it_too(federation: Federation, tmp_path: Path) -> None:
    """It has another run directory; the manifests in there stay its own."""
    head = await federation.run(RUN)
    await publish(federation, "p04", first_model(head))
    federation.directory = tmp_path / "2"
    await federation.run(settings(3, rounds=2, run_id="run-2"))
    assert fates(await federation.ledger("run-1")) == [LATE]
    assert [verdict for _, _, verdict, _, _ in fates(await federation.ledger("run-2"))] == ["counted"] * 6
    records = await asyncio.to_thread(records_in, tmp_path / "2" / "checkpoints")
    assert {record["run_id"] for record in records} == {"run-2"}
    assert records[-1]["version"] == 2, "the newest is there; those between need not be"
