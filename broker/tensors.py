"""Named tensors as bytes: a manifest, then raw values. The format is safetensors, byte for byte.

So a model on the wire, in the head record and on disk are the same bytes with the same sha256, which
anybody can check with `sha256sum`, and any tool that reads safetensors reads our checkpoints.
Encoding is canonical (equal arrays give equal bytes); decoding is strict and copies nothing.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import BadMessage

Arrays = dict[str, NDArray[Any]]
Named = Mapping[str, NDArray[Any]]  # also of arrays that are made when they are asked for
Buffer = bytes | bytearray | memoryview
Room = Callable[[int], Buffer]  # so many bytes to write into: memory, or a mapped file

BLOCK = 1 << 16  # values: float64 and int64 temporaries of a block stay in the processor's cache
GIVEN_BACK_EVERY = 16  # blocks, if they lie in a mapped file
PAGE_BYTES = mmap.PAGESIZE
MAX_MANIFEST_BYTES = 16 << 20
REMEMBERED_BYTES = 64 << 10  # manifests up to this size are remembered: each round has the same one
REMEMBERED = 32  # manifests
MAX_TENSORS = 100_000
MAX_NAME = 200
MAX_DIMENSIONS = 8
MOST_VALUES = 1 << 48  # of one tensor, counted without sides of zero
MOST_BYTES = 1 << 53  # numbers beyond cannot even be written into a refusal
DTYPES: dict[str, np.dtype[Any]] = {  # in the order in which safetensors writes tensors
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PLACES = {dtype: place for place, dtype in enumerate(CODES)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype code and shape of one tensor, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as one safetensors file. Raises BadMessage for a dtype that does not travel."""
    buffers = encode_buffers(arrays)
    return b"".join(buffers)


def encode_buffers(arrays: Mapping[str, NDArray[Any]]) -> list[Buffer]:
    """What `encode` joins: the manifest and a view of each contiguous array, without copying values."""
    flat = {name: _little_endian(name, array) for name, array in arrays.items()}
    names, header = _layout(arrays)
    return [header, *(flat[name].data.cast("B") if flat[name].nbytes else b"" for name in names)]


def in_memory(size_bytes: int) -> memoryview:
    """Room that takes memory only where something was written."""
    return np.empty(size_bytes, np.uint8).data


def blank(like: Mapping[str, NDArray[Any]], room: Room = in_memory) -> memoryview:
    """The safetensors file of arrays like these, in so much `room`, whose values are still to be written. Raises
    BadMessage as `encode` does."""
    _, header = _layout(like)
    blob = memoryview(room(len(header) + sum(array.nbytes for array in like.values())))
    blob[: len(header)] = header
    return blob


def encode_each(
    like: Mapping[str, NDArray[Any]], write: Callable[[str, NDArray[Any]], object], room: Room = in_memory
) -> memoryview:
    """The safetensors file of arrays like these, whose values `write(name, out)` puts where they stay, one tensor
    after the other: so nobody needs to hold all of them beside the file. Raises BadMessage as `encode` does."""
    blob = blank(like, room)
    for name, out in decode(blob, writable=True).items():
        write(name, out)
        give_back(out)
    return blob


def encode_in(room: Room, arrays: Mapping[str, NDArray[Any]]) -> memoryview:
    """As `encode`, but in so much `room`."""
    return encode_each(arrays, lambda name, out: copy(arrays[name], out), room)


def _layout(arrays: Mapping[str, NDArray[Any]]) -> tuple[list[str], bytes]:
    """The order in which the tensors lie in a file, and what stands before them."""
    codes = {name: _code(name, array) for name, array in arrays.items()}
    names = sorted(arrays, key=lambda name: (PLACES[DTYPES[codes[name]]], name))
    return names, _header(tuple((name, codes[name], arrays[name].shape) for name in names))


def _code(name: str, array: NDArray[Any]) -> str:
    dtype = array.dtype.newbyteorder("<")
    if dtype not in CODES:
        raise BadMessage(f"tensor {name!r} has dtype {array.dtype}, which does not travel: use {', '.join(DTYPES)}")
    return CODES[dtype]


@lru_cache(REMEMBERED)
def _header(layout: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The length of the manifest, and the manifest of tensors with these names, dtype codes and shapes."""
    manifest: dict[str, Any] = {}
    begin = 0
    for name, code, shape in layout:
        end = begin + math.prod(shape) * DTYPES[code].itemsize
        manifest[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _little_endian(name: str, array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array, dtype=DTYPES[_code(name, array)]).reshape(-1)


def decode(blob: Buffer, *, writable: bool = False) -> Arrays:
    """Views into `blob`, read-only unless otherwise asked. Raises BadMessage unless it is one well-formed
    safetensors file."""
    view = memoryview(blob) if writable else memoryview(blob).toreadonly()
    return {
        spec.name: np.frombuffer(view[spec.begin : spec.end], dtype=DTYPES[spec.dtype]).reshape(spec.shape)
        for spec in manifest_of(view)
    }


def give_back(view: NDArray[Any] | Buffer) -> None:
    """Lets go of the memory of what a contiguous array or a memoryview looks at, if it lies in a mapped file: it is
    read again if needed."""
    mapped = _under(view)
    size = view.nbytes if isinstance(view, np.ndarray | memoryview) else len(view)
    if isinstance(mapped, mmap.mmap) and size:
        begin = _address(view) - _address(mapped)
        page = begin - begin % PAGE_BYTES
        mapped.madvise(mmap.MADV_DONTNEED, page, begin + size - page)


def is_mapped(view: NDArray[Any] | Buffer) -> bool:
    """Whether it lies in a mapped file."""
    return isinstance(_under(view), mmap.mmap)


def _under(view: object) -> object:
    """What holds the bytes."""
    while isinstance(view, np.ndarray):
        view = view.base
    return view.obj if isinstance(view, memoryview) else view


def _address(view: object) -> int:
    array = view if isinstance(view, np.ndarray) else np.frombuffer(view, np.uint8)  # type: ignore[call-overload]
    return int(array.ctypes.data)


def blocks(*flats: NDArray[Any]) -> Iterator[slice]:
    """Parts of flat arrays of one size that fit into the processor's cache, in order. Of mapped files only what was
    looked at last is held: 4 MiB in float32."""
    size, stretch = flats[0].size, GIVEN_BACK_EVERY * BLOCK
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))
        if size > BLOCK and ((start + BLOCK) % stretch == 0 or start + BLOCK >= size):
            for flat in flats:
                give_back(flat[start // stretch * stretch : start + BLOCK])


def copy(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Copies a tensor, block by block."""
    flat, copied = values.reshape(-1), out.reshape(-1)
    for part in blocks(flat, copied):
        copied[part] = flat[part]


def manifest_of(blob: Buffer) -> tuple[TensorSpec, ...]:
    """Every tensor of a safetensors file, after checking that they cover it exactly."""
    view = memoryview(blob)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(MAX_MANIFEST_BYTES, len(view) - 8):
        raise BadMessage(f"tensor manifest of {length} bytes exceeds the payload of {len(view)} or the limit")
    read = _remembered if length <= REMEMBERED_BYTES else _specs
    return read(bytes(view[8 : 8 + length]), len(view))


def _specs(header: bytes, size_bytes: int) -> tuple[TensorSpec, ...]:
    """The tensors of a file of that size with that manifest."""
    specs = [_spec(name, entry, 8 + len(header)) for name, entry in _parse(header).items()]
    position = 8 + len(header)
    for spec in sorted(specs, key=lambda spec: (spec.begin, spec.end)):
        if spec.begin != position:
            raise BadMessage(f"tensor {spec.name!r} begins at byte {spec.begin}, expected {position}")
        position = spec.end
    if position != size_bytes:
        raise BadMessage(f"tensors end at byte {position} but the payload has {size_bytes}")
    return tuple(specs)


_remembered = lru_cache(REMEMBERED)(_specs)


def _parse(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_no_twins)  # bytes might be UTF-16
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"tensor manifest is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise BadMessage("tensor manifest is not a map")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise BadMessage(f"tensor manifest lists {len(entries)} tensors, above the limit of {MAX_TENSORS}")
    return entries


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _spec(name: str, entry: Any, data_begin: int) -> TensorSpec:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if (
            not rest and type(begin) is type(end) is int  # a boolean is no number
        ):
            pass
        case _:
            raise BadMessage(
                f"tensor {name[:MAX_NAME]!r}: manifest entry needs exactly dtype, shape and data_offsets"
            )
    if len(name) > MAX_NAME or dtype not in DTYPES or not _is_text(name):
        raise BadMessage(f"tensor {name[:MAX_NAME]!r}: no name of a tensor, or unknown dtype {dtype[:20]!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(side) is int and 0 <= side < MOST_VALUES for side in shape):
        raise BadMessage(f"tensor {name!r}: impossible shape")
    if math.prod(filter(None, shape)) >= MOST_VALUES or not 0 <= begin <= end < MOST_BYTES:
        raise BadMessage(
            f"tensor {name!r}: shape or offsets are beyond all memory"
        )  # numpy counts without the zeros
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise BadMessage(f"tensor {name!r}: shape {shape} does not fill bytes {begin} to {end}")
    return TensorSpec(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_text(name: str) -> bool:
    """JSON can spell halves of characters, which nothing else can write."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_like(arrays: Arrays, like: Arrays) -> None:
    """Raises BadMessage unless `arrays` has exactly the names, shapes and dtypes of `like`."""
    if unknown := arrays.keys() - like.keys():
        raise BadMessage(f"unknown tensor {min(unknown)!r}: the model has {len(like)} tensors and not this one")
    if missing := like.keys() - arrays.keys():
        raise BadMessage(f"tensor {min(missing)!r} is missing")
    for name, array in arrays.items():
        if array.shape != like[name].shape:
            raise BadMessage(f"tensor {name!r} has shape {array.shape}, expected {like[name].shape}")
        if array.dtype != like[name].dtype:
            raise BadMessage(f"tensor {name!r} has dtype {array.dtype}, expected {like[name].dtype}")
