"""Whole runs whose large bodies go through a claim-check store: the same models, whatever goes wrong with it."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from aggregator.garbage import KEPT_MODELS
from broker import store as broker_store
from broker.errors import TaskError
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.objects import Folder
from broker.payloads import WINDOW
from broker.store import Store
from broker.topology import Topology
from tests.federation import Federation, names, settings
from tests.rabbit_node import Rabbit
from tests.seaweed import Seaweed
from tests.stores import OnceAt, Touch, Watched
from workers.journal import FileJournal
from workers.trainer import Sizes

PART = 64 << 10
SIZE = 150_000  # values: 600 KB in ten parts
PARTS = 10
SIZES = Sizes(inline_bytes=0, part_bytes=PART)
LARGE = {"broker": {"inline_bytes": 0}, "store": {"part_bytes": PART}}
RUN = settings(3, rounds=6, **LARGE)
ONE = settings(1, rounds=1, **LARGE)


def federation(directory: Path, store: Store | None, count: int = 3) -> Federation:
    broker = MemoryBroker(Topology("default").access)
    return Federation(broker, directory, names(count), size=SIZE, heartbeat_s=0.2, sizes=SIZES, store=store)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The model's digest for a run of each number of participants, through the broker."""
    found = {}
    for run, count in ((RUN, 3), (ONE, 1)):
        head = asyncio.run(federation(tmp_path_factory.mktemp("quiet"), None, count).run(run))
        assert head.model is not None
        assert head.model.where == "stream"
        found[count] = head.model.sha256
    return found


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


def digest(head: HeadRecord) -> str:
    assert head.finished
    assert head.model is not None
    assert head.model.where == "url"
    return head.model.sha256


def left_in(share: Path, below: str) -> list[str]:
    """All files below a folder of the share."""
    return sorted(
        os.path.relpath(Path(folder) / file, share) for folder, _, files in os.walk(share / below) for file in files
    )


async def parts_below(store: Store, place: str) -> int:
    """How many parts there are. SeaweedFS shows folders for a while after they were emptied: they do not count."""
    found = await store.names(place)
    parts = [name for name in found if re.fullmatch(r"\d{5}", name)]
    return len(parts) or sum([await parts_below(store, f"{place}/{name}") for name in found])


# -- the same run through any store ---------------------------------------------------------------------------


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.xdist_group("seaweed"))])
def store(request: pytest.FixtureRequest, share: Path) -> Store:
    if request.param == "s3":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        return seaweed.store()
    return Store.at(str(share) if request.param == "folder" else f"memory://{uuid4().hex}")


async def test_a_run_through_a_store_has_the_same_bits(
    store: Store, undisturbed: dict[int, str], tmp_path: Path
) -> None:
    """And leaves behind only the models that somebody may still fetch."""
    async with asyncio.timeout(60):
        head = await federation(tmp_path, store).run(RUN)
    assert digest(head) == undisturbed[3]
    places = Topology("default")
    assert await parts_below(store, places.model_place()) == (KEPT_MODELS + 1) * PARTS
    assert await parts_below(store, places.update_place()) == 0
    await store.delete("default")


@pytest.fixture(params=["folder", "s3"])
def real_store(request: pytest.FixtureRequest, share: Path) -> Store:
    """One that other processes can reach; made before there is an event loop, for starting a server blocks."""
    if request.param == "folder":
        return Store(Folder(share), "share")
    seaweed: Seaweed = request.getfixturevalue("seaweed")
    return seaweed.store()


@pytest.mark.xdist_group("rabbitmq")
async def test_a_run_through_a_store_and_rabbitmq_has_the_same_bits(
    real_store: Store, rabbit: Rabbit, undisturbed: dict[int, str], tmp_path: Path
) -> None:
    there = federation(tmp_path, real_store)
    there.broker, there.topology = rabbit.broker(), rabbit.topology()
    async with asyncio.timeout(100):
        assert digest(await there.run(RUN)) == undisturbed[3]
    assert [d.verdict for d in await there.ledger()] == ["counted"] * 18


# -- updates that do not arrive whole -------------------------------------------------------------------------


def strikes_at(nth: int, act: Callable[[], None], name: str = "write", when: str = "after") -> OnceAt:
    """At the n-th part of an update."""
    return OnceAt(nth, act, lambda t: t.name == name and t.when == when and "/updates/" in t.path)


async def test_a_worker_that_is_killed_in_the_middle_of_an_upload_goes_on(
    undisturbed: dict[int, str], share: Path, tmp_path: Path
) -> None:
    """What was noted as stored is not stored again, and nothing is trained twice."""
    loop, half = asyncio.get_running_loop(), asyncio.Event()
    dead = threading.Event()

    def die() -> None:
        loop.call_soon_threadsafe(half.set)
        dead.wait(30)
        raise OSError("killed")

    watched = Watched(Folder(share), strikes_at(8, die))
    one = federation(tmp_path, watched.store(), 1)
    one.journals["p01"] = FileJournal(tmp_path / "journal")
    leader = asyncio.create_task(one.aggregator(ONE).run())
    async with asyncio.timeout(60), one.crowd() as crowd:
        crowd.start("p01")
        await half.wait()
        await crowd.vanish("p01")
        dead.set()
        crowd.start("p01")
        assert digest(await leader) == undisturbed[1]
    updates = [path for path in watched.written() if "/updates/" in path]
    assert PARTS <= len(updates) <= PARTS + WINDOW
    assert one.tasks["p01"].trained == [1]


async def test_an_update_that_vanished_is_sent_again(
    undisturbed: dict[int, str], share: Path, tmp_path: Path
) -> None:
    def vanish() -> None:
        [part] = [path for path in left_in(share, "default/updates") if path.endswith("00004")]
        (share / part).unlink()

    watched = Watched(Folder(share), strikes_at(0, vanish, "read", "before"))
    one = federation(tmp_path, watched.store(), 1)
    async with asyncio.timeout(60):
        assert digest(await one.run(ONE)) == undisturbed[1]
    told = [(d.verdict, d.reason) for d in await one.ledger()]
    assert [verdict for verdict, _ in told] == ["refused", "counted"]
    assert told[0][1].startswith("part 4 of 10 of ")
    assert [report.attempt for report in one.reports] == [1]


async def test_an_update_that_changed_is_refused_and_asked_for_anew(
    undisturbed: dict[int, str], share: Path, tmp_path: Path
) -> None:
    def change() -> None:
        [part] = [path for path in left_in(share, "default/updates") if path.endswith("00004")]
        (share / part).write_bytes(bytes((share / part).stat().st_size))

    watched = Watched(Folder(share), strikes_at(0, change, "read", "before"))
    one = federation(tmp_path, watched.store(), 1)
    async with asyncio.timeout(60):
        assert digest(await one.run(ONE)) == undisturbed[1]
    told = [(d.verdict, d.reason) for d in await one.ledger()]
    assert [verdict for verdict, _ in told] == ["refused", "counted"]
    assert "does not match its sha256" in told[0][1]
    assert [report.attempt for report in one.reports] == [2]


async def test_an_update_that_cannot_be_read_is_refused_while_the_store_is_well(
    monkeypatch: pytest.MonkeyPatch, share: Path, tmp_path: Path
) -> None:
    """A participant cannot stop the run with a file that makes reading fail."""
    monkeypatch.setattr(broker_store, "LONGEST_PAUSE_S", 0.01)

    def pipe() -> None:
        [part] = [path for path in left_in(share, "default/updates") if path.endswith("00004")]
        (share / part).unlink()
        os.mkfifo(share / part)

    watched = Watched(Folder(share), strikes_at(0, pipe, "read", "before"))
    one = federation(tmp_path, watched.store(), 1)
    async with asyncio.timeout(60):
        assert (await one.run(ONE)).finished
    told = [(d.verdict, d.reason) for d in await one.ledger()]
    assert [verdict for verdict, _ in told] == ["refused", "counted"]
    assert "cannot be read" in told[0][1]


# -- the store as a whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["aggregator", "workers"])
async def test_a_store_that_is_gone_for_a_while_delays_the_run(
    who: str, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[int, str], share: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(broker_store, "LONGEST_PAUSE_S", 0.01)
    failures = 0

    def fail(touch: Touch) -> None:
        nonlocal failures
        if touch.when == "before" and 20 < len(watched.touches) < 60:
            failures += 1
            raise OSError("stale file handle")

    watched = Watched(Folder(share), fail)
    three = federation(tmp_path, Store(Folder(share), "share"))
    aggregator = three.aggregator(RUN)
    if who == "aggregator":
        three.store = watched.store()
        aggregator = three.aggregator(RUN)
        three.store = Store(Folder(share), "share")
    else:
        three.store = watched.store()
    async with asyncio.timeout(60), three.workers():
        assert digest(await aggregator.run()) == undisturbed[3]
    assert failures > 10
    assert [d.verdict for d in await three.ledger()] == ["counted"] * 18


async def test_a_model_that_was_deleted_is_stored_again(
    undisturbed: dict[int, str], share: Path, tmp_path: Path
) -> None:
    """Nobody can fetch it, so nobody answers; with the next attempt it is there."""
    gone = []

    def vanish() -> None:
        for part in left_in(share, "default/models"):
            (share / part).unlink()
            gone.append(part)

    first_read = OnceAt(0, vanish, lambda t: (t.name, t.when) == ("read", "before") and "/models/" in t.path)
    one = federation(tmp_path, Store(Folder(share), "share"), 1)
    run = settings(1, rounds=1, round={"deadline_s": 1.0}, **LARGE)
    leader = one.aggregator(run)
    one.store = Watched(Folder(share), first_read).store()
    async with asyncio.timeout(60), one.workers():
        assert digest(await leader.run()) == undisturbed[1]
    assert len(gone) == PARTS
    assert [report.attempt for report in one.reports] == [2]


async def test_a_site_without_a_store_says_so(share: Path, tmp_path: Path) -> None:
    one = federation(tmp_path, Store(Folder(share), "share"), 1)
    leader = one.aggregator(ONE)
    one.store = None
    async with asyncio.timeout(60), one.workers():
        with pytest.raises(TaskError, match="this site names none: set store"):
            await leader.run()


async def test_a_leader_without_the_store_goes_on_through_the_broker(
    undisturbed: dict[int, str], share: Path, tmp_path: Path
) -> None:
    """Its own checkpoint has the model; the sites go the way that it takes."""
    three = federation(tmp_path, Store(Folder(share), "share"))
    with_store = three.aggregator(RUN)
    async with asyncio.timeout(60), three.workers():
        running = asyncio.create_task(with_store.run())
        await three.closed(2)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        three.store = None
        head = await three.aggregator(RUN).run()
    assert head.model is not None
    assert head.model.where == "stream"
    assert head.model.sha256 == undisturbed[3]


# -- garbage --------------------------------------------------------------------------------------------------


async def test_what_nobody_needs_goes_after_it_was_seen_twice(share: Path, tmp_path: Path) -> None:
    orphans = [
        "default/models/run-1/" + "0" * 64 + "/00000",  # stored, never committed
        "default/models/old-run/" + "1" * 64 + "/00000",
        "default/updates/p01/old-run/3/" + "2" * 64 + "/00000",
        "default/updates/gone/run-1/1/" + "3" * 64 + "/.00000.ab12.new",
    ]
    foreign = ["other/models/run-1/" + "0" * 64 + "/00000", "default/Notes.txt"]

    def litter() -> None:
        for path in [*orphans, *foreign]:
            (share / path).parent.mkdir(parents=True, exist_ok=True)
            (share / path).write_bytes(b"x")

    await asyncio.to_thread(litter)
    run = settings(3, rounds=6, broker={"inline_bytes": 0}, store={"part_bytes": PART, "orphan_s": 0.01})
    three = federation(tmp_path, Store(Folder(share), "share"))
    async with asyncio.timeout(60):
        await three.run(run)
    left = await asyncio.to_thread(left_in, share, "")
    assert [path for path in orphans if path in left] == []
    assert [path for path in foreign if path in left] == foreign


async def test_the_run_before_leaves_nothing(share: Path, tmp_path: Path) -> None:
    three = federation(tmp_path, Store(Folder(share), "share"))
    await three.run(RUN)
    three.directory = tmp_path / "second"
    await three.run(settings(3, rounds=1, run_id="run-2", **LARGE))
    assert await asyncio.to_thread(left_in, share, "default/models/run-1") == []
    assert len(await asyncio.to_thread(left_in, share, "default/models/run-2")) == 2 * PARTS
