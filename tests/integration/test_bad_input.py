"""What a hostile participant can do to a run: nothing. All it sends is refused with the reason, and told apart."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.history import RoundReport
from aggregator.intake import Intake
from aggregator.job import Surroundings
from broker import tensors
from broker.errors import AccessRefused
from broker.head import Decision, HeadRecord
from broker.memory import MemoryBroker
from broker.messages import Barrier, Chunk, Heartbeat, Join, Leave, Rejected, TrainRound, UpdateReady, Where
from broker.objects import Folder
from broker.payloads import MIN_PART_BYTES, describe, piece
from broker.store import Store
from broker.tensors import Arrays, Buffer
from broker.topology import AGGREGATOR, CHUNK, Topology
from broker.transport import Inbox, Transport
from broker.wire import decode, encode
from tests.federation import Federation, names, settings

TOPOLOGY = Topology("default")
BAD = "p-bad"
CHUNKED = {"inline_bytes": 0, "chunk_bytes": 1024}


@dataclass
class Hostile:
    """A participant of the cohort that says whatever it likes, over a connection of its own."""

    connection: Transport
    inbox: Inbox
    order: TrainRound
    model: Arrays

    @classmethod
    async def joined(cls, broker: MemoryBroker) -> Hostile:
        """It joins like anybody else, whenever it hears of a run, and waits until it is asked."""
        connection = await broker.connect(BAD, purpose="publish")
        await connection.declare(*TOPOLOGY.inbox_declarations(BAD))
        inbox = await connection.consume(TOPOLOGY.inbox(BAD))
        while True:
            await connection.publish(TOPOLOGY.up, f"{BAD}.join", encode(Join(participant=BAD)))
            delivery = await inbox.get(10.0)
            assert delivery is not None
            await delivery.ack()
            order, payload = decode(delivery.body)
            assert isinstance(order, TrainRound)
            if BAD in order.asked:
                model = tensors.decode(payload) if order.model and order.model.where == "inline" else {}
                return cls(connection, inbox, order, model)

    async def say(self, kind: str, frame: bytes) -> None:
        exchange = TOPOLOGY.chunks(BAD) if kind == CHUNK else TOPOLOGY.up
        await self.connection.publish(exchange, f"{BAD}.{kind}", frame)

    async def heard_again(self) -> None:
        """Returns once the leader has read everything that it said, and listens to it again."""
        while await self.inbox.get(0) is not None:
            pass
        while await self.inbox.get(0.2) is None:
            await self.say("join", encode(Join(participant=BAD)))

    def update(self, blob: Buffer = b"", **changes: object) -> UpdateReady:
        """An update that would count if its body were one."""
        assert self.order.model
        fields: dict[str, object] = {
            "participant": BAD, "run_id": "run-1", "epoch": self.order.epoch, "task": self.order.task,
            "base_sha256": self.order.model.sha256, "arrays": "delta", "num_examples": 10,
            "body": describe(blob, 1 << 30, 1),
        }  # fmt: skip
        return UpdateReady(**{**fields, **changes})

    def frame(self, blob: Buffer = b"", **changes: object) -> bytes:
        return encode(self.update(blob, **changes), blob)

    def with_arrays(self, **changes: object) -> bytes:
        """An update with some of its arrays replaced, or left out if None."""
        arrays = {name: np.zeros_like(values) for name, values in self.model.items()} | changes
        return self.frame(tensors.encode({name: values for name, values in arrays.items() if values is not None}))


Act = Callable[[Hostile], Awaitable[None]]


@dataclass(frozen=True)
class Seen:
    head: HeadRecord
    reports: list[RoundReport]
    ledger: list[Decision]
    rejected: list[tuple[Rejected, bytes]]


async def attacked(
    directory: Path,
    act: Act,
    broker_: MemoryBroker | None = None,
    size: int = 7,
    store: Store | None = None,
    **sections,
) -> Seen:
    """A run of three honest participants and one that does `act` when it is asked, and then leaves."""
    broker = broker_ or MemoryBroker(TOPOLOGY.access)
    aggregator = await broker.connect(AGGREGATOR, purpose="audit")
    await aggregator.declare(*TOPOLOGY.aggregator_declarations())
    federation = Federation(broker, directory, names(3), size, store=store)
    run = settings(4, rounds=2, round={"quorum": 3}, **sections)
    quiet = Surroundings(on_report=federation.reports.append, on_notice=lambda event, fields: None, store=store)
    async with asyncio.timeout(60), federation.workers():
        running = asyncio.create_task(federation.aggregator(run, quiet).run())
        hostile = await Hostile.joined(broker)
        await act(hostile)
        await hostile.say("leave", encode(Leave(participant=BAD)))
        head = await running
    inbox = await aggregator.consume(TOPOLOGY.rejected)
    rejected = []
    while (delivery := await inbox.get(0)) is not None:
        note, quoted = decode(delivery.body)
        assert isinstance(note, Rejected)
        rejected.append((note, bytes(quoted)))
    return Seen(head, federation.reports, await federation.ledger(), rejected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> HeadRecord:
    """The same run without the hostile one."""

    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path_factory.mktemp("quiet"), names(3))
    return asyncio.run(federation.run(settings(3, rounds=2)))


def check(seen: Seen, refused: Sequence[str], undisturbed: HeadRecord) -> None:
    """Every refusal is told everywhere, with its reason; the honest ones' updates count, and only those."""
    for told in (
        [(note.participant, note.reason) for note, _ in seen.rejected],
        [(line.participant, line.reason) for line in seen.ledger if line.verdict == "refused"],
    ):
        assert len(told) == len(refused)
        for (participant, reason), expected in zip(told, refused, strict=True):
            assert participant == BAD
            assert re.search(expected, reason), f"{reason!r} does not say {expected!r}"
    first, second = seen.reports
    assert (first.accepted, first.rejected, first.cohort) == (3, len(refused), 4)
    assert (second.accepted, second.rejected, second.cohort) == (3, 0, 3)
    counted = [(line.participant, line.task) for line in seen.ledger if line.verdict == "counted"]
    assert sorted(counted) == [(p, task) for p in names(3) for task in (1, 2)]
    assert seen.head.finished
    assert seen.head.version == 2
    assert seen.head.model
    assert undisturbed.model
    assert seen.head.model.sha256 == undisturbed.model.sha256


# -- one bad message ------------------------------------------------------------------------------------------

Forge = Callable[[Hostile], bytes]


def manifest(shape: list[int], offsets: list[int]) -> bytes:
    """The bytes of one tensor that says this of itself."""
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text


F32 = np.float32
FORGERIES: dict[str, tuple[Forge, str]] = {
    "garbage": (lambda h: b"\x00garbage\xff" * 9, "does not begin with 'FLF'"),
    "nothing": (lambda h: b"", "does not begin with 'FLF'"),
    "schema version": (lambda h: b"FLF\x02" + h.frame()[4:], "schema version 2 is not supported"),
    "header too long": (lambda h: b"FLF\x01" + (1 << 31).to_bytes(4, "little"), "header length 2147483648 exceeds"),
    "a refusal": (
        lambda h: encode(Rejected(offset=0, participant="p01", reason="so")),
        "a rejected message is nothing that a participant sends",
    ),
    "header above its limit": (
        lambda h: b"FLF\x01" + (70_000).to_bytes(4, "little") + b"\x91" * 70_000,
        "exceeds the frame or the limit of 65536",
    ),
    "nested": (lambda h: b"FLF\x01" + (60_000).to_bytes(4, "little") + b"\x91" * 60_000, "not valid msgpack"),
    "unknown kind": (lambda h: h.frame().replace(b"update", b"uqdate", 1), "unknown kind of message 'uqdate'"),
    "another field": (lambda h: h.frame().replace(b"epoch", b"epocs", 1), "field 'epoch': Field required"),
    "order": (lambda h: encode(h.order), "a round message is nothing that a participant sends"),
    "head record": (lambda h: encode(HeadRecord(epoch=99)), "a head message is nothing that a participant sends"),
    "barrier": (lambda h: encode(Barrier(nonce="n")), "a barrier message is nothing that a participant sends"),
    "another's name": (
        lambda h: h.frame(participant="p01"),
        "in the name of 'p01' came from 'p-bad' with key 'p-bad.update'",
    ),
    "another kind than its key": (
        lambda h: encode(Leave(participant=BAD)),
        "leave message in the name of 'p-bad' came from 'p-bad' with key 'p-bad.update'",
    ),
    "unknown run": (lambda h: h.frame(run_id="run-2"), "unknown run 'run-2'"),
    "old epoch": (lambda h: h.frame(epoch=0), "epoch 0 is older than task 1"),
    "future epoch": (lambda h: h.frame(epoch=99), "epoch 99, task 1 was never offered"),
    "future task": (lambda h: h.frame(task=2), "task 2 was never offered"),
    "another base model": (lambda h: h.frame(base_sha256="f" * 64), "base model ffffffffffff is not version 0"),
    "no body": (lambda h: h.frame(body=None), "exactly if it has a body"),
    "metrics instead of arrays": (lambda h: h.frame(body=None, arrays="none"), "do not answer work 'train'"),
    "gradients": (
        lambda h: h.frame(tensors.encode(h.model), arrays="gradient"),
        "strategy 'fedavg' sums deltas, not gradients",
    ),
    "wrong length": (lambda h: h.with_arrays() + b"\0", r"payload has \d+ bytes, its header says"),
    "wrong digest": (lambda h: h.with_arrays()[:-1] + b"\x01", "does not match its sha256"),
    "larger than the model": (
        lambda h: h.frame(bytes(3 << 20)),
        "body of 3145728 bytes is above the model's",
    ),
    "larger than it is": (
        lambda h: encode(h.update(body=Where(where="inline", size_bytes=1 << 40, sha256="a" * 64))),
        "body of 1099511627776 bytes is above the model's",
    ),
    "chunks without an outbox": (
        lambda h: encode(h.update(body=Where(where="stream", size_bytes=9, sha256="a" * 64, chunks=1))),
        "p-bad has no outbox",
    ),
    "in a store that there is not": (
        lambda h: encode(h.update(body=Where(where="url", size_bytes=9, sha256="a" * 64, chunks=1))),
        "this aggregator was given none",
    ),
    "pickle": (lambda h: h.frame(pickle.dumps({"w": 1})), "tensor manifest"),
    "offsets too long to be written": (
        lambda h: h.frame(manifest([0], [10**4300 - 1] * 2)), "shape or offsets are beyond all memory",
    ),
    "an empty shape beyond all memory": (
        lambda h: h.frame(manifest([0, 1 << 47, 1 << 47], [0, 0])), "shape or offsets are beyond all memory",
    ),
    "unknown tensor": (lambda h: h.with_arrays(extra=np.zeros(1, F32)), "unknown tensor 'extra'"),
    "missing tensor": (lambda h: h.with_arrays(w=None), "tensor 'w' is missing"),
    "wrong shape": (lambda h: h.with_arrays(w=np.zeros(8, F32)), r"'w' has shape \(8,\), expected \(7,\)"),
    "wrong dtype": (lambda h: h.with_arrays(w=np.zeros(7)), "'w' has dtype float64, expected float32"),
    "out of bounds": (lambda h: h.with_arrays(w=np.full(7, 1e9, F32)), "'w' has values that are not finite or"),
    "NaN": (lambda h: h.with_arrays(w=np.full(7, np.nan, F32)), "'w' has values that are not finite or beyond"),
    "infinity": (lambda h: h.with_arrays(w=np.full(7, -np.inf, F32)), "'w' has values that are not finite or"),
    "an integer out of bounds": (
        lambda h: h.with_arrays(steps=np.full((), np.iinfo(np.int64).min)),
        "'steps' has values that are not finite or beyond",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forge", "reason"), FORGERIES.values(), ids=FORGERIES)
async def test_it_is_refused_with_the_reason_and_the_run_goes_on(
    forge: Forge, reason: str, undisturbed: HeadRecord, tmp_path: Path
) -> None:
    forged: list[bytes] = []

    async def act(hostile: Hostile) -> None:
        forged.append(forge(hostile))
        await hostile.say("update", forged[0])

    seen = await attacked(tmp_path, act)
    check(seen, [reason], undisturbed)
    quoted = seen.rejected[0][1]  # what was refused can be looked at
    assert forged[0].startswith(quoted)
    assert len(quoted) >= min(len(forged[0]), 1000)


async def test_the_ledger_says_which_task_was_refused(undisturbed: HeadRecord, tmp_path: Path) -> None:
    async def act(hostile: Hostile) -> None:
        await hostile.say("update", hostile.with_arrays(w=np.full(7, np.nan, F32)))
        await hostile.say("update", b"garbage")

    seen = await attacked(tmp_path, act)
    check(seen, ["not finite", "FLF"], undisturbed)
    assert [line.task for line in seen.ledger if line.verdict == "refused"] == [1, 0]


async def test_a_refused_update_may_be_sent_again_and_then_counts(tmp_path: Path) -> None:
    async def act(hostile: Hostile) -> None:
        await hostile.say("update", hostile.with_arrays(w=np.full(7, np.nan, F32)))
        await hostile.say("update", hostile.with_arrays())
        await hostile.say("update", hostile.with_arrays())

    seen = await attacked(tmp_path, act)
    assert [line.verdict for line in seen.ledger if line.participant == BAD][:2] == ["refused", "counted"]
    assert (seen.reports[0].accepted, seen.reports[0].rejected) == (4, 1)


async def test_updates_of_a_later_run_count_whatever_was_refused_before(
    undisturbed: HeadRecord, tmp_path: Path
) -> None:
    """A worker that comes from another run, with high task numbers, is not locked out of this one."""

    async def act(hostile: Hostile) -> None:
        await hostile.say("update", hostile.frame(run_id="run-0", task=900))
        await hostile.say("update", hostile.frame(run_id="run-0"))
        await asyncio.sleep(0.3)  # the others have answered: the round waits for this one all the same
        await hostile.say("update", hostile.with_arrays())

    seen = await attacked(tmp_path, act)
    assert [line.verdict for line in seen.ledger if line.participant == BAD] == ["refused", "refused", "counted"]
    assert seen.reports[0].accepted == 4


async def test_identity_is_checked_even_if_the_broker_lets_it_pass(undisturbed: HeadRecord, tmp_path: Path) -> None:
    """A broker whose operator forgot the permissions still says who sent a message."""

    async def act(hostile: Hostile) -> None:
        await hostile.connection.publish(TOPOLOGY.up, "p01.update", hostile.frame(participant="p01"))
        await hostile.connection.publish("", TOPOLOGY.updates, hostile.frame())

    seen = await attacked(tmp_path, act, broker_=MemoryBroker())
    check(seen, ["'p01' came from 'p-bad' with key 'p01.update'", "with key 'fl.default.updates'"], undisturbed)


# -- chunks ---------------------------------------------------------------------------------------------------

SIZE = 1000  # values: about four chunks


def chunk_frames(blob: Buffer, where: Where) -> list[bytes]:
    pieces = [bytes(blob[piece(where, index)]) for index in range(where.chunks)]
    return [encode(Chunk(of=where.sha256, index=i), p) for i, p in enumerate(pieces)]


def nothing_lost(frames: list[bytes]) -> list[bytes]:
    return frames


@pytest.mark.parametrize(
    ("change", "fields", "reason"),
    [
        pytest.param(lambda f: f[1:], {}, "1 of 4 chunks of .* are missing", id="a chunk misses"),
        pytest.param(lambda f: [], {}, "4 of 4 chunks of .* are missing", id="all chunks miss"),
        pytest.param(lambda f: [f[0][:-1], *f[1:]], {}, "chunk 0 of .* is damaged", id="a short chunk"),
        pytest.param(lambda f: [f[0] + b"x", *f[1:]], {}, "chunk 0 of .* is damaged", id="a long chunk"),
        pytest.param(lambda f: [b"garbage"], {}, "4 of 4 chunks of .* are missing", id="garbage"),
        pytest.param(nothing_lost, {"sha256": "f" * 64}, "chunks of f* are missing", id="another digest"),
        pytest.param(nothing_lost, {"chunks": 1 << 20}, "impossible", id="absurdly many chunks"),
        pytest.param(nothing_lost, {"chunks": 0}, "has no outbox|impossible", id="no chunks"),
        pytest.param(nothing_lost, {"size_bytes": 1 << 40}, "is above the model's", id="absurdly large"),
        pytest.param(nothing_lost, {"size_bytes": 4096}, "is damaged", id="another size"),
    ],
)
async def test_bad_chunks_are_refused_with_the_reason_and_the_run_goes_on(
    change: Callable[[list[bytes]], list[bytes]],
    fields: dict[str, object],
    reason: str,
    undisturbed_large: HeadRecord,
    tmp_path: Path,
) -> None:
    blob = tensors.encode({"w": np.zeros(SIZE, F32), "steps": np.zeros((), np.int64)})
    where = describe(blob, 0, 1100)

    async def act(hostile: Hostile) -> None:
        for frame in change(chunk_frames(blob, where)):
            await hostile.say(CHUNK, frame)
        await hostile.say("update", encode(hostile.update(body=where.model_copy(update=fields))))

    check(await attacked(tmp_path, act, size=SIZE, broker=CHUNKED), [reason], undisturbed_large)


async def test_garbage_in_its_outbox_does_not_spoil_what_comes_after(tmp_path: Path) -> None:
    blob = tensors.encode({"w": np.zeros(SIZE, F32), "steps": np.zeros((), np.int64)})
    where = describe(blob, 0, 1100)

    async def act(hostile: Hostile) -> None:
        for frame in (b"garbage", b"FLF\x02 of another version", *chunk_frames(blob, where)):
            await hostile.say(CHUNK, frame)
        await hostile.say("update", encode(hostile.update(body=where)))

    seen = await attacked(tmp_path, act, size=SIZE, broker=CHUNKED)
    assert [line.verdict for line in seen.ledger if line.participant == BAD] == ["counted"]


@pytest.fixture(scope="module")
def undisturbed_large(tmp_path_factory: pytest.TempPathFactory) -> HeadRecord:
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path_factory.mktemp("large"), names(3), SIZE)
    return asyncio.run(federation.run(settings(3, rounds=2, broker=CHUNKED)))


# -- bodies in a claim-check store ----------------------------------------------------------------------------


def stored(part: bytes, name: str = "00000", who: str = BAD) -> Callable[[Path, str], None]:
    """Puts a part of whatever body is named where that participant's updates are."""

    def put(share: Path, sha256: str) -> None:
        folder = share / TOPOLOGY.update_place(who, "run-1", "1") / sha256
        folder.mkdir(parents=True)
        (folder / name).write_bytes(part)

    return put


def linked(share: Path, sha256: str) -> None:
    """The body is another participant's, if links were followed."""
    stored(BODY, who="p09")(share, sha256)
    own = share / TOPOLOGY.update_place(BAD, "run-1", "1")
    own.mkdir(parents=True)
    (own / sha256).symlink_to(share / TOPOLOGY.update_place("p09", "run-1", "1") / sha256)


BODY = tensors.encode({"w": np.zeros(SIZE, F32), "steps": np.zeros((), np.int64)})
IN_STORE = describe(BODY, 0, MIN_PART_BYTES, "url")


@pytest.mark.parametrize(
    ("put", "fields", "reason"),
    [
        pytest.param(stored(b"", "other"), {}, "part 0 of 1 of .* is not in the store", id="nothing"),
        pytest.param(stored(BODY, who="p09"), {}, "part 0 of 1 of .* is not in the store", id="another's"),
        pytest.param(stored(BODY[:-1]), {}, "part 0 of 1 of .* or not whole", id="too short"),
        pytest.param(stored(BODY + b"x"), {}, "part 0 of .* in the store is longer than", id="too long"),
        pytest.param(stored(BODY[:-1] + b"x"), {}, "does not match its sha256", id="other bytes"),
        pytest.param(linked, {}, "its body cannot be read: .* Not a directory", id="a link to another's"),
        pytest.param(stored(BODY), {"chunks": 0}, "in 0 pieces are impossible", id="no parts"),
        pytest.param(stored(BODY), {"chunks": 2}, "in 2 pieces are impossible", id="too many parts"),
        pytest.param(stored(BODY), {"size_bytes": 1 << 40}, "is above the model's", id="absurdly large"),
        pytest.param(stored(BODY), {"size_bytes": 4096}, "in the store is longer than 4096", id="another size"),
        pytest.param(stored(BODY), {"stream": "../../other"}, None, id="a stream that nobody reads"),
    ],
)
async def test_bad_bodies_in_a_store_are_refused_with_the_reason_and_the_run_goes_on(
    put: Callable[[Path, str], None],
    fields: dict[str, object],
    reason: str | None,
    undisturbed_large: HeadRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.store.LONGEST_PAUSE_S", 0.01)
    share = tmp_path / "share"
    await asyncio.to_thread(share.mkdir)
    where = IN_STORE.model_copy(update=fields)

    async def act(hostile: Hostile) -> None:
        await asyncio.to_thread(put, share, where.sha256)
        await hostile.say("update", encode(hostile.update(body=where)))

    store = Store(Folder(share), "share")
    seen = await attacked(tmp_path, act, size=SIZE, store=store, broker={"inline_bytes": 0})
    if reason is None:
        assert [line.verdict for line in seen.ledger if line.participant == BAD] == ["counted"]
    else:
        check(seen, [reason], undisturbed_large)


# -- what the broker does not even let pass, and floods -------------------------------------------------------


async def test_the_broker_lets_nobody_speak_as_another_or_read_what_is_not_for_it(tmp_path: Path) -> None:
    broker = MemoryBroker(TOPOLOGY.access)
    refused = 0

    async def act(hostile: Hostile) -> None:
        nonlocal refused
        me, frame = hostile.connection, hostile.frame(participant="p01")
        for forbidden in (
            lambda: me.publish(TOPOLOGY.up, "p01.update", frame),
            lambda: me.publish(TOPOLOGY.up, "p01.chunk", frame),
            lambda: me.publish(TOPOLOGY.chunks("p01"), "p01.chunk", frame),
            lambda: me.publish(TOPOLOGY.down, "all", frame),
            lambda: me.publish("", TOPOLOGY.updates, frame),
            lambda: me.publish("", TOPOLOGY.head, encode(HeadRecord(epoch=99))),
            lambda: me.publish("", TOPOLOGY.outbox("p01"), frame),
            lambda: me.publish("", TOPOLOGY.inbox("p01"), frame),
            lambda: me.consume(TOPOLOGY.head),
            lambda: me.consume(TOPOLOGY.inbox("p01")),
            lambda: me.read(TOPOLOGY.updates, offset="first"),
            lambda: me.delete(TOPOLOGY.updates),
        ):
            with pytest.raises(AccessRefused):
                await forbidden()
            refused += 1

    seen = await attacked(tmp_path, act, broker_=broker)
    assert refused == 12
    assert seen.rejected == []
    assert [report.accepted for report in seen.reports] == [3, 3]


async def test_a_flood_is_counted_and_keeps_the_record_small(undisturbed: HeadRecord, tmp_path: Path) -> None:
    broker = MemoryBroker(TOPOLOGY.access)

    async def act(hostile: Hostile) -> None:
        for _ in range(30_000):
            await hostile.say("update", b"\xf0\x9f\x90\x87" * 20)
        await hostile.heard_again()

    seen = await attacked(tmp_path, act, broker_=broker)
    assert seen.head.finished
    assert [report.accepted for report in seen.reports] == [3, 3]
    assert seen.reports[0].rejected == 30_000
    assert seen.head.model == undisturbed.model
    assert broker.stats().queues[TOPOLOGY.head].published_bytes < 1 << 20
    assert 200 <= len(seen.rejected) < 5_000, "what is above the quota is not even read"
    assert any("more than broker.quota_per_s" in line.reason for line in seen.ledger)


async def test_what_is_above_the_quota_is_ignored_and_costs_nobody_else_a_thing(
    undisturbed: HeadRecord, tmp_path: Path
) -> None:
    """It floods with heartbeats that all would be answered; its own answer then counts like any other."""

    async def act(hostile: Hostile) -> None:
        holding = Heartbeat(participant=BAD, run_id="run-1", epoch=hostile.order.epoch, phase="holding", task=1)
        for _ in range(5_000):
            await hostile.say("heartbeat", encode(holding))
        await hostile.heard_again()
        await hostile.say("update", hostile.with_arrays())

    broker = MemoryBroker(TOPOLOGY.access)
    seen = await attacked(tmp_path, act, broker_=broker)
    assert [report.accepted for report in seen.reports] == [4, 3]
    assert seen.rejected == []
    assert broker.stats().queues[TOPOLOGY.inbox(BAD)].published < 1_000, "most were not answered"


async def test_metrics_cannot_spoil_the_record(tmp_path: Path) -> None:
    """Means beyond all floats, more names than fit, names that are too long."""
    invented = {f"{i:02d}" + "x" * 62: 1.7e308 for i in range(63)} | {"loss": -1.7e308}

    async def act(hostile: Hostile) -> None:
        blob = tensors.encode({name: np.zeros_like(values) for name, values in hostile.model.items()})
        await hostile.say("update", hostile.frame(blob, metrics=invented))

    seen = await attacked(tmp_path, act)
    assert [report.accepted for report in seen.reports] == [4, 3]
    assert np.isfinite(list(seen.reports[0].metrics.values())).all()
    assert "train_loss" in seen.head.metrics


# -- what ends whoever reads it ---------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process were gone: nothing in it gets to say anything more."""


async def test_an_update_that_kills_leaders_is_refused_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p03's update ends five leaders in the middle of reading it. The sixth does not read it."""
    federation = Federation(MemoryBroker(TOPOLOGY.access), tmp_path, names(3))
    honest, deaths = Intake.arrays, 0

    async def arrays(self: Intake, update: UpdateReady, *rest: Any) -> Arrays:
        nonlocal deaths
        if update.participant == "p03" and update.task == 1:
            deaths += 1
            raise Killed
        return await honest(self, update, *rest)

    monkeypatch.setattr(Intake, "arrays", arrays)
    run = settings(3, rounds=2, round={"quorum": 2, "deadline_s": 0.5})
    async with asyncio.timeout(60), federation.workers():
        while True:
            leader = asyncio.create_task(federation.aggregator(run).run())
            await asyncio.wait([leader])
            if not isinstance(leader.exception(), Killed):
                break
    head = leader.result()
    assert (head.finished, deaths) == ("all 2 rounds done", 5)
    lines = {(d.participant, d.task): d for d in await federation.ledger()}
    fates = {who: line.verdict for who, line in lines.items()}
    assert "it ended 5 leaders" in lines[("p03", 1)].reason
    assert fates[("p03", 1)] == "refused"
    assert {fates[(name, 1)] for name in ("p01", "p02")} == {"counted"}
    assert fates[("p03", 2)] == "counted", "it takes part in the next round"
