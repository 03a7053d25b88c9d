"""What every claim-check store promises: a folder, an S3-compatible object store, a web server, memory.

`site` is a participant's way to the store and `keeper` the aggregator's: over HTTP a site can neither list nor
delete, so there the aggregator has the folder behind the web server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from broker import store as broker_store
from broker.errors import BadMessage, ChunksMissing, StoreFailed
from broker.messages import Where
from broker.payloads import WINDOW, Assembly, describe, piece, verify
from broker.store import Store
from broker.topology import AGGREGATOR, Topology
from tests.seaweed import Seaweed
from tests.web import web_server

PART = 1000
BLOB = bytes(range(256)) * 40  # ten parts and a short one
WHERE = describe(BLOB, 0, PART, "url")


@dataclass
class Site:
    """One kind of store, as two who use it see it."""

    site: Store
    keeper: Store
    topology: Topology

    @property
    def place(self) -> str:
        return self.topology.update_place("p01", "run-1", "7")

    async def fetched(self, where: Where = WHERE, place: str = "") -> bytes:
        assembly = assembly_of(where)
        await self.keeper.fill(place or self.place, assembly)
        await verify(assembly.buffer, where)
        return bytes(assembly.buffer)


def assembly_of(where: Where = WHERE) -> Assembly:
    return Assembly.into(bytearray(where.size_bytes), where, "p01")


@pytest.fixture(params=["folder", "memory", "http", pytest.param("s3", marks=pytest.mark.xdist_group("seaweed"))])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def opened(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    topology = Topology(f"t-{uuid4().hex[:12]}")
    with ExitStack() as stack:
        if kind == "s3":
            seaweed: Seaweed = request.getfixturevalue("seaweed")
            topology = Topology(seaweed.federation())
            found = Site(seaweed.store("p01"), seaweed.store(AGGREGATOR), topology)
        elif kind == "http":
            url = stack.enter_context(web_server(tmp_path))
            found = Site(Store.at(url), Store.at(str(tmp_path)), topology)
        else:
            url = f"memory://{topology.federation}" if kind == "memory" else f"file://{tmp_path}"
            found = Site(Store.at(url), Store.at(url), topology)
        yield found
        found.site.close()
        found.keeper.close()


@pytest.fixture
async def stored(opened: Site) -> Site:
    """A store with one body in it."""
    await opened.site.upload(opened.place, WHERE, BLOB)
    return opened


@pytest.mark.parametrize("size", [1, PART - 1, PART, PART + 1, 7 * PART, len(BLOB)])
async def test_what_was_stored_is_read_back(opened: Site, size: int) -> None:
    where = describe(BLOB[:size], 0, PART, "url")
    await opened.site.upload(opened.place, where, BLOB[:size])
    assert await opened.fetched(where) == BLOB[:size]


async def test_a_site_reads_a_model_that_the_aggregator_stored(opened: Site) -> None:
    place, assembly = opened.topology.model_place("run-1"), assembly_of()
    await opened.keeper.upload(place, WHERE, BLOB)
    await opened.site.fill(place, assembly)
    await verify(assembly.buffer, WHERE)


async def test_storing_it_again_changes_nothing(stored: Site) -> None:
    await stored.site.upload(stored.place, WHERE, BLOB)
    assert await stored.fetched() == BLOB


async def test_it_is_told_how_many_parts_are_there(opened: Site) -> None:
    told: list[int] = []

    async def after(count: int) -> None:
        told.append(count)
        assembly = assembly_of()
        with suppress(ChunksMissing):
            await opened.keeper.fill(opened.place, assembly)
        assert min(assembly.missing, default=WHERE.chunks) >= count

    await opened.site.upload(opened.place, WHERE, BLOB, after=after)
    assert told == [WINDOW, 2 * WINDOW, WHERE.chunks]


async def test_an_upload_goes_on_where_it_was(opened: Site) -> None:
    """What a first attempt stored is not stored again: it would have other bytes."""

    class CutError(Exception):
        pass

    async def cut(count: int) -> None:
        raise CutError

    with pytest.raises(CutError):
        await opened.site.upload(opened.place, WHERE, BLOB, after=cut)
    with pytest.raises(ChunksMissing, match=f"part {WINDOW} of {WHERE.chunks} .*not in the store"):
        await opened.fetched()
    stored = piece(WHERE, WINDOW).start
    garbage = bytes(stored) + BLOB[stored:]
    await opened.site.upload(opened.place, WHERE, garbage, first=WINDOW)
    assert await opened.fetched() == BLOB


async def test_a_download_goes_on_where_it_was(opened: Site) -> None:
    """What came is not fetched again: it would have other bytes."""
    assembly = assembly_of()
    await opened.site.upload(opened.place, WHERE, BLOB, first=5)
    with pytest.raises(ChunksMissing, match="part 0"):
        await opened.keeper.fill(opened.place, assembly)
    assert assembly.missing >= set(range(WINDOW))
    for _ in range(3):
        with suppress(ChunksMissing):
            await opened.keeper.fill(opened.place, assembly)
    arrived = set(range(WHERE.chunks)) - assembly.missing
    mixed = bytearray(BLOB)
    for index in arrived:
        mixed[piece(WHERE, index)] = bytes(len(BLOB[piece(WHERE, index)]))
    await opened.site.upload(opened.place, WHERE, mixed)
    await opened.keeper.fill(opened.place, assembly)
    await verify(assembly.buffer, WHERE)


async def test_what_is_not_there_is_missing(opened: Site) -> None:
    with pytest.raises(ChunksMissing, match="not in the store"):
        await opened.fetched()


async def test_a_part_that_is_too_short_is_missing(stored: Site) -> None:
    """It is not whole, whatever happened to it: it may be sent again."""
    short = describe(BLOB[:-1], 0, PART, "url").model_copy(update={"sha256": WHERE.sha256})
    await stored.site.upload(stored.place, short, BLOB[:-1])
    with pytest.raises(ChunksMissing, match="or not whole"):
        await stored.fetched()


async def test_a_part_that_is_too_long_is_refused(stored: Site) -> None:
    """And not read: what it may cost is in the message."""
    much = bytes(1 << 20)
    long = Where(where="url", size_bytes=len(much), sha256=WHERE.sha256, chunks=1)
    await stored.site.upload(stored.place, long, much)
    with pytest.raises(BadMessage, match=f"part 0 of {WHERE.sha256[:12]} in the store is longer than"):
        await stored.fetched()


async def test_other_bytes_are_refused(stored: Site) -> None:
    await stored.site.upload(stored.place, WHERE, BLOB[:-1] + b"!")
    with pytest.raises(BadMessage, match="does not match its sha256"):
        await stored.fetched()


async def test_whoever_reads_meanwhile_gets_the_old_bytes_or_the_new(opened: Site) -> None:
    size = 1 << 20
    old, new = bytes(size), b"\xff" * size
    where = Where(where="url", size_bytes=size, sha256=hashlib.sha256(old).hexdigest(), chunks=1)
    await opened.site.upload(opened.place, where, old)
    over = asyncio.Event()

    async def write() -> None:
        for number in range(10):
            await opened.site.upload(opened.place, where, (new, old)[number % 2])
        over.set()

    async def read() -> int:
        reads = 0
        while not over.is_set():
            assembly = assembly_of(where)
            await opened.keeper.fill(opened.place, assembly)
            assert bytes(assembly.buffer) in (old, new)
            reads += 1
        return reads

    _, reads = await asyncio.gather(write(), read())
    assert reads > 1


async def test_two_who_store_the_same_do_not_disturb_each_other(opened: Site) -> None:
    await asyncio.gather(*(opened.site.upload(opened.place, WHERE, BLOB) for _ in range(4)))
    assert await opened.fetched() == BLOB


async def test_what_is_deleted_is_gone_and_nothing_else(stored: Site) -> None:
    other = stored.topology.update_place("p01", "run-1", "70")
    await stored.site.upload(other, WHERE, BLOB)
    await stored.keeper.delete(stored.place)
    with pytest.raises(ChunksMissing):
        await stored.fetched()
    assert await stored.fetched(place=other) == BLOB
    await stored.keeper.delete(stored.place)  # again: nobody minds


async def test_it_tells_what_lies_at_a_place(stored: Site) -> None:
    updates, models = stored.topology.update_place, stored.topology.model_place
    await stored.keeper.upload(models("run-1"), WHERE, BLOB)
    assert set(await stored.keeper.names(stored.topology.federation)) == {"models", "updates"}
    assert await stored.keeper.names(updates()) == ["p01"]
    assert await stored.keeper.names(updates("p01")) == ["run-1"]
    assert await stored.keeper.names(updates("p01", "run-1")) == ["7"]
    assert await stored.keeper.names(models("run-1")) == [WHERE.sha256]
    assert sorted(await stored.keeper.names(models("run-1", WHERE.sha256))) == [f"{i:05d}" for i in range(11)]
    assert await stored.keeper.names(updates("p02")) == []


HOSTILE = ["", "/", "..", "../other", "a/../../b", "a//b", "/etc", "a/.", "a\x00b", "A", "s3://elsewhere", "a/b/"]


@pytest.mark.parametrize("place", HOSTILE)
async def test_no_place_leads_elsewhere(stored: Site, place: str) -> None:
    for work in (
        stored.site.upload(place, WHERE, BLOB),
        stored.keeper.fill(place, assembly_of()),
        stored.keeper.delete(place),
        stored.keeper.names(place),
    ):
        with pytest.raises(BadMessage, match="is no place in a store"):
            await work
    assert await stored.fetched() == BLOB


@pytest.fixture
def unreachable(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if kind == "memory":
        pytest.skip("it is always there")
    monkeypatch.setattr(broker_store, "ATTEMPTS", 2)
    monkeypatch.setattr(broker_store, "LONGEST_PAUSE_S", 0.01)
    urls = {"folder": str(tmp_path / "not-mounted"), "http": "http://127.0.0.1:1"}
    store = Seaweed(tmp_path, port=1).store() if kind == "s3" else Store.at(urls[kind])
    yield store
    store.close()
    assert not (tmp_path / "not-mounted").exists()


async def test_a_store_that_cannot_be_reached_says_so(unreachable: Store) -> None:
    with pytest.raises(StoreFailed, match="check that it can be reached"):
        await unreachable.upload("f", describe(b"x", 0, PART, "url"), b"x")
    with pytest.raises(StoreFailed, match="check that it can be reached"):
        await unreachable.fill("f", assembly_of())
