"""A worker that is killed in the middle of a long training goes on from where it last saved, with the same bits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from aggregator.settings import RunSettings
from broker.errors import TaskError
from broker.memory import MemoryBroker
from broker.tensors import Arrays
from broker.topology import Topology
from fluffle.chaos.processes import LEADER
from fluffle.chaos.task import STEPS, STEPWISE_TASK, Gate, Pace, Stepwise
from tests.federation import Federation, names, settings
from tests.processes import deployment
from tests.rabbit_node import Rabbit
from workers.journal import FileJournal, Journal, MemoryJournal
from workers.link import WorkerSettings
from workers.progress import Progress
from workers.task import TrainConfig, TrainResult
from workers.worker import Site, Worker, always

PARTICIPANTS, ROUNDS, MIDDLE = 3, 4, 2
RUN = settings(PARTICIPANTS, ROUNDS, round={"deadline_s": 250.0}, broker={"patience_s": 20.0})


class Died(BaseException):
    """The process is gone."""


class Dying(FileJournal):
    """Its process dies right after the n-th save."""

    def __init__(self, directory: Path, nth: int) -> None:
        super().__init__(directory)
        self.nth = nth
        self.saved: list[str] = []

    def save_progress(self, progress: Progress) -> bool:
        super().save_progress(progress)
        self.saved.append(progress.of.split(" ")[1])
        if len(self.saved) == self.nth:
            raise Died
        return True


def federation(directory: Path) -> Federation:
    broker = MemoryBroker(Topology("default").access)
    joined = Federation(broker, directory, names(PARTICIPANTS), heartbeat_s=0.2)
    joined.tasks = {name: Stepwise(name, Pace()) for name in names(PARTICIPANTS)}
    return joined


@dataclass
class Mortal:
    """The worker of p03. It dies once, and another process takes its place, which knows only the disk."""

    crowd: Federation
    journal: Journal
    directory: Path
    task: Stepwise = field(default_factory=lambda: Stepwise("p03", Pace()))

    def worker(self, journal: Journal) -> Worker:
        waits = WorkerSettings(0.2, patience_s=5.0, retry_s=0.1)
        site = Site("p03", always(self.task), journal)
        return Worker(site, self.crowd.broker, self.crowd.topology, waits)

    async def run(self) -> None:
        self.now = self.worker(self.journal)
        try:
            await self.now.run()
        except* Died:
            for connection in self.crowd.broker.connections:  # type: ignore[attr-defined]
                if connection.user == "p03":
                    connection.abort()
            self.journal = Dying(self.directory, 0)
            self.now = self.worker(self.journal)
            await self.now.run()


async def model_of(mortal: Mortal, run: RunSettings) -> str:
    mortal.crowd.participants = names(2)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group, mortal.crowd.workers():
        running = group.create_task(mortal.run())
        head = await mortal.crowd.aggregator(run).run()
        mortal.now.stop()
        await running
    assert head.model
    return head.model.sha256


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    quiet = tmp_path_factory.mktemp("quiet")
    return asyncio.run(model_of(Mortal(federation(quiet), MemoryJournal(), quiet), RUN))


@pytest.mark.parametrize("step", range(1, STEPS + 1))
async def test_killed_at_each_save_no_step_is_taken_twice(tmp_path: Path, undisturbed: str, step: int) -> None:
    mortal = Mortal(federation(tmp_path), Dying(tmp_path / "p03", STEPS + step), tmp_path / "p03")
    assert await model_of(mortal, RUN) == undisturbed
    assert isinstance(mortal.journal, Dying)
    assert mortal.journal.saved.count("2") == STEPS - step
    assert not await asyncio.to_thread((tmp_path / "p03" / "progress.saved").exists)


async def test_without_its_file_it_begins_again_with_the_same_bits(tmp_path: Path, undisturbed: str) -> None:
    class Lost(Dying):
        def save_progress(self, progress: Progress) -> bool:
            try:
                return super().save_progress(progress)
            finally:
                self._progress.unlink()

    mortal = Mortal(federation(tmp_path), Lost(tmp_path / "p03", STEPS + 3), tmp_path / "p03")
    assert await model_of(mortal, RUN) == undisturbed
    assert isinstance(mortal.journal, Dying)
    assert mortal.journal.saved.count("2") == STEPS


async def test_progress_of_another_run_is_not_used(tmp_path: Path, undisturbed: str) -> None:
    journal = Dying(tmp_path / "p03", 0)
    wrong = {"w": np.ones(7, np.float32), "step": np.array(STEPS - 1)}
    await asyncio.to_thread(journal.save_progress, Progress(f"run-0 1 {'a' * 64}", 1.0, wrong))
    mortal = Mortal(federation(tmp_path), journal, tmp_path / "p03")
    assert await model_of(mortal, RUN) == undisturbed


class Unable(Stepwise):
    """It cannot go on from its own progress."""

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        if config.resume:
            raise TaskError("what is that?")
        return super().train(arrays, config)


async def test_progress_that_a_task_fails_on_is_dropped(tmp_path: Path, undisturbed: str) -> None:
    """Else it would fail for ever."""
    mortal = Mortal(federation(tmp_path), Dying(tmp_path / "p03", 3), tmp_path / "p03", Unable("p03", Pace()))
    run = settings(PARTICIPANTS, ROUNDS, round={"deadline_s": 1.0})
    assert await model_of(mortal, run) == undisturbed


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.timeout(120)
def test_kill_9_over_rabbitmq(rabbit: Rabbit, tmp_path: Path, undisturbed: str) -> None:
    """It waits in the middle of its training until it is killed, and the next process does the second half only."""
    with deployment(rabbit, tmp_path) as there, Gate(tmp_path / "gate") as gate:
        there.set_up()
        there.aggregator(RUN)
        for name in ("p01", "p02"):
            there.worker(name, task=STEPWISE_TASK)
        worker = there.worker("p03", pace=gate.pace(MIDDLE), task=STEPWISE_TASK)
        heard = 0
        for _ in range(STEPS // 2):
            heard = worker.log.events.index(worker.wait_for("progress_saved", task=MIDDLE, first=heard)) + 1
        worker.kill()
        worker.start().wait_for("training_resumed", task=MIDDLE)
        worker.wait_for("work_done", task=MIDDLE)
        assert len(worker.all("progress_saved", task=MIDDLE)) == STEPS // 2
        gate.open()
        assert there.processes[LEADER].result()["model_sha256"] == undisturbed
