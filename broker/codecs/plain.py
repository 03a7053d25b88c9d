"""No codec: every tensor travels as it is, under its own name."""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import Layout
from broker.tensors import Arrays, Named, check_like


class Plain:
    feedback = False
    share = 1.0

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:  # noqa: ARG002
        return {name: array.astype(layout.like[name].dtype, copy=False) for name, array in arrays.items()}

    def decode(self, layout: Layout, encoded: Arrays) -> Arrays:
        check_like(encoded, layout.like)
        return encoded
