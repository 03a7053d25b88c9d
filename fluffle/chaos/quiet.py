"""The same run with nothing in the way: in this process, on the embedded broker. Its digest is the one to meet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from aggregator.daemon import Aggregator
from aggregator.job import Job, Surroundings
from aggregator.settings import RunSettings
from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR, Topology
from workers.journal import MemoryJournal
from workers.task import LearningTask
from workers.tasks import find_object
from workers.worker import Site, Worker, always


def undisturbed_sha256(run: RunSettings, participants: Sequence[str], directory: Path) -> str:
    """The digest of the last global model."""
    return asyncio.run(_run(run, participants, directory))


async def _run(run: RunSettings, participants: Sequence[str], directory: Path) -> str:
    topology = Topology(run.federation)
    broker = MemoryBroker(topology.access)
    connection = await broker.connect(AGGREGATOR, purpose="set up")
    await connection.declare(*topology.aggregator_declarations())
    make = find_object(run.learning_task)
    workers = [_worker(name, make(name, ""), broker, topology) for name in participants]
    quiet = Surroundings(on_report=lambda _: None, on_notice=lambda *_: None)
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run())
        record = await Aggregator(Job(run, make(AGGREGATOR, "").initial), broker, directory, quiet).run()
        for worker in workers:
            worker.stop()
    await connection.close()
    assert record.model
    return record.model.sha256


def _worker(name: str, task: LearningTask, broker: MemoryBroker, topology: Topology) -> Worker:
    return Worker(Site(name, always(task), MemoryJournal()), broker, topology)
