"""One bit a value, with error feedback (Karimireddy et al., 2019, "Error Feedback Fixes SignSGD", Algorithm 1).

For each bucket of 4,096 values a of owed = residual + delta: decoded = mean|a| * sign(a), where sign(0) is 1. It is
biased: what it loses stays in the residual (`feedback.py`).
"""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import Block, Floats, Layout, Part, pack_bits, packed_bytes, unpack_bits
from broker.errors import BadMessage
from broker.tensors import Arrays, Named

BUCKET = 4096


class Sign:
    feedback = True
    share = 1 / 32

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:  # noqa: ARG002
        negative = np.empty(layout.values, np.uint8)
        means = np.empty(layout.buckets(BUCKET), np.float32)
        for block, values in layout.read(arrays, BUCKET):
            starts = np.arange(0, values.size, BUCKET)
            sums = np.add.reduceat(np.abs(values), starts, dtype=np.float64)
            means[block.buckets] = sums / np.diff(starts, append=values.size)
            negative[block.flat] = values < 0
        return {"b": pack_bits(negative, 1), "m": means, **layout.keep_halved(arrays)}

    def decode(self, layout: Layout, encoded: Arrays) -> Named:
        size = packed_bytes(layout.values, 1)
        parts = {"b": Part(np.uint8, size), "m": Part(np.float32, layout.buckets(BUCKET))}
        layout.check(encoded, parts, halved=True)
        negative, means = unpack_bits(encoded["b"], 1, layout.values), encoded["m"]
        if (means < 0).any():
            raise BadMessage("encoded array 'm' has a mean below 0")

        def values_of(block: Block) -> Floats:
            signs = 1 - 2 * negative[block.flat].astype(np.float32)
            values: Floats = signs * np.repeat(means[block.buckets], BUCKET)[: signs.size]
            return values

        return layout.write(values_of, encoded, BUCKET)
