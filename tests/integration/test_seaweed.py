"""What only a real S3-compatible server can show: keys, rights by prefix, credentials from the environment."""

from __future__ import annotations

import pytest

from broker import store as broker_store
from broker.errors import ChunksMissing, StoreFailed
from broker.payloads import Assembly, describe, verify
from broker.store import Store
from broker.topology import Topology
from tests.seaweed import BUCKET, ONLOOKER, Seaweed

pytestmark = pytest.mark.xdist_group("seaweed")

BLOB = bytes(range(200)) * 50
WHERE = describe(BLOB, 0, 3000, "url")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_store, "ATTEMPTS", 1)


@pytest.fixture
def topology(seaweed: Seaweed) -> Topology:
    return Topology(seaweed.federation())


async def fetched(store: Store, place: str) -> bytes:
    assembly = Assembly.into(bytearray(len(BLOB)), WHERE, "p01")
    await store.fill(place, assembly)
    await verify(assembly.buffer, WHERE)
    return bytes(assembly.buffer)


async def test_a_participant_stores_its_own_updates_and_nothing_else(seaweed: Seaweed, topology: Topology) -> None:
    aggregator, p01 = seaweed.store(), seaweed.store("p01")
    own, model = topology.update_place("p01", "run-1", "3"), topology.model_place("run-1")
    other = topology.update_place("p02", "run-1", "3")
    await p01.upload(own, WHERE, BLOB)
    await aggregator.upload(model, WHERE, BLOB)
    await seaweed.store("p02").upload(other, WHERE, BLOB)
    assert await fetched(p01, model) == BLOB
    for place in (model, other, topology.federation, Topology("elsewhere").update_place("p01", "run-1", "3")):
        with pytest.raises(StoreFailed, match="PermissionError"):
            await p01.upload(place, WHERE, BLOB)
    for place in (other, own):  # not even its own, which it has
        with pytest.raises(StoreFailed, match="PermissionError"):
            await fetched(p01, place)
    assert await fetched(aggregator, own) == await fetched(aggregator, other) == BLOB


async def test_a_participant_can_delete_nothing_of_others(seaweed: Seaweed, topology: Topology) -> None:
    aggregator, p01, model = seaweed.store(), seaweed.store("p01"), topology.model_place("run-1")
    await aggregator.upload(model, WHERE, BLOB)
    with pytest.raises(StoreFailed, match="PermissionError"):
        await p01.delete(model)
    assert await fetched(aggregator, model) == BLOB


async def test_a_deletion_that_is_refused_is_told(seaweed: Seaweed, topology: Topology) -> None:
    aggregator, model = seaweed.store(), topology.model_place("run-1")
    await aggregator.upload(model, WHERE, BLOB)
    with pytest.raises(StoreFailed, match=r"could not be deleted|PermissionError"):
        await seaweed.store(ONLOOKER).delete(model)
    assert await fetched(aggregator, model) == BLOB


async def test_a_wrong_key_is_told(seaweed: Seaweed, topology: Topology) -> None:
    with pytest.raises(StoreFailed, match=r"InvalidAccessKeyId|PermissionError"):
        await seaweed.store("nobody").upload(topology.model_place("run-1"), WHERE, BLOB)


@pytest.fixture
def from_environment(seaweed: Seaweed, topology: Topology, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in seaweed.environment("aggregator").items():
        monkeypatch.setenv(name, value)
    return Store.at(f"s3://{BUCKET}/some/prefix/")


async def test_credentials_come_from_the_environment(from_environment: Store, seaweed: Seaweed) -> None:
    await from_environment.upload("f/models/run-1", WHERE, BLOB)
    assert await fetched(from_environment, "f/models/run-1") == BLOB
    assert await fetched(seaweed.store(), "some/prefix/f/models/run-1") == BLOB
    assert await from_environment.names("f/models") == ["run-1"]
    await from_environment.delete("f")
    with pytest.raises(ChunksMissing):
        await fetched(seaweed.store(), "some/prefix/f/models/run-1")
