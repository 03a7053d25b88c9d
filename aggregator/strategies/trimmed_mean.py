"""Coordinate-wise trimmed mean (Yin et al., 2018, Definition 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.stack import Rows
from aggregator.strategies.collected import Combine, InnerProducts


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Of each coordinate, the f lowest and the f highest values are left out; the others' mean counts.

    Bears `byzantine` = f bad ones among n >= 2f + 1.
    """

    byzantine: int

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def combination(self, inner_products: InnerProducts) -> Combine:  # noqa: ARG002 - looks at coordinates alone
        return self._trimmed

    def _trimmed(self, rows: Rows) -> NDArray[np.float64]:
        kept = np.sort(rows, axis=0)[self.byzantine : len(rows) - self.byzantine]
        mean: NDArray[np.float64] = kept.mean(axis=0)
        return mean
