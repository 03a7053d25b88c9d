"""Top-k with error feedback (Stich et al., 2018; Karimireddy et al., 2019).

Of owed = residual + delta, the k = max(1, ceil(ratio * n)) values of largest magnitude among all n coded ones
travel, in float16; ties go to the lower place. It is biased: everything else stays in the residual (`feedback.py`).

Places are strictly increasing. They travel as differences, each less 1, seven bits a byte, lowest first, the
highest bit set in all but a number's last byte; or, where that is shorter, as one bit for each of the n values.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from broker.codecs.layout import LARGEST_HALF, Floats, Layout, Part, packed_bytes
from broker.errors import BadMessage
from broker.tensors import Arrays, Named

LONGEST = 7  # bytes of a number: 49 bits, and a tensor has fewer than 2**48 values
HIGHEST_RATIO = 0.5  # beyond, whole values take no more room

Places = NDArray[np.int64]


class TopK:
    feedback = True

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.share = 0.8 * ratio

    def count(self, values: int) -> int:
        """k: at least one, if there is any."""
        return min(values, max(1, math.ceil(self.ratio * values)))

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:  # noqa: ARG002
        places, values = _largest(layout, arrays, self.count(layout.values))
        halves = np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
        gaps = write_gaps(places)
        is_dense = gaps.size > packed_bytes(layout.values, 1)
        where = {"bits": _as_bits(places, layout.values)} if is_dense else {"gaps": gaps}
        return {"h": halves, **where, **layout.keep_halved(arrays)}

    def decode(self, layout: Layout, encoded: Arrays) -> Arrays:
        count, bitmap = self.count(layout.values), packed_bytes(layout.values, 1)
        is_dense = "bits" in encoded
        where = {"bits": Part(np.uint8, bitmap)} if is_dense else {"gaps": Part(np.uint8, bitmap, or_fewer=True)}
        layout.check(encoded, {"h": Part(np.float16, count), **where}, halved=True)
        places = (
            _from_bits(encoded["bits"], layout.values) if is_dense else read_gaps(encoded["gaps"], layout.values)
        )
        if places.size != count:
            raise BadMessage(f"{places.size} places are given for {count} values")
        arrays, begin = {}, 0
        for name in layout.coded:
            array = arrays[name] = np.zeros(layout.like[name].shape, layout.like[name].dtype)
            first, last = np.searchsorted(places, (begin, begin + array.size))
            array.reshape(-1)[places[first:last] - begin] = encoded["h"][first:last]
            begin += array.size
        return arrays | layout.kept_in(encoded)


# -- which values ------------------------------------------------------------------------------------------------


def _largest(layout: Layout, arrays: Named, count: int) -> tuple[Places, Floats]:
    """Places and values of the `count` largest magnitudes, in order."""
    threshold, ties = _threshold(layout, arrays, count)
    places: list[Places] = []
    chosen: list[Floats] = []
    for block, values in layout.read(arrays):
        bits = _magnitude(values)
        above = bits > threshold
        equal = np.flatnonzero(bits == threshold)[:ties]
        ties -= equal.size
        above[equal] = True
        found = np.flatnonzero(above)
        places.append(found + block.flat.start)
        chosen.append(values[found])
    return np.concatenate([np.empty(0, np.int64), *places]), np.concatenate([np.empty(0, np.float32), *chosen])


def _threshold(layout: Layout, arrays: Named, count: int) -> tuple[int, int]:
    """The count-th largest magnitude as bits, and how many of those equal to it are needed.

    A radix selection: magnitudes of floats are ordered as their bits. Two passes count the upper, then the lower
    sixteen, so nothing of the model's size is allocated.
    """
    upper = np.zeros(1 << 16, np.int64)
    for _, values in layout.read(arrays):
        upper += np.bincount(_magnitude(values) >> 16, minlength=1 << 16)
    high, needed = _nth_from_above(upper, count)
    lower = np.zeros(1 << 16, np.int64)
    for _, values in layout.read(arrays):
        bits = _magnitude(values)
        lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, needed = _nth_from_above(lower, needed)
    return high << 16 | low, needed


def _nth_from_above(histogram: Places, n: int) -> tuple[int, int]:
    """The bin that holds the n-th largest, and which one in that bin it is, from 1."""
    so_far = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(so_far, n))
    before = int(so_far[place - 1]) if place else 0
    return len(histogram) - 1 - place, n - before


def _magnitude(values: Floats) -> NDArray[np.uint32]:
    return np.abs(values).view(np.uint32)


# -- where they were ---------------------------------------------------------------------------------------------


def write_gaps(places: Places) -> NDArray[np.uint8]:
    """Strictly increasing places as differences, seven bits a byte."""
    gaps = np.diff(places, prepend=-1) - 1
    lengths = np.ones(gaps.size, np.int64)
    for place in range(1, LONGEST):
        lengths += gaps >> (7 * place) > 0
    starts = np.cumsum(lengths) - lengths
    coded = np.empty(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max(initial=0))):
        those = lengths > place
        more = (lengths[those] > place + 1).astype(np.int64) << 7
        coded[starts[those] + place] = gaps[those] >> (7 * place) & 127 | more
    return coded


def read_gaps(coded: NDArray[np.uint8], values: int) -> Places:
    """The places that `write_gaps` wrote. Raises BadMessage unless all are below `values`."""
    ends = np.flatnonzero(coded < 128)
    starts = np.concatenate(([0], ends[:-1] + 1)) if ends.size else ends
    if coded.size and (not ends.size or ends[-1] != coded.size - 1 or (ends - starts).max() >= LONGEST):
        raise BadMessage("encoded array 'gaps' has a number that does not end, or is too long")
    gaps = np.zeros(ends.size, np.int64)
    for place in range(int((ends - starts).max(initial=-1)) + 1):
        those = starts + place <= ends
        gaps[those] |= (coded[starts[those] + place] & 127).astype(np.int64) << (7 * place)
    if gaps.sum(dtype=np.float64) + gaps.size > values:  # in float64 it cannot turn over
        raise BadMessage(f"encoded array 'gaps' names a place beyond the {values} values of the model")
    return np.cumsum(gaps + 1) - 1


def _as_bits(places: Places, values: int) -> NDArray[np.uint8]:
    marks = np.zeros(values, np.uint8)
    marks[places] = 1
    return np.packbits(marks)


def _from_bits(bits: NDArray[np.uint8], values: int) -> Places:
    return np.flatnonzero(np.unpackbits(bits, count=values))
