"""What fuzzing, and reading for it, found: one test each, with the smallest input that shows it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest

from aggregator.checkpoints import Checkpoints
from aggregator.history import History
from aggregator.lead import Lead
from aggregator.sums import FixedPointSum
from broker import tensors, wire
from broker.errors import BadMessage, ConfigError, StateError
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.messages import MAX_COUNT
from broker.topology import AGGREGATOR, Topology
from fluffle.layers import from_flags, from_toml
from fluffle.rundir import RunDir
from fluffle.secrets import read_secrets

DEEP = 20_000


def blob_of(manifest: bytes, values: bytes = b"") -> bytes:
    return len(manifest).to_bytes(8, "little") + manifest + values


def one_tensor(name: str = "w", shape: tuple[int, ...] = (0,), begin: int = 0, end: int = 0) -> bytes:
    return json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}).encode()


def frame(header: bytes) -> bytes:
    return b"FLF\x01" + len(header).to_bytes(4, "little") + header


# -- what one participant could send: each of these ended every aggregator, one after the other ---------------


def test_offsets_too_long_to_be_written_are_refused() -> None:
    """4300 nines can be read; with the manifest's length added they cannot be put into words."""
    nines = 10**4300 - 1
    with pytest.raises(BadMessage, match="beyond all memory") as refused:
        tensors.decode(blob_of(one_tensor(begin=nines, end=nines)))
    assert len(refused.value.reason) < 1000


def test_a_shape_that_numpy_cannot_count_is_refused_though_it_is_empty() -> None:
    with pytest.raises(BadMessage, match="beyond all memory"):
        tensors.decode(blob_of(one_tensor(shape=(0, 1 << 47, 1 << 47))))


# -- what one participant could spoil -------------------------------------------------------------------------


def test_infinity_is_refused_where_the_bound_itself_is_infinite_in_float16() -> None:
    total = FixedPointSum(100, 1000)
    total.start({"w": np.full(2, 6e4, np.float16)})
    for value in (np.inf, -np.inf, np.nan):
        with pytest.raises(BadMessage, match="not finite or beyond"):
            total.add({"w": np.array([1.0, value], np.float16)}, 1)
    total.add({"w": np.ones(2, np.float16)}, 1)


@pytest.mark.parametrize(
    ("dtype", "start", "change", "end"),
    [
        (np.int8, 100, 100, 127),
        (np.int8, -100, -100, -128),
        (np.int16, 32_000, 900, 32_767),
        (np.float16, 6.5e4, 6.5e4, 65_504),
    ],
)
def test_narrow_types_stop_at_their_limit_rather_than_turn_over(
    dtype: type, start: float, change: float, end: float
) -> None:
    total, model = FixedPointSum(100, 1000), {"w": np.full(2, start, dtype)}
    total.start(model)
    total.add({"w": np.full(2, change, dtype)}, 1)
    assert total.step(model, 1.0)["w"].tolist() == [end, end]


# -- what would not be understood by others ------------------------------------------------------------------


def test_a_manifest_is_utf8_and_nothing_else() -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        with pytest.raises(BadMessage, match="not valid JSON"):
            tensors.decode(blob_of(one_tensor().decode().encode(encoding)))


def test_a_name_that_cannot_be_written_again_is_refused() -> None:
    with pytest.raises(BadMessage, match="no name of a tensor"):
        tensors.decode(blob_of(one_tensor(name="\ud800")))


# -- memory and time ------------------------------------------------------------------------------------------


def test_promises_inside_promises_take_no_memory() -> None:
    """Each of 900 arrays promised 32768 items: room was made for all of them."""
    nested = (b"\xdd\x00\x00\x80\x00" * 900).ljust(40_000, b"\0")
    assert peak_of(frame(nested)) < 1 << 20


def test_a_list_of_many_faults_is_not_written() -> None:
    """It took 600 times the memory of the message."""
    told = {
        "kind": "round", "run_id": "r", "epoch": 1, "seq": 1, "task": 1, "round": 1, "attempt": 1, "work": "none",
        "asked": (0,) * 20_000, "version": 0, "model": None,
    }  # fmt: skip
    assert peak_of(frame(msgpack.packb(told))) < 1 << 20
    with pytest.raises(BadMessage, match="20000 faults in its fields"):
        wire.decode(frame(msgpack.packb(told)))


def peak_of(bomb: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            wire.decode(bomb)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- files ----------------------------------------------------------------------------------------------------


def test_a_manifest_nested_too_deep_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "v000001.json").write_bytes(b"[" * DEEP)
    assert checkpoints.newest() is None


def test_a_result_nested_too_deep_is_damaged(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.result_file.write_bytes(b'{"a":' * DEEP)
    with pytest.raises(StateError, match="cannot be read"):
        run.result()


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * DEEP, "a = " + "9" * 5000, "a" + ".a" * 5000 + " = 1"],
    ids=["lists in lists", "a long number", "tables in tables"],
)
def test_toml_that_is_too_deep_or_too_long_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="not valid TOML"):
        from_toml(file)
    with pytest.raises(ConfigError, match=r"is not TOML|has no password as text"):
        read_secrets(file)


def test_a_flag_nested_too_deep_is_text() -> None:
    assert from_flags({}, ["train.lr=" + "[" * DEEP])["train.lr"].value == "[" * DEEP


def test_a_history_that_sqlite_itself_cannot_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    History(path).close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE ledger", b"CREATE TABL\x9f ledger"))
    with pytest.raises(StateError, match="the run history cannot be read"):
        History(path)


# -- the head record ------------------------------------------------------------------------------------------


async def test_a_record_after_which_no_epoch_can_come_is_no_record() -> None:
    topology = Topology("default")
    aggregator = await MemoryBroker(topology.access).connect(AGGREGATOR, purpose="lead")
    await aggregator.declare(*topology.aggregator_declarations())
    await aggregator.publish("", topology.head, wire.encode(HeadRecord(epoch=5, by="former")))
    await aggregator.publish("", topology.head, wire.encode(HeadRecord(epoch=MAX_COUNT, by="forged")))
    lead = await Lead(aggregator, aggregator, topology, "me", patience_s=5.0).acquire()
    assert (lead.record.epoch, lead.record.by) == (6, "me")
