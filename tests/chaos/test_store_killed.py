"""Leaders that die at any use of the claim-check store, or at any moment while one is used.

Whatever breaks, every update is counted exactly once, the model is the undisturbed run's, bit for bit, and nothing
that a leader still needs is deleted.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path

import pytest

from broker.faults import Fault, FaultAt, FaultyBroker, NoFaults
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.objects import Folder
from broker.store import Store
from broker.topology import AGGREGATOR, Topology
from fluffle.chaos.task import Gate
from tests.federation import Federation, names, settings
from tests.processes import deployment
from tests.rabbit_node import Rabbit
from tests.stores import OnceAt, Watched, nothing
from workers.trainer import Sizes

PART = 64 << 10
PARTICIPANTS, ROUNDS, SIZE = 3, 3, 40_000  # values: three parts
RUN = settings(
    PARTICIPANTS, ROUNDS, broker={"inline_bytes": 0}, store={"part_bytes": PART, "orphan_s": 0.001}
)  # what is no use goes as soon as it may


def federation(share: Path, directory: Path) -> Federation:
    return Federation(
        MemoryBroker(Topology("default").access), directory, names(PARTICIPANTS), size=SIZE, heartbeat_s=0.2,
        sizes=Sizes(inline_bytes=0, part_bytes=PART), store=Store(Folder(share), "share"),
    )  # fmt: skip


async def check(there: Federation, head: HeadRecord, digest: str) -> None:
    assert head.finished
    assert head.model is not None
    assert (head.version, head.model.sha256) == (ROUNDS, digest)
    counted = Counter((d.participant, d.task) for d in await there.ledger() if d.verdict == "counted")
    assert counted == {(name, task): 1 for name in names(PARTICIPANTS) for task in range(1, ROUNDS + 1)}
    assert {d.verdict for d in await there.ledger()} == {"counted"}  # nothing was missing, nothing came twice


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, NoFaults]:
    """The model's digest, how often the leader used the store, and what it asked of the broker."""
    directory, watch = tmp_path_factory.mktemp("undisturbed"), NoFaults()
    (directory / "share").mkdir()
    there = federation(directory / "share", directory)
    leaders = Watched(Folder(directory / "share"), nothing)

    async def run() -> HeadRecord:
        async with asyncio.timeout(60), there.workers():
            there.broker, there.store = FaultyBroker(there.broker, watch), leaders.store()
            return await there.aggregator(RUN).run()

    head = asyncio.run(run())
    assert head.model is not None
    return head.model.sha256, len(leaders.touches), watch


EIGHTHS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", EIGHTHS)
async def test_a_leader_killed_at_every_use_of_the_store_changes_nothing(
    undisturbed: tuple[str, int, NoFaults], part: int, tmp_path: Path
) -> None:
    """Before and after every write, read, look and deletion: also between a model's last part and its commit."""
    digest, touches, _ = undisturbed
    assert touches > 80
    for nth in range(part, touches, 8):
        share = tmp_path / f"share-{nth}"
        await asyncio.to_thread(share.mkdir)
        there = federation(share, tmp_path / f"{nth}")
        async with asyncio.timeout(60), there.workers():
            head = await killed_at(there, share, nth)
        await check(there, head, digest)


async def killed_at(there: Federation, share: Path, nth: int) -> HeadRecord:
    """The first leader dies at its n-th use of the store; the next one uses it undisturbed."""
    loop, struck, dead = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def die() -> None:
        loop.call_soon_threadsafe(struck.set)
        dead.wait(30)
        raise OSError("killed")

    own, there.store = there.store, Watched(Folder(share), OnceAt(nth, die)).store()
    first, kill = asyncio.create_task(there.aggregator(RUN).run()), asyncio.create_task(struck.wait())
    await asyncio.wait([first, kill], return_when=asyncio.FIRST_COMPLETED)
    there.store = own
    if first.done():  # it needed the store less often this time
        kill.cancel()
        return first.result()
    first.cancel()
    dead.set()
    await asyncio.wait([first])
    return await there.aggregator(RUN).run()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("purpose", ["lead", "publish"])
async def test_a_cut_at_every_operation_on_the_broker_changes_nothing(
    undisturbed: tuple[str, int, NoFaults], purpose: str, tmp_path: Path
) -> None:
    digest, _, watch = undisturbed
    for index in range(watch.count(AGGREGATOR, purpose)):
        share = tmp_path / f"share-{index}"
        await asyncio.to_thread(share.mkdir)
        there = federation(share, tmp_path / f"{index}")
        async with asyncio.timeout(60), there.workers():
            there.broker = FaultyBroker(there.broker, FaultAt(AGGREGATOR, purpose, index, Fault("disconnect")))
            head = await there.aggregator(RUN).run()
        await check(there, head, digest)


@pytest.mark.timeout(300)
async def test_a_former_leader_that_wakes_up_deletes_nothing_that_is_needed(
    undisturbed: tuple[str, int, NoFaults], tmp_path: Path
) -> None:
    """It is frozen in the middle of a deletion, while its successor goes on for two rounds; then it deletes on."""
    digest, _, _ = undisturbed
    for nth in range(6):
        share = tmp_path / f"share-{nth}"
        await asyncio.to_thread(share.mkdir)
        there = federation(share, tmp_path / f"{nth}")
        async with asyncio.timeout(60), there.workers():
            head = await frozen_at(there, share, nth)
        await check(there, head, digest)


async def frozen_at(there: Federation, share: Path, nth: int) -> HeadRecord:
    memory, own = there.broker, there.store
    assert isinstance(memory, MemoryBroker)
    loop, struck, woken = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def freeze() -> None:
        loop.call_soon_threadsafe(struck.set)
        woken.wait(30)

    deletes = OnceAt(nth, freeze, lambda touch: (touch.name, touch.when) == ("delete", "before"))
    there.store = Watched(Folder(share), deletes).store()
    first = asyncio.create_task(there.aggregator(RUN).run())
    await asyncio.wait([first, asyncio.create_task(struck.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert struck.is_set()
    for connection in [c for c in memory.connections if c.user == AGGREGATOR]:
        connection.abort()
    there.store = own
    second = asyncio.create_task(there.aggregator(RUN).run())
    rounds = len(there.reports)
    await asyncio.wait([asyncio.create_task(there.closed(rounds + 2)), second], return_when=asyncio.FIRST_COMPLETED)
    woken.set()
    done, waiting = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return done.pop().result()


@pytest.mark.xdist_group("processes")
@pytest.mark.timeout(300)
def test_processes_killed_while_they_use_a_store(
    rabbit: Rabbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the leader and of a worker whose update is in the store and not decided yet."""
    share, gate = tmp_path / "share", Gate(tmp_path / "gate")
    share.mkdir()
    monkeypatch.setenv("FLUFFLE_STORE_URL", f"file://{share}")
    run = settings(2, rounds=4, broker={"inline_bytes": 0, "patience_s": 20.0}, store={"part_bytes": PART})
    with deployment(rabbit, tmp_path) as there:
        there.set_up()
        leader = there.aggregator(run)
        first = there.worker("p01")
        there.worker("p02", pace=gate.pace(from_round=3)).wait_for("work_begun", round=3)
        first.wait_for("update_sent", task=3)
        first.kill()
        leader.kill()
        first.start()
        leader.start()
        gate.open()
        result = leader.result()
        assert result["updates"]["accepted"] == 8
        assert there.counted(run) == {(name, task): 1 for name in ("p01", "p02") for task in range(1, 5)}
    quiet = Federation(MemoryBroker(Topology("default").access), tmp_path / "quiet", ["p01", "p02"])
    assert result["model_sha256"] == asyncio.run(quiet.run(run)).model.sha256
