"""Half precision: each value is rounded to the nearest float16 (IEEE 754 binary16), and beyond ±65,504 to that.

Half the bytes of float32; the relative error is at most 2^-11 from 2^-14 on, the absolute one 2^-25 below.
"""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import LARGEST_HALF, Layout, Part
from broker.tensors import Arrays, Named


class Fp16:
    feedback = False
    share = 0.5

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:  # noqa: ARG002
        halves = np.empty(layout.values, np.float16)
        for block, values in layout.read(arrays):
            halves[block.flat] = np.clip(values, -LARGEST_HALF, LARGEST_HALF)
        return {"h": halves, **layout.keep(arrays)}

    def decode(self, layout: Layout, encoded: Arrays) -> Named:
        layout.check(encoded, {"h": Part(np.float16, layout.values)})
        return layout.write(lambda block: encoded["h"][block.flat], encoded)
