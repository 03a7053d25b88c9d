"""Frames: every message comes back as it was, and no bytes do more than be refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import BadMessage
from broker.head import Best, ClosedRound, Decision, HeadRecord, Obeyed, OpenRound
from broker.messages import (
    MAX_COUNT,
    MAX_ITEMS,
    Answer,
    Barrier,
    Chunk,
    Control,
    Heartbeat,
    Join,
    Leave,
    Message,
    Rejected,
    TrainFailed,
    TrainRound,
    UpdateReady,
    Where,
)
from broker.wire import (
    FROM_AGGREGATOR,
    FROM_PARTICIPANT,
    KINDS,
    MAGIC,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    SCHEMA,
    Limits,
    decode,
    encode,
)
from tests.fuzz import mutations

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
# Types whose constraints are regular expressions are spelled out; Hypothesis finds the rest from the annotations.
SHA256 = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
PARTICIPANT = st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True)
RUN = st.from_regex(r"[a-z0-9-]{1,60}", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = st.integers(0, MAX_COUNT)
METRICS = st.dictionaries(TEXT, FLOATS, max_size=3)
SCALARS = st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | FLOATS | TEXT
FATE = st.tuples(COUNT, st.sampled_from(["counted", "late", "refused", "missing"]))
FATES = st.dictionaries(PARTICIPANT, FATE, max_size=3)
COHORT = st.lists(PARTICIPANT, max_size=3).map(tuple)
WORK = st.sampled_from(["train", "evaluate"])
WHERE = st.builds(
    Where,
    where=st.sampled_from(["inline", "stream"]),
    size_bytes=st.integers(0, 1 << 40),
    sha256=SHA256,
    stream=TEXT,
    first_offset=COUNT,
    chunks=st.integers(0, MAX_ITEMS),
)
STATUS = {
    "participant": PARTICIPANT,
    "run_id": RUN | st.just(""),
    "epoch": COUNT,
    "phase": st.sampled_from(["idle", "training", "holding"]),
    "task": COUNT,
}
OPEN = st.builds(
    OpenRound,
    work=WORK,
    round=COUNT,
    attempt=st.integers(1, MAX_COUNT),
    task=COUNT,
    epoch=COUNT,
    cohort=COHORT,
    opened=FLOATS,
    deadline=FLOATS,
    allowed_s=FLOATS,
)
DECISION = st.builds(
    Decision,
    offset=COUNT,
    participant=TEXT,
    task=COUNT,
    verdict=st.sampled_from(["counted", "late", "refused", "duplicate"]),
    weight=COUNT,
    staleness=COUNT,
    reason=TEXT,
)
CLOSED = st.builds(
    ClosedRound,
    work=WORK,
    round=COUNT,
    attempt=COUNT,
    task=COUNT,
    cohort=COUNT,
    opened=FLOATS,
    closed=FLOATS,
    bytes_up=COUNT,
    bytes_down=COUNT,
    unlisted=COUNT,
)
MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    Join: st.builds(Join, **STATUS, software=TEXT),
    Heartbeat: st.builds(Heartbeat, **STATUS),
    Leave: st.builds(Leave, participant=PARTICIPANT, reason=TEXT),
    UpdateReady: st.builds(
        UpdateReady,
        participant=PARTICIPANT,
        run_id=RUN,
        epoch=COUNT,
        task=COUNT,
        base_sha256=SHA256,
        arrays=st.sampled_from(["delta", "gradient", "none"]),
        num_examples=st.integers(1, MAX_COUNT),
        metrics=METRICS,
        seconds=st.floats(0, allow_infinity=False),
        body=st.none() | WHERE,
    ),
    TrainFailed: st.builds(TrainFailed, participant=PARTICIPANT, run_id=RUN, task=COUNT, error=TEXT),
    TrainRound: st.builds(
        TrainRound,
        run_id=RUN,
        epoch=COUNT,
        seq=COUNT,
        task=COUNT,
        round=COUNT,
        attempt=COUNT,
        work=WORK | st.just("none"),
        asked=COHORT,
        version=COUNT,
        model=st.none() | WHERE,
        settings=st.dictionaries(TEXT, SCALARS, max_size=3),
        wants=st.sampled_from(["delta", "gradient"]),
        seed=COUNT,
        deadline_s=st.floats(0, allow_infinity=False),
        late_counts=st.booleans(),
        fates=FATES,
        finished=st.booleans(),
    ),
    Chunk: st.builds(Chunk, of=SHA256, index=st.integers(0, MAX_ITEMS - 1)),
    Barrier: st.builds(Barrier, nonce=TEXT),
    Control: st.builds(Control, command=st.sampled_from(["pause", "resume", "stop"]), run_id=RUN, nonce=TEXT)
    | st.builds(Control, command=st.sampled_from(["remove", "admit"]), participant=PARTICIPANT, nonce=TEXT),
    Answer: st.builds(Answer, nonce=TEXT, done=st.booleans(), text=TEXT),
    Rejected: st.builds(Rejected, offset=COUNT, participant=TEXT, reason=TEXT),
    HeadRecord: st.builds(
        HeadRecord,
        run_id=RUN | st.just(""),
        epoch=COUNT,
        seq=COUNT,
        by=TEXT,
        started=FLOATS,
        version=COUNT,
        round=COUNT,
        task=COUNT,
        model=st.none() | WHERE,
        state=st.none() | WHERE,
        previous=st.none() | WHERE,
        lineage=st.lists(st.tuples(COUNT, COUNT, SHA256), max_size=3).map(tuple),
        open=st.none() | OPEN,
        closed=st.none() | CLOSED,
        updates_from=COUNT,
        members=COHORT,
        settled=FATES,
        decided=st.lists(DECISION, max_size=3).map(tuple),
        metrics=METRICS,
        best=st.none() | st.builds(Best, version=COUNT, round=COUNT, value=FLOATS, sha256=SHA256),
        wanted=st.sampled_from(["run", "pause", "stop"]),
        removed=COHORT,
        obeyed=st.none() | st.builds(Obeyed, nonces=st.lists(TEXT, max_size=3).map(tuple), removed=COHORT),
        finished=TEXT,
    ),
}


def frame(header: bytes, payload: bytes = b"", schema: int = SCHEMA) -> bytes:
    """A frame around any header, as somebody else might write it."""
    return b"".join((MAGIC, bytes((schema,)), len(header).to_bytes(4, "little"), header, payload))


def header(**fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


JOIN = {"kind": "join", "participant": "p01"}
UPDATE = {
    "kind": "update", "participant": "p01", "run_id": "run-1", "epoch": 1, "task": 1, "base_sha256": "a" * 64,
    "arrays": "none", "num_examples": 1,
}  # fmt: skip


def an_update(**changes: object) -> UpdateReady:
    return UpdateReady(**{name: value for name, value in {**UPDATE, **changes}.items() if name != "kind"})


# -- what comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_message_comes_back_as_it_was(kind: type[Message]) -> None:
    @given(message=MESSAGES[kind], payload=st.binary(max_size=20))
    @settings(max_examples=40, deadline=None)
    def comes_back(message: Message, payload: bytes) -> None:
        found, behind = decode(encode(message, payload))
        assert (type(found), found, behind) == (kind, message, payload)
        assert [type(value) for value in dict(found).values()] == [type(value) for value in dict(message).values()]

    comes_back()


def test_what_participants_send_fits_their_limits_at_its_largest() -> None:
    """The widest characters, the longest texts, the most metrics."""
    wide = "\U0001f407"
    where = Where(where="stream", size_bytes=1 << 40, sha256="a" * 64, stream=wide * 200, chunks=MAX_ITEMS)
    metrics = {wide * 62 + f"{i:02d}": 0.1 for i in range(64)}
    largest = an_update(arrays="delta", metrics=metrics, body=where)
    for message in (
        largest,
        TrainFailed(participant="p" * 40, run_id="r" * 60, task=MAX_COUNT, error=wide * 2000),
        Join(participant="p" * 40, software=wide * 200),
    ):
        assert decode(encode(message), FROM_PARTICIPANT)[0] == message


def test_the_payload_is_a_view_of_the_frame() -> None:
    whole = encode(Barrier(nonce="n"), b"payload")
    assert decode(whole)[1].obj is whole


def test_a_message_for_a_large_federation_fits() -> None:
    cohort = tuple(f"participant-{i}" for i in range(100_000))
    told = TrainRound(
        run_id="r", epoch=1, seq=1, task=1, round=1, attempt=1, work="train", asked=cohort, version=0, model=None
    )
    assert decode(encode(told))[0] == told


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "does not begin with 'FLF'"),
        (b"FLF\x01", "does not begin with 'FLF'"),
        (b"XLF" + frame(header(**JOIN))[3:], "does not begin with 'FLF'"),
        (frame(header(**JOIN), schema=2), "schema version 2 is not supported: this side speaks version 1"),
        (frame(header(**JOIN), schema=0), "schema version 0"),
        (frame(header(**JOIN))[:-1], "header length .* exceeds the frame"),
        (MAGIC + b"\x01\xff\xff\xff\xff" + b"x" * 100, "header length 4294967295 exceeds the frame"),
        (bytes(MAX_FRAME_BYTES + 1), "larger than the limit"),
        (frame(b""), "not valid msgpack"),
        (frame(b"\xc1"), "not valid msgpack"),
        (frame(header(**JOIN) + b"\0"), "not valid msgpack: ExtraData"),
        (frame(b"\x07"), "not a map with a 'kind'"),
        (frame(b"\x90"), "not a map with a 'kind'"),
        (frame(header(participant="p01")), "not a map with a 'kind'"),
        (frame(header(kind=7)), "not a map with a 'kind'"),
        (frame(header(kind="nonsense")), "unknown kind of message 'nonsense'"),
        (frame(msgpack.packb({"kind": "join", 7: 7})), "not valid msgpack"),
        (frame(msgpack.packb({"kind": "join", b"participant": "p01"})), "join message|not valid msgpack"),
        (frame(msgpack.packb({"kind": "leave", "participant": b"p01"})), "field 'participant'"),
        (frame(msgpack.packb({"kind": "leave", "participant": b"p" * 33})), "not valid msgpack"),
        (frame(header(**UPDATE | {"base_sha256": b"\0" * 31})), "field 'base_sha256'"),
        (frame(header(kind="join")), "field 'participant': Field required"),
        (frame(header(**JOIN, colour="red")), "field 'colour': Extra inputs are not permitted"),
        (frame(header(**JOIN, task="7")), "field 'task': Input should be a valid integer"),
        (frame(header(**JOIN, task=7.0)), "field 'task'"),
        (frame(header(**JOIN, task=True)), "field 'task'"),
        (frame(header(**JOIN, task=-1)), "field 'task'"),
        (frame(header(**JOIN, task=MAX_COUNT + 1)), "field 'task'"),
        (frame(header(**JOIN, phase="asleep")), "field 'phase'"),
        (frame(header(**JOIN, software="x" * 201)), "field 'software'"),
        (frame(header(**UPDATE, metrics={"loss": float("nan")})), "field 'metrics.loss'"),
        (frame(header(**UPDATE, metrics={"loss": float("inf")})), "field 'metrics.loss'"),
        (frame(header(**UPDATE, metrics={str(i): 0.0 for i in range(65)})), "field 'metrics'|not valid msgpack"),
        (frame(header(**UPDATE, seconds=float("-inf"))), "field 'seconds'"),
        (frame(header(**UPDATE, seconds=-1.0)), "field 'seconds'"),
        (frame(header(**{**UPDATE, "num_examples": 0})), "field 'num_examples'"),
        (frame(header(**{**UPDATE, "base_sha256": "A" * 64})), "field 'base_sha256'"),
        (frame(header(**UPDATE, body={"where": "inline", "size_bytes": 1})), "field 'body.sha256'"),
        (frame(header(**UPDATE, body=[1, 2])), "field 'body'"),
        (frame(header(kind="barrier", nonce=["n"])), "field 'nonce'"),
    ],
)  # fmt: skip
def test_what_is_not_well_formed_is_refused_with_the_reason(bad: bytes, reason: str) -> None:
    with pytest.raises(BadMessage, match=reason):
        decode(bad)


@pytest.mark.parametrize("name", ["", "P01", "p.01", "p01\n", "p 01", "p/01", "p" * 41, "pé", "#", "*"])
def test_a_name_with_other_characters_is_refused(name: str) -> None:
    with pytest.raises(BadMessage, match="field 'participant'"):
        decode(frame(header(kind="join", participant=name)))


def test_a_setting_that_is_not_finite_is_refused() -> None:
    told = {
        "kind": "round", "run_id": "r", "epoch": 1, "seq": 1, "task": 1, "round": 1, "attempt": 1, "work": "none",
        "asked": (), "version": 0, "model": None,
    }  # fmt: skip
    assert decode(frame(header(**told, settings={"lr": 0.1})))
    with pytest.raises(BadMessage, match=r"settings\.lr"):
        decode(frame(header(**told, settings={"lr": float("nan")})))


def test_a_frame_too_large_for_the_broker_is_not_written() -> None:
    room = MAX_FRAME_BYTES - len(encode(Barrier(nonce="n")))
    assert len(encode(Barrier(nonce="n"), bytes(room))) == MAX_FRAME_BYTES
    with pytest.raises(BadMessage, match=r"barrier message of .* is above .*: send its payload in chunks"):
        encode(Barrier(nonce="n"), bytes(room + 1))


def test_a_header_longer_than_the_senders_limit_is_refused() -> None:
    large = frame(header(kind="barrier", nonce="n" * FROM_PARTICIPANT.header_bytes))
    with pytest.raises(BadMessage, match="exceeds the frame or the limit of 65536"):
        decode(large, FROM_PARTICIPANT)
    with pytest.raises(BadMessage, match="field 'nonce'"):
        decode(large)
    with pytest.raises(BadMessage, match="exceeds the frame or the limit of 8388608"):
        decode(frame(bytes(MAX_HEADER_BYTES + 1)))


@pytest.mark.parametrize("code", [b"\xdd", b"\xdf"], ids=["array", "map"])
@pytest.mark.parametrize("items", [65, MAX_ITEMS - 1, MAX_ITEMS + 1, (1 << 32) - 1])
def test_a_promise_of_many_items_is_refused_before_there_is_room_made_for_them(code: bytes, items: int) -> None:
    bomb = frame(code + items.to_bytes(4, "big") + b"\xc0" * 100)
    for limits in (FROM_PARTICIPANT, FROM_AGGREGATOR):
        assert peak_of(bomb, limits) < 1 << 20


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"\xdd\x00\x00\x00\x40" * 12_000, id="arrays of 64 in arrays"),
        pytest.param(b"\xdd\x00\x0f\x00\x00" * 12_000, id="arrays of a million in arrays"),
        pytest.param(b"\xdc\xff\xff" * 1000, id="arrays of 65535 in arrays"),
        pytest.param(b"\x91" * 60_000, id="deep arrays"),
        pytest.param(b"\x81\xa1a" * 20_000, id="deep maps"),
        pytest.param(b"\xdc\xff\xff" + b"\x80" * 65_000, id="many maps"),
        pytest.param((b"\xdc\x00\x40" + b"\x80" * 64) * 900, id="many short arrays of maps"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="a string of 4 GiB"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes of 4 GiB"),
        pytest.param(b"\xc9\xff\xff\xff\xff\x01", id="an extension of 4 GiB"),
        pytest.param(b"\xc7\x00\xff", id="an empty timestamp"),
        pytest.param(b"\xd7\xff" + b"\xff" * 8, id="a timestamp"),
    ],
)
def test_no_participant_makes_us_unpack_much(bomb: bytes) -> None:
    assert peak_of(frame(bomb), FROM_PARTICIPANT) < 4 << 20


def peak_of(bomb: bytes, limits: Limits) -> int:
    """Bytes allocated while the bomb is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            decode(bomb, limits)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_mutation_of_a_frame_does_more_than_be_refused() -> None:
    where = Where(where="inline", size_bytes=3, sha256="a" * 64)
    update = an_update(arrays="delta", metrics={"loss": 0.5}, body=where)
    head = HeadRecord(
        run_id="run-1",
        lineage=((1, 0, "a" * 64),),
        settled={"p01": (1, "late")},
        decided=(Decision(epoch=1, offset=1, participant="p01", task=1, verdict="late"),),
    )
    for number, message in enumerate((update, head, Join(participant="p01"), Chunk(of="a" * 64, index=1))):
        understood = 0
        for damaged in mutations(encode(message, b"abc"), 3000, seed=number):
            try:
                found, payload = decode(damaged, FROM_PARTICIPANT)
            except BadMessage:
                continue
            understood += 1
            assert type(found) in KINDS.values()
            assert len(payload) < len(damaged)
        assert understood > 20


@pytest.mark.parametrize("chunks", [0, 20])
def test_the_envelope_of_an_update_is_small(chunks: int) -> None:
    """Everything that is not the body: names as they are in practice, a metric, and two digests."""
    where = Where(where="stream" if chunks else "inline", size_bytes=20_000_000, sha256="a" * 64, chunks=chunks)
    update = an_update(
        participant="p07", run_id="digits-20261125-183012-4f2a", epoch=2, task=120, base_sha256="b" * 64,
        arrays="delta", num_examples=96_000, metrics={"loss": 0.25}, seconds=12.5, codec="topk:0.01+zstd",
        body=where,
    )  # fmt: skip
    assert len(encode(update)) <= 300
