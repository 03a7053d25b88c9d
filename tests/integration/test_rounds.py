"""Whole runs with participants that are slow, fail, vanish, come back, come late, or leave."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aggregator.settings import RunSettings
from broker.errors import BadMessage, ConfigError, StateError
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.messages import Leave, Message, TrainFailed, UpdateReady
from broker.tensors import Arrays
from broker.topology import AGGREGATOR, Topology
from broker.wire import decode
from tests.federation import Crowd, Federation, Pull, names, settings
from workers.task import TrainConfig, TrainResult, WorkAbandoned
from workers.trainer import Sizes

TOPOLOGY = Topology("default")
SLACK_S = 1.0  # a loaded machine is late, but not by more


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path, names(3))
    federation.heartbeat_s = 0.2
    return federation


@asynccontextmanager
async def running(federation: Federation, run: RunSettings, **options: object) -> AsyncIterator[Run]:
    """An aggregator at work, workers that come and go, and an end to all waiting."""
    async with asyncio.timeout(30), federation.crowd() as crowd:
        yield Run(crowd, asyncio.create_task(federation.aggregator(run, **options).run()))


@dataclass(frozen=True)
class Run:
    crowd: Crowd
    aggregator: asyncio.Task[HeadRecord]


async def said(federation: Federation, kind: type[Message]) -> list[tuple[str, Message]]:
    """Every message of that kind that participants sent, oldest first."""
    reader = await federation.broker.connect(AGGREGATOR, purpose="audit")
    inbox, found = await reader.read(TOPOLOGY.updates, offset="first"), []
    while (delivery := await inbox.get(0)) is not None:
        try:
            message, _ = decode(delivery.body)
        except BadMessage:
            continue
        if isinstance(message, kind):
            found.append((delivery.sender, message))
    await reader.close()
    return found


def digest(head: HeadRecord) -> str:
    assert head.model is not None
    return head.model.sha256


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest after four rounds of three participants with nothing in their way."""
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path_factory.mktemp("quiet"), names(3))
    return digest(asyncio.run(federation.run(settings(3, rounds=4))))


# -- slow ones and vanished ones ------------------------------------------------------------------------------


class Stubborn(Pull):
    """Takes its time and does not look whether that still makes sense."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name)
        self.seconds = seconds

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        time.sleep(self.seconds)
        return super().train(arrays, config)


async def test_rounds_close_at_the_deadline_with_the_quorum_whoever_is_slow_or_gone(
    federation: Federation,
) -> None:
    """Ten participants; p01 is five times slower than the deadline lets it be, p10 vanishes and returns."""
    deadline_s = 0.5
    run = settings(10, rounds=7, round={"quorum": 7, "deadline_s": deadline_s})
    federation.tasks["p01"] = Stubborn("p01", 5 * 0.15)
    async with running(federation, run) as (job):
        job.crowd.start("p01", "p10")
        job.crowd.start(*names(9)[1:], lag_s=0.1)
        await federation.closed(1)
        await job.crowd.vanish("p10")
        away_from = len(federation.reports)
        await federation.closed(4)
        back_at = len(federation.reports) + 1
        job.crowd.start("p10")
        head = await job.aggregator
    rounds = federation.reports
    assert len(rounds) == 7
    assert all(report.accepted >= 7 and report.attempt == 1 for report in rounds)
    assert all(report.duration_s < deadline_s + SLACK_S for report in rounds)
    ledger = await federation.ledger()
    late = Counter(line.participant for line in ledger if line.verdict == "late")
    assert late["p01"] >= 2
    assert sum(report.late for report in rounds) == late.total()
    assert sum(report.accepted for report in rounds) == sum(line.verdict == "counted" for line in ledger)
    # It finds the task that is current when it returns, no older one, and takes part again.
    returned = [number for number in federation.tasks["p10"].trained if number > away_from + 1]
    assert returned
    assert returned[0] >= back_at
    assert returned == list(range(returned[0], 8))
    assert ("p10", "counted") in {(line.participant, line.verdict) for line in ledger if line.task >= back_at}
    assert head.version == 7


async def test_rounds_close_on_the_target_and_nobody_waits_for_the_slow_one(federation: Federation) -> None:
    federation.tasks["p03"] = Stubborn("p03", 0.5)
    async with running(federation, settings(3, rounds=8, round={"target": 2})) as job:
        job.crowd.start("p03")
        job.crowd.start("p01", "p02", lag_s=0.1)
        await job.aggregator
    assert all(report.accepted == 2 for report in federation.reports)
    assert all(report.duration_s < 0.4 + SLACK_S for report in federation.reports)
    late = [line for line in await federation.ledger() if line.verdict == "late"]
    assert {line.participant for line in late} == {"p03"}
    assert all((line.weight, line.staleness > 0) == (0, True) for line in late)


class Step(Pull):
    """Adds the same to every value, so that the model tells whose updates are in it, and with which weight."""

    def __init__(self, by: float) -> None:
        super().__init__("p00")
        self.by = by

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        return TrainResult({"w": arrays["w"] + np.float32(self.by), "steps": arrays["steps"]}, 1000)


async def test_late_updates_fold_with_a_weight_damped_by_staleness(federation: Federation) -> None:
    federation.tasks |= {"p01": Step(0.0), "p02": Step(0.0), "p03": Step(1.0)}
    run = settings(3, rounds=10, round={"target": 2, "late": "fold"})
    async with running(federation, run) as job:
        job.crowd.start("p03", lag_s=0.5)
        job.crowd.start("p01", "p02", lag_s=0.1)
        head = await job.aggregator
    ledger = await federation.ledger()
    late = [line for line in ledger if line.verdict == "late"]
    assert {line.participant for line in late} == {"p03"}
    assert all(line.weight == round(1000 / math.sqrt(1 + line.staleness)) for line in late)
    assert max(line.staleness for line in late) >= 2
    # Each fold moves the model by its share of the round it came in: with two updates of 1000 examples.
    expected = sum(line.weight / (2000 + line.weight) for line in late)
    model = await asyncio.to_thread(lambda: _load(federation, head))
    assert model["w"] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < len(late)


def _load(federation: Federation, head: HeadRecord) -> Arrays:
    from broker.tensors import decode as read

    return read((federation.directory / "checkpoints" / f"{digest(head)}.safetensors").read_bytes())
