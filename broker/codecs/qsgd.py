"""QSGD (Alistarh et al., 2017, section 3.1): stochastic rounding to s levels, unbiased, in buckets of 1,024 values.

For a bucket v: Q(v_j) = ||v||_2 * sign(v_j) * xi_j with xi_j = (l + b) / s, where l = floor(s |v_j| / ||v||_2) and
b is 1 with probability s |v_j| / ||v||_2 - l, else 0. So E[Q(v)] = v, and E||Q(v) - v||^2 is at most
min(d / s^2, sqrt(d) / s) ||v||^2 for a bucket of d values. ceil(log2(2 s + 1)) bits a value, one norm a bucket.
"""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import Block, Floats, Layout, Part, pack_bits, packed_bytes, unpack_bits
from broker.errors import BadMessage
from broker.tensors import Arrays, Named

BUCKET = 1024
MOST_LEVELS = 127


class Qsgd:
    feedback = False  # unbiased: errors of many updates cancel

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.bits = (2 * levels).bit_length()
        self.share = self.bits / 32

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:
        codes = np.empty(layout.values, np.uint8)
        norms = np.empty(layout.buckets(BUCKET), np.float32)
        for block, values in layout.read(arrays, BUCKET):
            norm = norms[block.buckets] = _norms(values)
            codes[block.flat] = self._codes(values, norm, rng)
        return {"q": pack_bits(codes, self.bits), "n": norms, **layout.keep(arrays)}

    def _codes(self, values: Floats, norms: Floats, rng: np.random.Generator) -> Floats:
        """s + sign(v_j) s xi_j: 0 to 2 s."""
        scaled = values / _spread(np.where(norms > 0, norms, 1), values.size) * np.float32(self.levels)
        lower = np.floor(np.abs(scaled))
        up = rng.random(values.size, np.float32) < np.abs(scaled) - lower
        codes: Floats = self.levels + np.copysign(np.minimum(lower + up, self.levels), scaled)
        return codes

    def decode(self, layout: Layout, encoded: Arrays) -> Named:
        size = packed_bytes(layout.values, self.bits)
        layout.check(encoded, {"q": Part(np.uint8, size), "n": Part(np.float32, layout.buckets(BUCKET))})
        codes, norms = unpack_bits(encoded["q"], self.bits, layout.values), encoded["n"]
        if (norms < 0).any() or (codes.size and codes.max() > 2 * self.levels):
            raise BadMessage("encoded arrays hold a norm below 0 or a code above the highest level")

        def values_of(block: Block) -> Floats:
            xi = (codes[block.flat].astype(np.float32) - self.levels) / np.float32(self.levels)
            values: Floats = xi * _spread(norms[block.buckets], xi.size)
            return values

        return layout.write(values_of, encoded, BUCKET)


def _norms(values: Floats) -> Floats:
    """||v||_2 of each bucket, rounded up, so that no |v_j| is above it."""
    squares = np.add.reduceat(np.square(values, dtype=np.float64), np.arange(0, values.size, BUCKET))
    largest = np.finfo(np.float32).max
    norms = np.minimum(np.sqrt(squares), largest).astype(np.float32)
    return np.where(norms > 0, np.nextafter(norms, largest), norms)


def _spread(norms: Floats, size: int) -> Floats:
    return np.repeat(norms, BUCKET)[:size]
