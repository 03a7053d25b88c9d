"""bfloat16: the upper half of float32, rounded to the nearest, ties to even (Kalamkar et al., 2019).

Half the bytes of float32, the same range, and a relative error of at most 2^-8. It travels as the bits of int16,
because numpy has no such type.
"""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import Block, Floats, Layout, Part
from broker.errors import BadMessage
from broker.tensors import Arrays, Named

LARGEST = float(np.array(0x7F7F0000, np.uint32).view(np.float32))


class Bf16:
    feedback = False
    share = 0.5

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:  # noqa: ARG002
        upper = np.empty(layout.values, np.uint16)
        for block, values in layout.read(arrays):
            bits = np.clip(values, -LARGEST, LARGEST).view(np.uint32)
            bits += 0x7FFF + ((bits >> 16) & 1)
            upper[block.flat] = bits >> 16
        return {"b": upper.view(np.int16), **layout.keep(arrays)}

    def decode(self, layout: Layout, encoded: Arrays) -> Named:
        layout.check(encoded, {"b": Part(np.int16, layout.values)})

        def values_of(block: Block) -> Floats:
            values = (encoded["b"][block.flat].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            if not np.isfinite(values).all():
                raise BadMessage("encoded array 'b' has values that are not finite")
            return values

        return layout.write(values_of, encoded)
