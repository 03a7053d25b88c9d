"""Asynchronous runs, whole and in virtual time: FedBuff and FedAsync with participants that are slow, come late,
fail or go."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from aggregator.settings import RunSettings
from broker import tensors
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.tensors import Arrays
from broker.topology import AGGREGATOR, Topology
from fluffle.virtual import AtOnce, VirtualLoop
from tests.federation import Crowd, Federation, Step, counted, fedbuff, names, settings
from workers.lane import Lane

TOPOLOGY = Topology("default")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    found = Federation(MemoryBroker(TOPOLOGY.access), tmp_path, names(4))
    found.tasks = {name: Step() for name in names(4)}
    found.thread = Lane("train", AtOnce("train"))
    return found


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**given: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(**given))

    return run


@asynccontextmanager
async def running(
    federation: Federation, run: RunSettings
) -> AsyncIterator[tuple[Crowd, asyncio.Task[HeadRecord]]]:
    federation.clock = asyncio.get_running_loop().time
    connection = await federation.broker.connect(AGGREGATOR, purpose="audit")
    await connection.declare(*TOPOLOGY.aggregator_declarations())
    async with asyncio.timeout(600), federation.crowd() as crowd:
        yield crowd, asyncio.create_task(federation.aggregator(run).run())


def buffered(rounds: int, buffer: int, **sections: dict[str, object]) -> RunSettings:
    wanted = {"policy": "buffered", "buffer": buffer, **sections.pop("round", {})}
    return settings(wanted.pop("participants", 4), rounds, round=wanted, **sections)


async def model_of(federation: Federation, head: HeadRecord) -> Arrays:
    assert head.model is not None
    path = federation.directory / "checkpoints" / f"{head.model.sha256}.safetensors"
    return tensors.decode(await asyncio.to_thread(path.read_bytes))


@in_virtual_time
async def test_versions_keep_the_pace_of_the_fast_and_the_slow_one_counts_damped(federation: Federation) -> None:
    async with running(federation, buffered(30, 2)) as (crowd, leader):
        crowd.start("p04", lag_s=1.0)
        crowd.start("p01", "p02", "p03", lag_s=0.02)
        head = await leader
    ledger = await federation.ledger()
    assert head.version == 30
    assert all(len(counted(ledger, version)) == 2 for version in range(1, 31))
    assert (
        sum(report.duration_s for report in federation.reports) < 10
    )  # thirty times a second, if it were waited for
    slow = [line for line in ledger if line.participant == "p04"]
    assert all(line.staleness >= 5 for line in slow)
    model = await model_of(federation, head)
    assert model["w"] == pytest.approx(fedbuff(ledger, 30), rel=1e-5)


@in_virtual_time
async def test_a_slow_update_is_damped_by_the_versions_that_were_made_meanwhile(federation: Federation) -> None:
    async with running(federation, buffered(14, 2, round={"participants": 3, "staleness_max": 900})) as (
        crowd,
        leader,
    ):
        crowd.start("p04", lag_s=0.3)
        crowd.start("p01", "p02", lag_s=0.05)
        head = await leader
    ledger = await federation.ledger()
    stale = [line for line in ledger if line.participant == "p04" and line.verdict == "counted"]
    assert stale
    assert max(line.staleness for line in stale) >= 2
    assert all(line.weight == 1 for line in ledger if line.verdict == "counted")
    model = await model_of(federation, head)
    assert model["w"] == pytest.approx(fedbuff(ledger, 14), rel=1e-5)
    undamped = sum(len(counted(ledger, version)) / 2 for version in range(1, 15))
    assert fedbuff(ledger, 14) < undamped - 0.1


@in_virtual_time
async def test_what_is_too_old_never_counts_and_its_sender_goes_on(federation: Federation) -> None:
    run = buffered(40, 1, round={"participants": 3, "staleness_max": 5})
    async with running(federation, run) as (crowd, leader):
        crowd.start("p04", lag_s=0.2)
        crowd.start("p01", "p02", lag_s=0.05)
        await leader
    slow = [line for line in await federation.ledger() if line.participant == "p04"]
    assert {(line.verdict, line.weight) for line in slow} == {("late", 0)}
    told = [line for line in slow if "versions old, more than round.staleness_max = 5" in line.reason]
    assert len(told) >= 3
    assert all(line.staleness > 5 for line in told)


@in_virtual_time
async def test_one_alone_fills_the_buffer_with_turns_of_its_own_and_each_has_its_own_seed(
    federation: Federation,
) -> None:
    """As far as round.turns lets it: the others are far too slow."""
    async with running(federation, buffered(3, 4, round={"turns": 4})) as (crowd, leader):
        crowd.start("p02", "p03", "p04", lag_s=20.0)
        crowd.start("p01", lag_s=0.01)
        head = await leader
    tasks = [line.task for line in await federation.ledger() if line.participant == "p01"]
    assert len(tasks) == len(set(tasks)) == 12
    assert head.version == 3
    assert len(set(federation.tasks["p01"].seeds)) == len(federation.tasks["p01"].seeds) >= 12


@in_virtual_time
async def test_only_some_work_at_a_time_and_the_places_go_round(federation: Federation) -> None:
    async with running(federation, buffered(12, 2, round={"concurrency": 2})) as (crowd, leader):
        crowd.start(*names(4), lag_s=0.02)
        head = await leader
    assert head.version == 12
    by = Counter(line.participant for line in await federation.ledger() if line.verdict == "counted")
    assert set(by) == set(names(4))
    assert by.total() == 24


@in_virtual_time
async def test_a_failure_costs_nobody_else_anything(federation: Federation) -> None:
    federation.tasks["p02"] = Step(fails=2)
    async with running(federation, buffered(8, 3)) as (crowd, leader):
        crowd.start(*names(4), lag_s=0.03)
        head = await leader
    assert head.version == 8
    assert any(line.participant == "p02" for line in await federation.ledger() if line.verdict == "counted")


@in_virtual_time
async def test_who_comes_in_the_middle_takes_part_at_once(federation: Federation) -> None:
    async with running(federation, buffered(10, 4, round={"participants": 2})) as (crowd, leader):
        crowd.start("p01", "p02", lag_s=0.05)
        await federation.closed(2)
        crowd.start("p03", lag_s=0.05)
        await leader
    ledger = await federation.ledger()
    first = min(line.version for line in ledger if line.participant == "p03" and line.verdict == "counted")
    assert 3 <= first <= 5


@in_virtual_time
async def test_fedasync_mixes_the_model_that_was_trained_into_what_there_is_now(federation: Federation) -> None:
    strategy = {"name": "fedasync", "server_lr": 0.5}
    run = buffered(12, 1, strategy=strategy, round={"participants": 3, "staleness_max": 900})
    async with running(federation, run) as (crowd, leader):
        crowd.start("p04", lag_s=0.2)
        crowd.start("p01", "p02", lag_s=0.05)
        head = await leader
    ledger = await federation.ledger()
    x = [0.0]
    for version in range(1, 13):
        [line] = counted(ledger, version)
        trained = x[version - 1 - line.staleness] + 1.0
        mixing = 0.5 / math.sqrt(1 + line.staleness)
        x.append((1 - mixing) * x[-1] + mixing * trained)
    assert max(line.staleness for line in ledger) >= 2
    assert (await model_of(federation, head))["w"] == pytest.approx(x[-1], rel=1e-5)


@in_virtual_time
async def test_momentum_at_the_aggregator_takes_the_mean_of_the_buffer(federation: Federation) -> None:
    run = buffered(6, 2, strategy={"name": "fedavgm", "momentum": 0.5}, round={"participants": 2})
    async with running(federation, run) as (crowd, leader):
        crowd.start("p01", "p02", lag_s=0.02)
        head = await leader
    ledger, x, v = await federation.ledger(), 0.0, 0.0
    for version in range(1, 7):
        v = 0.5 * v + sum(1 / math.sqrt(1 + line.staleness) for line in counted(ledger, version)) / 2
        x += v
    assert (await model_of(federation, head))["w"] == pytest.approx(x, rel=1e-5)


@in_virtual_time
async def test_the_next_leader_makes_the_same_versions_of_what_came_meanwhile(federation: Federation) -> None:
    """It reads more than one buffer's worth, and no version takes more than K."""
    async with running(federation, buffered(40, 2)) as (crowd, leader):
        crowd.start(*names(4), lag_s=0.02)
        await federation.closed(5)
        leader.cancel()
        await asyncio.wait([leader])
        await asyncio.sleep(0.3)  # each has one that nobody reads
        head = await federation.aggregator(buffered(40, 2)).run()
    ledger = await federation.ledger()
    assert all(len(counted(ledger, version)) == 2 for version in range(1, 41))
    once = Counter((line.participant, line.task) for line in ledger if line.verdict == "counted")
    assert set(once.values()) == {1}
    assert (await model_of(federation, head))["w"] == pytest.approx(fedbuff(ledger, 40), rel=1e-5)
