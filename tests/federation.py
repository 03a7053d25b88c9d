"""A whole federation in one process, for tests: real aggregator, real workers, a learning task without torch."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aggregator.daemon import Aggregator
from aggregator.history import History, RoundReport
from aggregator.job import Job, Surroundings
from aggregator.settings import (
    BrokerSettings,
    CodecSettings,
    EvaluationSettings,
    PersonalSettings,
    RoundSettings,
    RunSettings,
    StopSettings,
    StoreSettings,
    StrategySettings,
)
from broker.head import Decision, HeadRecord
from broker.memory import MemoryBroker
from broker.store import Store
from broker.tensors import Arrays
from broker.topology import Topology
from broker.transport import Broker
from fluffle.chaos.task import Pull
from workers.journal import Journal, MemoryJournal
from workers.lane import Lane
from workers.link import WorkerSettings
from workers.task import TrainConfig, TrainResult
from workers.trainer import Sizes
from workers.transfer import TransferStatus
from workers.worker import Site, Worker, always


class Step(Pull):
    """Adds the same to every value, so that the ledger tells what the model must be."""

    def __init__(self, by: float = 1.0, fails: int = 0) -> None:
        super().__init__("p00")
        self.by, self.fails = by, fails
        self.seeds: list[int] = []

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no data yet")
        self.seeds.append(config.seed)
        return TrainResult({"w": arrays["w"] + np.float32(self.by), "steps": arrays["steps"]}, 1000)


def counted(ledger: Sequence[Decision], version: int) -> list[Decision]:
    """What went into a version."""
    return [line for line in ledger if line.verdict == "counted" and line.version == version]


def fedbuff(ledger: Sequence[Decision], versions: int) -> float:
    """What FedBuff (Algorithm 1) makes of `Step`s: x <- x + sum of s(tau) over the buffer / K."""
    x = 0.0
    for version in range(1, versions + 1):
        buffer = counted(ledger, version)
        x += sum(1 / math.sqrt(1 + line.staleness) for line in buffer) / len(buffer)
    return x


def names(count: int) -> list[str]:
    return [f"p{i:02d}" for i in range(1, count + 1)]


def settings(
    participants: int, rounds: int = 3, *, run_id: str = "run-1", **sections: dict[str, object]
) -> RunSettings:
    """Short waits; `round={...}`, `evaluation={...}`, ... override single settings."""
    return RunSettings(
        run_id=run_id,
        round=RoundSettings(participants=participants, **{"deadline_s": 30.0, **sections.get("round", {})}),
        stop=StopSettings(rounds=rounds, **sections.get("stop", {})),
        evaluation=EvaluationSettings(**{"mode": "none", **sections.get("evaluation", {})}),
        strategy=StrategySettings(**sections.get("strategy", {})),
        personal=PersonalSettings(**sections.get("personal", {})),
        codec=CodecSettings(**sections.get("codec", {})),
        broker=BrokerSettings(**{"patience_s": 5.0, **sections.get("broker", {})}),
        store=StoreSettings(**sections.get("store", {})),
    )


@dataclass
class Federation:
    """Broker, run directory and participants; aggregators and workers are started from it."""

    broker: Broker
    directory: Path
    participants: list[str]
    size: int = 7
    heartbeat_s: float = 0.5
    sizes: Sizes = field(default_factory=Sizes)
    topology: Topology = field(default_factory=lambda: Topology("default"))
    tasks: dict[str, Pull] = field(default_factory=dict)
    journals: dict[str, Journal] = field(default_factory=dict)
    store: Store | None = None
    thread: Lane | None = None  # that all participants train in; None: each has its own
    clock: Callable[[], float] = time.time
    patience_s: float = 5.0
    reports: list[RoundReport] = field(default_factory=list)
    transfers: dict[str, list[TransferStatus]] = field(default_factory=dict)
    _closed: asyncio.Event = field(default_factory=asyncio.Event)

    def job(self, run: RunSettings, **options: object) -> Job:
        run = run.model_copy(update={"federation": self.topology.federation})
        return Job(run, initial=Pull("p00", self.size).initial, **options)  # type: ignore[arg-type]

    def aggregator(self, run: RunSettings, around: Surroundings | None = None, **options: object) -> Aggregator:
        around = around or Surroundings(clock=self.clock, on_report=self.on_report, store=self.store)
        return Aggregator(self.job(run, **options), self.broker, self.directory, around)

    def worker(
        self, name: str, lag_s: Callable[..., float] = lambda *_: 0.0, broker: Broker | None = None
    ) -> Worker:
        task = self.tasks.setdefault(name, Pull(name, self.size))
        journal = self.journals.setdefault(name, MemoryJournal())
        settings = WorkerSettings(
            self.heartbeat_s, patience_s=self.patience_s, retry_s=0.2, sizes=self.sizes, lag_s=lag_s,
            on_transfer=lambda name, status: self.transfers.setdefault(name, []).append(status),
        )  # fmt: skip
        site = Site(name, always(task), journal, self.thread or Lane("train"), self.store)
        return Worker(site, broker or self.broker, self.topology, settings)

    def on_report(self, report: RoundReport) -> None:
        self.reports.append(report)
        self._closed.set()

    async def closed(self, count: int) -> None:
        """Returns once so many rounds and evaluations closed."""
        while len(self.reports) < count:
            self._closed.clear()
            await self._closed.wait()

    @asynccontextmanager
    async def crowd(self) -> AsyncIterator[Crowd]:
        """Workers that come and go one by one; who is still there when the block ends is stopped."""
        async with asyncio.TaskGroup() as group:
            crowd = Crowd(self, group)
            try:
                yield crowd
            finally:
                for worker in crowd.workers.values():
                    worker.stop()

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[list[Worker]]:
        """All participants' workers, running until the block ends."""
        workers = [self.worker(name) for name in self.participants]
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker.run())
            yield workers
            for worker in workers:
                worker.stop()

    async def ledger(self, run_id: str = "run-1") -> list[Decision]:
        """The fate of everything that arrived, as the history tells it."""

        def read() -> list[Decision]:
            with History(self.directory / "history.sqlite") as history:
                return history.ledger(run_id)

        return await asyncio.to_thread(read)

    async def run(self, run: RunSettings, **options: object) -> HeadRecord:
        """One undisturbed run."""
        async with self.workers():
            return await self.aggregator(run, **options).run()


@dataclass
class Crowd:
    """Workers, each running in a task of its own."""

    federation: Federation
    group: asyncio.TaskGroup
    workers: dict[str, Worker] = field(default_factory=dict)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def start(self, *participants: str, lag_s: float = 0.0) -> None:
        """Starts a worker for each, or another one after the first is gone. `lag_s`: how long it seems to train."""
        for name in participants:
            worker = self.workers[name] = self.federation.worker(name, lambda *_: lag_s)
            self.running[name] = self.group.create_task(worker.run(), name=name)

    async def stop(self, name: str) -> None:
        """Asks a worker to stop and waits until it has."""
        self.workers[name].stop()
        await self.running[name]

    async def vanish(self, name: str) -> None:
        """The process is killed: its connections break and nothing more comes from it."""
        assert isinstance(self.federation.broker, MemoryBroker)
        for connection in self.federation.broker.connections:
            if connection.user == name:
                connection.abort()
        del self.workers[name]
        self.running[name].cancel()
        await asyncio.wait([self.running.pop(name)])
