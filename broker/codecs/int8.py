"""Blockwise int8 (as in Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization", with even steps).

For each bucket of 256 values v: scale = max|v| / 127, code = rint(v / scale), decoded = code * scale. The error
of a value is at most scale / 2. A bucket of zeros has scale 0. About 1.02 bytes a value.
"""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import Layout, Part
from broker.errors import BadMessage
from broker.tensors import Arrays, Named

BUCKET = 256
LEVELS = 127


class Int8:
    feedback = False
    share = 0.26

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:  # noqa: ARG002
        codes = np.empty(layout.values, np.int8)
        scales = np.empty(layout.buckets(BUCKET), np.float32)
        for block, values in layout.read(arrays, BUCKET):
            largest = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, BUCKET))
            scale = scales[block.buckets] = largest / np.float32(LEVELS)
            steps = np.repeat(np.where(scale > 0, scale, 1), BUCKET)[: values.size]
            codes[block.flat] = np.clip(np.rint(values / steps), -LEVELS, LEVELS)
        return {"q": codes, "s": scales, **layout.keep(arrays)}

    def decode(self, layout: Layout, encoded: Arrays) -> Named:
        parts = {"q": Part(np.int8, layout.values), "s": Part(np.float32, layout.buckets(BUCKET))}
        layout.check(encoded, parts)
        codes, scales = encoded["q"], encoded["s"]
        if (scales < 0).any():
            raise BadMessage("encoded array 's' has a scale below 0")
        return layout.write(
            lambda block: (
                codes[block.flat] * np.repeat(scales[block.buckets], BUCKET)[: block.flat.stop - block.flat.start]
            ),
            encoded,
            BUCKET,
        )
