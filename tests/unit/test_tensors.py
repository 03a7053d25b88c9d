"""Tensors as bytes: the safetensors format to the byte, no copies, and nothing but BadMessage for bad bytes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker.errors import BadMessage
from broker.tensors import (
    CODES,
    MAX_DIMENSIONS,
    MAX_NAME,
    Arrays,
    check_like,
    decode,
    encode,
    encode_buffers,
)
from tests.fuzz import mutations

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda n: n != "__metadata__")
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.dictionaries(
    NAMES, st.sampled_from(list(CODES)).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)), max_size=6
)


def blob_of(manifest: Mapping[str, object] | str, values: bytes = b"") -> bytes:
    """A file as somebody else might write it."""
    header = (manifest if isinstance(manifest, str) else json.dumps(manifest)).encode()
    return len(header).to_bytes(8, "little") + header + values


def entry(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def identical(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(
        (a.dtype, a.shape, a.tobytes()) == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name, a in one.items()
    )


# -- what is written ------------------------------------------------------------------------------------------


@given(arrays=ARRAYS)
@settings(deadline=None)
def test_the_bytes_are_those_of_the_safetensors_library(arrays: Arrays) -> None:
    assert encode(arrays) == safetensors.numpy.save(arrays)


@given(arrays=ARRAYS)
@settings(deadline=None)
def test_arrays_come_back_as_they_were(arrays: Arrays) -> None:
    assert identical(decode(encode(arrays)), arrays)


@given(arrays=ARRAYS)
@settings(deadline=None)
def test_what_the_library_writes_can_be_read(arrays: Arrays) -> None:
    assert identical(decode(safetensors.numpy.save(arrays, metadata={"format": "np"})), arrays)


@given(arrays=ARRAYS, data=st.data())
@settings(deadline=None)
def test_equal_arrays_give_equal_bytes(arrays: Arrays, data: st.DataObject) -> None:
    names = data.draw(st.permutations(list(arrays)))
    assert encode({name: arrays[name].copy() for name in names}) == encode(arrays)


def test_what_is_not_contiguous_or_little_endian_is_written_as_it_reads() -> None:
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    for array in (square.T, square[::2, ::-1], square.astype(">f4")):
        assert (decode(encode({"w": array}))["w"] == array).all()


def test_writing_copies_no_values() -> None:
    array = np.ones((50, 3), np.float32)
    *_, values = encode_buffers({"w": array})
    assert np.shares_memory(np.frombuffer(values, np.float32), array)


def test_reading_copies_no_values_and_lets_nobody_write() -> None:
    blob = bytearray(encode({"w": np.ones(5, np.float32), "v": np.ones(3)}))
    for array in decode(blob).values():
        assert np.shares_memory(array, np.frombuffer(blob, np.uint8))
        assert not array.flags.writeable


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]"])
def test_a_dtype_that_does_not_travel_is_named(dtype: str) -> None:
    with pytest.raises(BadMessage, match=r"'w' has dtype .*, which does not travel: use I64, F64"):
        encode({"w": np.zeros(2, dtype)})


# -- what is refused ------------------------------------------------------------------------------------------

GOOD = encode({"w": np.arange(4, dtype=np.float32), "n": np.arange(2)})


@pytest.mark.parametrize("length", [*range(16), len(GOOD) // 2, len(GOOD) - 1])
def test_a_truncated_blob_is_refused(length: int) -> None:
    with pytest.raises(BadMessage):
        decode(GOOD[:length])


HUGE = 1 << 62
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(GOOD + b"\0", id="extra bytes"),
        pytest.param((1 << 63).to_bytes(8, "little") + GOOD[8:], id="huge manifest length"),
        pytest.param(blob_of("[]"), id="no map"),
        pytest.param(blob_of("7"), id="a number"),
        pytest.param(blob_of('{"w":'), id="half a map"),
        pytest.param(blob_of("\x00\xff"), id="no JSON"),
        pytest.param(blob_of(DEEP), id="deep JSON"),
        pytest.param(blob_of('{"w":' + DEEP + "}"), id="deep JSON in an entry"),
        pytest.param(blob_of('{"w":' + "9" * 5000 + "}"), id="a number of 5000 digits"),
        pytest.param(blob_of({"w": 7}), id="entry is no map"),
        pytest.param(blob_of({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), id="no offsets"),
        pytest.param(blob_of({"w": entry() | {"more": 1}}, bytes(8)), id="unknown field"),
        pytest.param(blob_of({"w": entry(dtype="F31")}, bytes(8)), id="unknown dtype"),
        pytest.param(blob_of({"w": entry(dtype=["F32"])}, bytes(8)), id="dtype is no string"),
        pytest.param(blob_of({"w": entry(shape=[3])}, bytes(8)), id="shape too large"),
        pytest.param(blob_of({"w": entry(shape=[1])}, bytes(8)), id="shape too small"),
        pytest.param(blob_of({"w": entry(shape=[2.0])}, bytes(8)), id="shape of floats"),
        pytest.param(blob_of({"w": entry(shape=[True, 2])}, bytes(8)), id="shape of booleans"),
        pytest.param(blob_of({"w": entry(shape=[-1, -2])}, bytes(8)), id="negative shape"),
        pytest.param(blob_of({"w": entry(shape=[HUGE, 0], end=0)}), id="absurd side"),
        pytest.param(blob_of({"w": entry(shape=[1 << 47] * 8)}, bytes(8)), id="absurd product"),
        pytest.param(blob_of({"w": entry(shape=[1] * MAX_DIMENSIONS + [2])}, bytes(8)), id="many dimensions"),
        pytest.param(blob_of({"w": entry(begin=-8, end=0)}, bytes(8)), id="negative offsets"),
        pytest.param(blob_of({"w": entry(begin=8, end=0)}, bytes(8)), id="ends before it begins"),
        pytest.param(blob_of({"w": entry(begin=HUGE, end=HUGE + 8)}, bytes(8)), id="offsets beyond the end"),
        pytest.param(blob_of({"w": entry(begin=0.0, end=8.0)}, bytes(8)), id="offsets of floats"),
        pytest.param(blob_of({"w": entry("U8", [1], begin=False, end=True)}, bytes(1)), id="offsets of booleans"),
        pytest.param(blob_of({"w": entry(), "v": entry()}, bytes(8)), id="overlapping"),
        pytest.param(blob_of({"w": entry(), "v": entry(begin=4, end=12)}, bytes(12)), id="half overlapping"),
        pytest.param(blob_of({"w": entry(), "v": entry(begin=12, end=20)}, bytes(20)), id="a gap"),
        pytest.param(blob_of({"w": entry(begin=4, end=12)}, bytes(12)), id="a gap at the beginning"),
        pytest.param(blob_of('{"w":%s,"w":%s}' % ((json.dumps(entry()),) * 2), bytes(8)), id="a name twice"),
        pytest.param(blob_of({"w" * (MAX_NAME + 1): entry()}, bytes(8)), id="long name"),
    ],
)
def test_what_is_not_one_well_formed_file_is_refused(blob: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(blob)


def test_too_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.tensors.MAX_TENSORS", 3)
    with pytest.raises(BadMessage, match="lists 4 tensors, above the limit of 3"):
        decode(blob_of({str(i): entry(shape=[0], end=0) for i in range(4)}))


def test_a_refusal_can_be_written_down() -> None:
    """Whatever a manifest names, the reason is text that can be sent on."""
    for name in ("\ud800", "\0", "w" * 10_000):
        with pytest.raises(BadMessage) as refused:
            decode(blob_of(json.dumps({name: entry(dtype=name)}), bytes(8)))
        assert len(refused.value.reason.encode()) < 1000


def test_no_mutation_of_a_blob_does_more_than_be_refused() -> None:
    understood = 0
    for blob in mutations(GOOD, 20_000, seed=1):
        try:
            arrays = decode(blob)
        except BadMessage:
            continue
        understood += 1
        assert sum(array.nbytes for array in arrays.values()) <= len(blob)
    assert understood > 100  # changed values are values


def test_no_manifest_makes_the_decoder_allocate_much() -> None:
    size = 1 << 16
    absurd = {"w": entry(shape=[1 << 47, 1 << 47], end=1 << 60)}
    bombs = [blob_of(absurd), blob_of("[" * size), blob_of("[" + "[]," * (size // 3) + "[]]"), bytes(size)]
    for blob in bombs:
        tracemalloc.start()
        with pytest.raises(BadMessage):
            decode(blob)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40 * size


# -- what is compared -----------------------------------------------------------------------------------------


def test_arrays_must_be_those_of_the_model() -> None:
    like = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    check_like({name: values.copy() for name, values in like.items()}, like)
    for arrays, reason in [
        ({**like, "x": np.zeros(1)}, "unknown tensor 'x'"),
        ({"w": like["w"]}, "tensor 'b' is missing"),
        ({**like, "w": np.zeros((3, 2), np.float32)}, r"'w' has shape \(3, 2\), expected \(2, 3\)"),
        ({**like, "b": np.zeros(3)}, "'b' has dtype float64, expected float32"),
    ]:
        with pytest.raises(BadMessage, match=reason):
            check_like(arrays, like)
