"""The store of a process that has everybody in it: what is handed over is the thing itself."""

from __future__ import annotations

import numpy as np
import pytest

from broker.errors import ChunksMissing
from broker.payloads import Assembly, describe
from broker.store import OwnMemory

BODY = bytes(range(256)) * 1024
WHERE = describe(BODY, 0, 64 << 10, "url")


async def test_a_body_is_handed_over_and_not_copied() -> None:
    store, body = OwnMemory(), np.frombuffer(bytearray(BODY), np.uint8)
    told: list[int] = []

    async def after(count: int) -> None:
        told.append(count)

    await store.upload("f/models/run-1", WHERE, body.data, after=after)
    found = store.handed_over("f/models/run-1", WHERE)
    assert found is not None
    assert np.shares_memory(np.frombuffer(found, np.uint8), body)
    assert memoryview(found).readonly, "whoever got it cannot change what others see"
    assert told == [WHERE.chunks]


async def test_what_is_not_there_is_missing_as_elsewhere() -> None:
    store = OwnMemory()
    assert store.handed_over("f/models/run-1", WHERE) is None
    with pytest.raises(ChunksMissing):
        await store.fill("f/models/run-1", Assembly.into(bytearray(len(BODY)), WHERE, "p01"))


async def test_places_are_listed_and_deleted() -> None:
    store = OwnMemory()
    for place in ("f/updates/p01/run-1/7", "f/updates/p01/run-1/8", "f/updates/p02/run-1/7"):
        await store.upload(place, WHERE, BODY)
    assert await store.names("f/updates") == ["p01", "p02"]
    assert await store.names("f/updates/p01/run-1") == ["7", "8"]
    await store.delete("f/updates/p01/run-1/7")
    assert store.handed_over("f/updates/p01/run-1/7", WHERE) is None
    assert await store.names("f/updates/p01/run-1") == ["8"]
    await store.delete("f/updates/p01")
    assert await store.names("f/updates") == ["p02"]
