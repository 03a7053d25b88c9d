"""PowerSGD: low rank with error feedback (Vogels et al., 2019, Algorithm 1).

Each coded tensor of owed = residual + delta is a matrix M of shape[0] = m rows and n columns. From a random
Q (n, r), twice: P <- M Q, made orthonormal; Q <- M^T P. P and Q travel in float16, decoded = P Q^T. Q begins anew
each time, so a participant need not remember it: the paper begins with the last one, and goes once. It is biased:
what it loses stays in the residual (`feedback.py`).

A tensor is coded only where that is shorter: r (m + n) < m n. Others are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.codecs.layout import BLOCK, LARGEST_HALF, Floats, Layout, Part, is_coded, not_finite
from broker.tensors import Arrays, Named

MOST_RANK = 64
PASSES = 2


class PowerSgd:
    feedback = True

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.share = min(0.5, rank / 64)  # a guess: it depends on the shapes

    def _layout(self, layout: Layout) -> Layout:
        return Layout(layout.like, lambda array: is_coded(array) and array.ndim > 1 and self._is_shorter(array))

    def _is_shorter(self, array: NDArray[Any]) -> bool:
        rows = int(array.shape[0])
        return self.rank * (rows + array.size // rows) < array.size

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:
        layout = self._layout(layout)
        found = [self._factors(name, arrays[name], rng) for name in layout.coded]
        halves = [
            [np.clip(f, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).ravel() for f in pair] for pair in found
        ]
        empty = np.empty(0, np.float16)
        return {
            "p": np.concatenate([empty, *(p for p, _ in halves)]),
            "q": np.concatenate([empty, *(q for _, q in halves)]),
            **layout.keep_halved(arrays),
        }

    def _factors(self, name: str, array: NDArray[Any], rng: np.random.Generator) -> tuple[Floats, Floats]:
        matrix = array.reshape(array.shape[0], -1).astype(np.float32, copy=False)
        if not np.isfinite(matrix).all():
            raise not_finite(name)
        scale = np.float32(np.abs(matrix).max() or 1)  # products of large values do not overflow
        matrix = matrix / scale
        q = rng.standard_normal((matrix.shape[1], self.rank), np.float32)
        for _ in range(PASSES):
            p = np.linalg.qr(matrix @ q)[0]
            q = matrix.T @ p
        return p, q * scale

    def decode(self, layout: Layout, encoded: Arrays) -> Arrays:
        layout = self._layout(layout)
        sides = [
            (like.shape[0], like.size // like.shape[0])
            for like in map(layout.like.get, layout.coded)
            if like is not None
        ]
        rows, columns = (self.rank * sum(side) for side in zip(*sides, strict=True)) if sides else (0, 0)
        layout.check(encoded, {"p": Part(np.float16, rows), "q": Part(np.float16, columns)}, halved=True)
        p, q = encoded["p"].astype(np.float32), encoded["q"].astype(np.float32)
        arrays, p_from, q_from = {}, 0, 0
        for name, (m, n) in zip(layout.coded, sides, strict=True):
            array = arrays[name] = np.empty(layout.like[name].shape, layout.like[name].dtype)
            factors = p[p_from:][: m * self.rank].reshape(m, -1), q[q_from:][: n * self.rank].reshape(n, -1)
            for where, values in _product(*factors):
                array.reshape(m, n)[where] = values
            p_from, q_from = p_from + m * self.rank, q_from + n * self.rank
        return arrays | layout.kept_in(encoded)


def _product(p: Floats, q: Floats) -> Iterator[tuple[slice, Floats]]:
    """P Q^T, some rows at a time, added up column by column: the same bits on every kind of processor."""
    step = max(1, BLOCK // len(q))
    for begin in range(0, len(p), step):
        where = slice(begin, begin + step)
        values = np.multiply.outer(p[where, 0], q[:, 0])
        for column in range(1, p.shape[1]):
            values += np.multiply.outer(p[where, column], q[:, column])
        yield where, values
