"""Which tensors of a model a codec makes smaller, where their values lie, and what an encoded form must look like.

A tensor is *coded* if it holds floating-point numbers and is worth it: two or more dimensions and at least
64 values, or at least 4,096 values. All others are *kept*: integers, booleans, scalars, biases, and statistics such
as those of normalisation layers, which a coarse code could turn negative. Kept tensors travel whole.

Coded tensors are laid end to end, in the order of their names, and worked on block by block, so that temporaries
stay in the processor's cache. Blocks and buckets never cross from one tensor into the next, whose scale may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import BadMessage, TaskError
from broker.tensors import Arrays, Named

BLOCK = 1 << 16  # values
LEAST_MATRIX = 64
LEAST_CODED = 4096
LARGEST_HALF = 65504.0  # float16

Floats = NDArray[np.float32]


def is_float(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f"


def is_coded(array: NDArray[Any]) -> bool:
    """Whether codecs make this tensor smaller; others are kept whole."""
    return is_float(array) and array.size >= (LEAST_MATRIX if array.ndim > 1 else LEAST_CODED)


class Made(Mapping[str, NDArray[Any]]):
    """Arrays with the names of a model, each made anew whenever it is asked for."""

    def __init__(self, like: Arrays, make: Callable[[str], NDArray[Any]]) -> None:
        self.like, self._make = like, make

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.like:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


@dataclass(frozen=True, slots=True)
class Block:
    """Some values of one coded tensor: where they lie in it, among all coded values, and their buckets."""

    name: str
    inside: slice
    flat: slice
    buckets: slice


@dataclass(frozen=True, slots=True)
class Part:
    """What an encoded array must be: one dimension, of `size` values, or of `size` at the most."""

    dtype: Any
    size: int
    or_fewer: bool = False


class Layout:
    """The names, shapes and dtypes of a model, and which of its tensors are coded."""

    def __init__(self, like: Arrays, codes: Callable[[NDArray[Any]], bool] = is_coded) -> None:
        self.like = like
        self._codes = codes

    @cached_property
    def places(self) -> dict[str, str]:
        """What kept tensors are called in an encoded form."""
        return {name: str(place) for place, name in enumerate(sorted(self.like))}

    @cached_property
    def coded(self) -> tuple[str, ...]:
        return tuple(name for name in self.places if self._codes(self.like[name]))

    @cached_property
    def kept(self) -> tuple[str, ...]:
        return tuple(name for name in self.places if not self._codes(self.like[name]))

    @cached_property
    def values(self) -> int:
        """How many coded values there are."""
        return sum(self.like[name].size for name in self.coded)

    def buckets(self, bucket: int) -> int:
        """How many buckets of so many values there are; a tensor's last one may be shorter."""
        return sum(-(-self.like[name].size // bucket) for name in self.coded)

    def blocks(self, bucket: int = BLOCK) -> Iterator[Block]:
        """All coded values in order. `bucket` divides BLOCK."""
        flat = buckets = 0
        for name in self.coded:
            for begin in range(0, self.like[name].size, BLOCK):
                size = min(BLOCK, self.like[name].size - begin)
                count = -(-size // bucket)
                yield Block(
                    name, slice(begin, begin + size), slice(flat, flat + size), slice(buckets, buckets + count)
                )
                flat, buckets = flat + size, buckets + count

    def read(self, arrays: Named, bucket: int = BLOCK) -> Iterator[tuple[Block, Floats]]:
        """Each block with its values as float32; each tensor is asked for once, and let go of before the next.

        Raises TaskError for a value that is not finite.
        """
        for name, blocks in groupby(self.blocks(bucket), lambda block: block.name):
            flat = arrays[name].reshape(-1)
            for block in blocks:
                values = flat[block.inside].astype(np.float32, copy=False)
                if not np.isfinite(values).all():
                    raise not_finite(name)
                yield block, values
            del flat

    def write(self, values_of: Callable[[Block], NDArray[Any]], encoded: Arrays, bucket: int = BLOCK) -> Named:
        """Arrays like the model's: the coded ones are computed by `values_of`, block by block and whenever one is
        asked for, so that nobody need hold all of them; the kept ones are those of the checked encoded form."""
        blocks = {name: list(group) for name, group in groupby(self.blocks(bucket), lambda block: block.name)}

        def made(name: str) -> NDArray[Any]:
            if name in self.kept:
                return self._kept(name, encoded)
            array = np.empty(self.like[name].shape, self.like[name].dtype)
            flat = array.reshape(-1)
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by the sum's bounds
                for block in blocks[name]:
                    flat[block.inside] = values_of(block)
            return array

        return Made(self.like, made)

    # -- kept tensors ------------------------------------------------------------------------------------------

    def keep(self, arrays: Named) -> Arrays:
        """The kept tensors as they are, under short names."""
        kept = {}
        for name in self.kept:
            array = arrays[name]
            if is_float(array) and not np.isfinite(array).all():
                raise not_finite(name)
            kept[self.places[name]] = array.astype(self.like[name].dtype, copy=False)
        return kept

    def keep_halved(self, arrays: Named) -> Arrays:
        """As `keep`, in float16 where every value fits: for codecs whose residual takes up what that loses."""
        return {place: _halved(array) for place, array in self.keep(arrays).items()}

    def kept_in(self, encoded: Arrays) -> Arrays:
        """The kept tensors out of a checked encoded form, in the model's dtypes."""
        return {name: self._kept(name, encoded) for name in self.kept}

    def _kept(self, name: str, encoded: Arrays) -> NDArray[Any]:
        return encoded[self.places[name]].astype(self.like[name].dtype, copy=False)

    # -- encoded forms -----------------------------------------------------------------------------------------

    def check(self, encoded: Arrays, parts: Mapping[str, Part], *, halved: bool = False) -> None:
        """Raises BadMessage unless `encoded` is exactly these parts and the kept tensors, and floats are finite."""
        kept = {self.places[name]: self.like[name] for name in self.kept}
        for name in encoded.keys() ^ (parts.keys() | kept.keys()):
            raise BadMessage(f"encoded array {name!r} is {'unknown' if name in encoded else 'missing'}")
        for name, part in parts.items():
            _check_part(name, encoded[name], part)
        for name, like in kept.items():
            _check_kept(name, encoded[name], like, halved=halved)


def _check_part(name: str, array: NDArray[Any], part: Part) -> None:
    fits = array.size <= part.size if part.or_fewer else array.size == part.size
    if array.dtype != part.dtype or array.ndim != 1 or not fits:
        raise BadMessage(
            f"encoded array {name!r} is {array.dtype} {array.shape}, expected {np.dtype(part.dtype)} of "
            f"{'at most ' if part.or_fewer else ''}{part.size} values"
        )
    if is_float(array) and not np.isfinite(array).all():
        raise BadMessage(f"encoded array {name!r} has values that are not finite")


def _check_kept(name: str, array: NDArray[Any], like: NDArray[Any], *, halved: bool) -> None:
    is_half = halved and is_float(like) and array.dtype == np.float16
    if array.shape != like.shape or (array.dtype != like.dtype and not is_half):
        raise BadMessage(
            f"kept tensor number {name} is {array.dtype} {array.shape}, the model's is {like.dtype} {like.shape}"
        )


def not_finite(name: str) -> TaskError:
    return TaskError(
        f"the update of tensor {name!r} is not finite and cannot be encoded: lower train.lr, or look for missing "
        "values in the inputs"
    )


def _halved(array: NDArray[Any]) -> NDArray[Any]:
    fits = is_float(array) and array.size and float(np.abs(array).max()) <= LARGEST_HALF
    return array.astype(np.float16) if fits else array


# -- several codes in one byte -----------------------------------------------------------------------------------


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes below 2**bits (bits 1 to 8), end to end, the first in the highest bits."""
    if bits == 8:
        return codes
    packed = np.empty(packed_bytes(codes.size, bits), np.uint8)
    for begin in range(0, codes.size, BLOCK):
        block = codes[begin : begin + BLOCK]
        start = begin * bits // 8
        packed[start : start + packed_bytes(block.size, bits)] = _packed(block, bits)
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` codes that `pack_bits` packed."""
    if bits == 8:
        return packed[:count]
    codes = np.empty(count, np.uint8)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        start = begin * bits // 8
        codes[begin : begin + size] = _unpacked(packed[start : start + packed_bytes(size, bits)], bits, size)
    return codes


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 1:
        return np.packbits(codes)
    if 8 % bits:
        return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :])
    rows = np.zeros((-(-codes.size * bits // 8), 8 // bits), np.uint8)
    rows.reshape(-1)[: codes.size] = codes
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(rows << _shifts(bits), axis=1)
    return packed


def _unpacked(packed: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    if bits == 1:
        return np.unpackbits(packed, count=size)
    if 8 % bits:
        rows = np.unpackbits(packed, count=size * bits).reshape(size, bits)
        return np.packbits(rows, axis=1)[:, 0] >> np.uint8(8 - bits)
    codes: NDArray[np.uint8] = packed[:, None] >> _shifts(bits) & np.uint8((1 << bits) - 1)
    return codes.reshape(-1)[:size]


def _shifts(bits: int) -> NDArray[np.uint8]:
    return np.array(range(8 - bits, -1, -bits), np.uint8)


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
