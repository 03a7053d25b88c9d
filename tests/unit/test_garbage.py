"""What a store may forget: never what the record, its successors or a replay may read."""

from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.garbage import KEPT_MODELS, Garbage, is_decided, models_needed, update_needed
from aggregator.settings import RoundSettings
from aggregator.ways import Ways
from broker.errors import StoreFailed
from broker.head import HeadRecord, OpenRound
from broker.memory import MemoryBroker
from broker.messages import UpdateReady, Where
from broker.objects import open_objects
from broker.payloads import describe
from broker.topology import AGGREGATOR, Topology
from tests.federation import settings
from tests.stores import Touch, Watched

TOPOLOGY = Topology("default")
BLOB = b"body"
BODY = describe(BLOB, 0, 4, "url")
DISCARD, FOLD = RoundSettings(), RoundSettings(late="fold", staleness_max=2)


def sha(version: int) -> str:
    return f"{version:064x}"


def model(version: int) -> Where:
    return Where(where="url", size_bytes=4, sha256=sha(version), chunks=1)


def opened(task: int) -> OpenRound:
    return OpenRound(
        work="train", round=task, attempt=1, task=task, epoch=1, cohort=("p01", "p02"), opened=0.0, deadline=1.0,
        allowed_s=1.0,
    )  # fmt: skip


def record(task: int, settled: dict[str, tuple[int, str]] | None = None, *, is_open: bool = True) -> HeadRecord:
    """A record of version task - 1, in which that task is open; one task was asked for each version."""
    return HeadRecord(
        run_id="run-1", epoch=1, seq=task, version=task - 1, task=task, model=model(task - 1),
        previous=model(task - 2) if task > 1 else None, open=opened(task) if is_open else None,
        lineage=tuple((t, t - 1, sha(t - 1)) for t in range(1, task + 1)), settled=settled or {},
    )  # fmt: skip


def test_models_that_somebody_may_fetch() -> None:
    assert models_needed(record(1)) == {sha(0)}
    assert models_needed(record(9)) == {sha(version) for version in range(8, 8 - KEPT_MODELS, -1)}


@given(
    task=st.integers(1, 20),
    settled=st.dictionaries(st.sampled_from(["p01", "p02"]), st.integers(0, 20)),
    folds=st.booleans(),
)
def test_no_update_is_both_decided_and_needed(task: int, settled: dict[str, int], *, folds: bool) -> None:
    head = record(task, {who: (min(last, task), "counted") for who, last in settled.items()})
    for who in ("p01", "p02"):
        for number in range(1, task + 2):
            assert not (
                is_decided(head, who, number) and update_needed(head, who, number, FOLD if folds else DISCARD)
            )
            if number == task:
                assert update_needed(head, who, number, DISCARD)  # whatever is said about the open task


@pytest.mark.parametrize(
    ("task", "rules", "needed"),
    [(5, DISCARD, True), (4, DISCARD, False), (4, FOLD, True), (3, FOLD, True), (2, FOLD, False)],
)
def test_late_updates_are_needed_if_they_may_be_folded(task: int, rules: RoundSettings, *, needed: bool) -> None:
    assert update_needed(record(5), "p01", task, rules) is needed
    assert not update_needed(record(5, {"p01": (5, "counted")}, is_open=False), "p01", task, rules)
    assert not update_needed(record(5).with_(finished="over"), "p01", task, rules)


# -- what is deleted ------------------------------------------------------------------------------------------


@pytest.fixture
def watched() -> Watched:
    return Watched(open_objects(f"memory://{uuid4().hex}"), lambda touch: None)


@pytest.fixture
async def garbage(watched: Watched) -> Garbage:
    connection = await MemoryBroker().connect(AGGREGATOR, purpose="publish")
    run = settings(2, store={"orphan_s": 100.0})
    return Garbage(Ways(connection, connection, TOPOLOGY, run, watched.store()))


def update(who: str, task: int, body: Where | None = BODY) -> UpdateReady:
    return UpdateReady(
        participant=who, run_id="run-1", epoch=1, task=task, base_sha256=sha(0), arrays="delta", num_examples=1,
        body=body,
    )  # fmt: skip


def fill(watched: Watched, *places: str) -> None:
    for place in places:
        watched.objects.write(f"{place}/{BODY.sha256}/00000", memoryview(BLOB))


def there(watched: Watched, place: str) -> bool:
    return watched.objects.names(place) != []


def deleted(watched: Watched) -> list[str]:
    return [touch.path for touch in watched.touches if (touch.name, touch.when) == ("delete", "after")]


async def test_an_update_goes_once_its_task_is_decided_in_a_record(watched: Watched, garbage: Garbage) -> None:
    first, second = (TOPOLOGY.update_place(who, "run-1", "1") for who in ("p01", "p02"))
    fill(watched, first, second)
    garbage.note(update("p01", 1))
    garbage.note(update("p02", 1))
    garbage.note(update("p02", 1, None))
    await garbage.collect(record(1), 0.0)
    assert deleted(watched) == []
    await garbage.collect(record(2, {"p01": (1, "counted")}), 1.0)
    assert not there(watched, first)
    assert there(watched, second)  # say, only parts missed when it was announced
    await garbage.collect(record(3, {"p01": (2, "counted"), "p02": (1, "late")}), 2.0)
    assert not there(watched, second)
    assert deleted(watched) == [first, second]


async def test_an_update_that_may_be_sent_again_stays(watched: Watched, garbage: Garbage) -> None:
    """Refused, but the same task is still open."""
    place = TOPOLOGY.update_place("p01", "run-1", "1")
    fill(watched, place)
    garbage.note(update("p01", 1))
    await garbage.collect(record(1, {"p01": (1, "refused")}), 0.0)
    assert there(watched, place)


async def test_models_go_when_the_record_forgets_them(watched: Watched, garbage: Garbage) -> None:
    for task in range(1, 9):
        watched.objects.write(f"{TOPOLOGY.model_place('run-1', sha(task - 1))}/00000", memoryview(BLOB))
        await garbage.collect(record(task), float(task))
    left = {sha(version) for version in range(8) if there(watched, TOPOLOGY.model_place("run-1", sha(version)))}
    assert left == models_needed(record(8))


async def test_orphans_go_when_they_were_seen_twice_and_were_of_no_use_either_time(
    watched: Watched, garbage: Garbage
) -> None:
    orphan, later = TOPOLOGY.model_place("run-1", sha(77)), TOPOLOGY.model_place("run-1", sha(1))
    foreign = "other/models/run-1"
    fill(watched, orphan, later, foreign)
    await garbage.collect(record(1), 1000.0)
    await garbage.collect(record(1), 1099.0)
    assert deleted(watched) == []
    await garbage.collect(record(2), 1100.0)  # meanwhile one is needed: it was stored before it was committed
    assert deleted(watched) == [orphan]
    assert there(watched, later)
    assert there(watched, foreign)


async def test_names_that_are_not_ours_are_left_alone(watched: Watched, garbage: Garbage) -> None:
    strange = "default/updates/P 01/run-1/1"
    fill(watched, strange)
    for now in (1000.0, 1100.0, 1200.0):
        await garbage.collect(record(1), now)
    assert there(watched, strange)


async def test_a_store_that_fails_is_tidied_later(
    watched: Watched, garbage: Garbage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.store.ATTEMPTS", 1)
    place = TOPOLOGY.update_place("p01", "run-1", "1")
    fill(watched, place)
    garbage.note(update("p01", 1))

    def fail(touch: Touch) -> None:
        raise StoreFailed("gone")

    watched.strike = fail
    settled = {"p01": (1, "counted")}
    await garbage.collect(record(2, settled), 0.0)
    watched.strike = lambda touch: None
    assert there(watched, place)
    await garbage.collect(record(2, settled), 0.0)
    assert not there(watched, place)
