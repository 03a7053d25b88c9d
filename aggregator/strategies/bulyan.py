"""Bulyan of Krum (El Mhamdi et al., 2018, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.stack import Rows
from aggregator.strategies.collected import Combine, InnerProducts, median
from aggregator.strategies.krum import scores, squared_distances


@dataclass(frozen=True, slots=True)
class Bulyan:
    """Krum chooses theta = n - 2f updates, one after the other among those that are left; then, of each coordinate,
    the theta - 2f chosen values nearest their median are averaged.

    Bears `byzantine` = f bad ones among n >= 4f + 3. The last choices are made among fewer than the 2f + 3 that
    Krum wants; there the nearest max(1, k - f - 2) of k count, for the paper does not say.
    """

    byzantine: int

    @property
    def least(self) -> int:
        return 4 * self.byzantine + 3

    def combination(self, inner_products: InnerProducts) -> Combine:
        chosen = self._chosen(squared_distances(inner_products()))
        kept = len(chosen) - 2 * self.byzantine

        def combine(rows: Rows) -> NDArray[np.float64]:
            return mean_around_median(rows[chosen], kept)

        return combine

    def _chosen(self, squares: NDArray[np.float64]) -> NDArray[np.intp]:
        left = np.arange(len(squares))
        chosen: list[int] = []
        while len(chosen) < len(squares) - 2 * self.byzantine:
            neighbours = max(1, len(left) - self.byzantine - 2)
            best = int(np.argmin(scores(squares[np.ix_(left, left)], neighbours)))
            chosen.append(int(left[best]))
            left = np.delete(left, best)
        return np.sort(np.array(chosen, np.intp))


def mean_around_median(rows: Rows, kept: int) -> NDArray[np.float64]:
    """The mean (values,) of the `kept` values of each coordinate nearest its median; of two equally near ones the
    lower."""
    ordered, middle = np.sort(rows, axis=0), median(rows)
    nearest = np.argsort(np.abs(ordered - middle), axis=0, kind="stable")[:kept]
    mean: NDArray[np.float64] = np.take_along_axis(ordered, np.sort(nearest, axis=0), axis=0).mean(axis=0)
    return mean
