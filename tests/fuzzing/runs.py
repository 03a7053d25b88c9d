"""Targets on the embedded broker: what lies in the head queue, and what a participant of the cohort sends."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np

from aggregator.archive import Archive
from aggregator.daemon import Term
from aggregator.job import Job, Surroundings
from aggregator.lead import Lead
from broker import tensors, wire
from broker.errors import BadMessage
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.messages import FromParticipant, Heartbeat, Join, Leave, Message, TrainFailed, UpdateReady
from broker.payloads import MIN_CHUNK_BYTES, describe
from broker.topology import AGGREGATOR, CHUNK, Topology
from broker.transport import Delivery, Transport
from tests.federation import settings
from tests.fuzzing import mutate
from tests.fuzzing.decoders import FRAMES, HEAD, MODEL, chunked
from tests.fuzzing.engine import Target

RUN_SPARE_BYTES = 4 << 20
TOPOLOGY = Topology("default")
HONEST, BAD = "p01", "p-bad"
NOW = 1e9  # Unix seconds; no time passes, so nobody is forgotten and no deadline passes


# -- the head queue -------------------------------------------------------------------------------------------


def lead(directory: Path) -> Target:
    """Whatever lies in the head queue, an aggregator comes to lead, from the newest record that can be read."""
    records = [HEAD, HEAD.with_(epoch=7, obeyed=None), HeadRecord(by="x")]
    seed = mutate.pack([wire.encode(record, b"model") for record in records])
    ways = mutate.each_part(mutate.either(mutate.frame, mutate.frame, mutate.raw(mutate.PACKED)))

    def check(data: bytes) -> None:
        asyncio.run(_comes_to_lead(mutate.unpack(data, most=6)))

    return Target(check, (seed, mutate.pack(list(FRAMES[-6:]))), ways, (), spare_bytes=RUN_SPARE_BYTES)


async def _comes_to_lead(lying: list[bytes]) -> None:
    broker = MemoryBroker(TOPOLOGY.access)
    reader = await broker.connect(AGGREGATOR, purpose="lead")
    await reader.declare(*TOPOLOGY.aggregator_declarations())
    for frame in lying:
        await reader.publish("", TOPOLOGY.head, frame)
    led = await Lead(reader, reader, TOPOLOGY, "me", patience_s=2.0).acquire()
    await led.commit(led.record.with_(seq=1), led.payload)
    assert led.record.by == "me"
    assert led.record.epoch > max((r.epoch for r in map(_record, lying) if r and r.epoch < 1 << 53), default=0)


def _record(frame: bytes) -> HeadRecord | None:
    try:
        message, _ = wire.decode(frame)
    except BadMessage:
        return None
    return message if isinstance(message, HeadRecord) else None


# -- one hostile message in the middle of a round -------------------------------------------------------------


class Hall:
    """A leader in the middle of a round with one honest participant and one that says whatever it likes.

    After each message the leader forgets what it decided since its record, as a new leader would.
    """

    def __init__(self, directory: Path, model: tensors.Arrays, inline_bytes: int) -> None:
        self._directory, self._loop = directory, asyncio.new_event_loop()
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self.archive, self.model = Archive(directory), model
        self.blob = tensors.encode(model)
        self.run = settings(2, broker={"inline_bytes": inline_bytes, "chunk_bytes": MIN_CHUNK_BYTES})
        self.term: Term
        self.bad: Transport
        self._loop.run_until_complete(self._open())

    def hear(self, said: bytes, pieces: list[bytes]) -> None:
        self._loop.run_until_complete(asyncio.wait_for(self._hear(said, pieces), 30.0))

    def close(self) -> None:
        self._loop.run_until_complete(self.archive.close())
        self._loop.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _open(self) -> None:
        broker = MemoryBroker(TOPOLOGY.access)
        reader = await broker.connect(AGGREGATOR, purpose="lead")
        await reader.declare(*TOPOLOGY.aggregator_declarations())
        self.bad = await broker.connect(BAD, purpose="publish")
        for name in (HONEST, BAD):
            await (await broker.connect(name, purpose="publish")).declare(*TOPOLOGY.inbox_declarations(name))
        leader = await Lead(reader, reader, TOPOLOGY, "me", patience_s=5.0).acquire()
        job = Job(self.run, initial=lambda: self.model)
        around = Surroundings(lambda: NOW, lambda report: None, lambda event, fields: None)
        self.term = Term(job, leader, TOPOLOGY, self.archive, around)
        await self.term._take_over()
        self.term.position = self.term.end + 1
        for name in (HONEST, BAD):
            await self._receive(name, wire.encode(Join(participant=name)))
        await self.term._advance(NOW)
        assert self.term.head.open is not None
        assert set(self.term.head.open.cohort) == {HONEST, BAD}

    async def _hear(self, said: bytes, pieces: list[bytes]) -> None:
        for piece in pieces:
            await self.bad.publish(TOPOLOGY.chunks(BAD), f"{BAD}.{CHUNK}", piece)
        await self._receive(BAD, said)
        blob = tensors.encode({name: np.ones_like(values) for name, values in self.model.items()})
        await self._receive(HONEST, wire.encode(self.update(HONEST, blob), blob))
        self._check()
        self.term._start_round()

    def _check(self) -> None:
        term = self.term
        assert term.round is not None
        assert HONEST in term.round.accepted
        assert [line.verdict for line in term.ledger.decided if line.participant == HONEST] == ["counted"]
        moved = term.strategy.finish()
        assert all(np.isfinite(values).all() for values in moved.values())
        term.strategy.start(moved, term.strategy.state)  # the next round can begin
        wire.encode(term.head.with_(settled=term.ledger.settled, decided=tuple(term.ledger.decided)))

    async def _receive(self, sender: str, body: bytes) -> None:
        key = f"{sender}.{_kind(body)}"
        await self.term._receive(Delivery(body, key, sender, _settled, self.term.position))

    def update(self, name: str, blob: bytes, **changes: object) -> UpdateReady:
        head = self.term.head
        assert head.open
        assert head.model
        return UpdateReady(**{  # type: ignore[arg-type]
            "participant": name, "run_id": "run-1", "epoch": head.epoch, "task": head.open.task, "arrays": "delta",
            "base_sha256": head.model.sha256, "num_examples": 10, "metrics": {"loss": 1.0},
            "body": describe(blob, 1 << 30, 1), **changes,
        })  # fmt: skip


async def _settled(*, accept: bool, requeue: bool) -> None:
    pass


def _kind(body: bytes) -> str:
    """The broker lets it speak under any key of its own: the one that fits is the most dangerous."""
    try:
        return wire.decode(body, wire.FROM_PARTICIPANT)[0].kind
    except BadMessage:
        return "update"


def updates(directory: Path) -> Target:
    """One message in `updates`: it counts or is refused, the leader goes on, and an honest update counts."""
    model = {name: values for name, values in MODEL.items() if name != "f64"}
    hall = Hall(directory, model, 1 << 20)
    zeros = {name: np.zeros_like(values) for name, values in model.items()}
    high = {name: np.full_like(values, 100) for name, values in model.items()}
    frames = [wire.encode(hall.update(BAD, blob), blob) for blob in (tensors.encode(zeros), tensors.encode(high))]
    status = {"participant": BAD, "run_id": "run-1", "epoch": 1, "task": 1}
    others: list[FromParticipant] = [
        Join(**status, phase="holding"),
        Heartbeat(**status, phase="training"),
        TrainFailed(participant=BAD, run_id="run-1", task=1, error="no"),
        Leave(participant=BAD),
        hall.update(BAD, b"", arrays="none", body=None),
    ]
    seeds = (*frames, *frames, *map(_encoded, others), FRAMES[-2])
    ways = mutate.either(mutate.frame, _with_other_arrays, _with_other_arrays, mutate.raw(mutate.PACKED))
    return Target(lambda data: hall.hear(data, []), seeds, ways, (), spare_bytes=RUN_SPARE_BYTES, close=hall.close)


def _encoded(message: Message) -> bytes:
    return wire.encode(message)


def _with_other_arrays(data: bytes, dice: mutate.Random) -> bytes:
    """An update whose body changed, and whose size and digest are those of the changed one."""
    try:
        message, payload = wire.decode(data)
    except BadMessage:
        return mutate.frame(data, dice)
    if not isinstance(message, UpdateReady) or not message.body:
        return mutate.frame(data, dice)
    blob = mutate.safetensors(bytes(payload), dice)
    return wire.encode(message.model_copy(update={"body": describe(blob, 1 << 30, 1)}), blob)


def outbox(directory: Path) -> Target:
    """Chunks in the outbox of one, and the update that announces them."""
    model = {"w": np.zeros(700, np.float32)}
    hall = Hall(directory, model, 0)
    where = describe(hall.blob, 0, MIN_CHUNK_BYTES)
    announced = wire.encode(hall.update(BAD, hall.blob, body=where))

    def check(data: bytes) -> None:
        said, *pieces = mutate.unpack(data, most=12) or [b""]
        hall.hear(said, pieces)

    ways = mutate.each_part(mutate.frame, mutate.either(mutate.frame, mutate.raw(mutate.PACKED)))
    seeds = (chunked(hall.blob, where, announced),)
    return Target(check, seeds, ways, (), spare_bytes=RUN_SPARE_BYTES, close=hall.close)
