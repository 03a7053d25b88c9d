"""Krum and Multi-Krum (Blanchard et al., 2017, sections 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.stack import Rows
from aggregator.strategies.collected import Combine, InnerProducts


@dataclass(frozen=True, slots=True)
class Krum:
    """score(i) = sum of ||Delta_i - Delta_j||^2 over the n - f - 2 nearest others j.

    Krum takes the update of the lowest score (`keep` 1), Multi-Krum the plain mean of the m = `keep` lowest;
    0 is n - f. Of equal scores the first by participant's name is the lower. Bears `byzantine` = f bad ones among
    n >= 2f + 3, of which at most n - f are kept.
    """

    byzantine: int
    keep: int = 1

    @property
    def least(self) -> int:
        return max(2 * self.byzantine + 3, self.keep + self.byzantine)

    def combination(self, inner_products: InnerProducts) -> Combine:
        squares = squared_distances(inner_products())
        n = len(squares)
        best = np.argsort(scores(squares, n - self.byzantine - 2), kind="stable")
        chosen = np.sort(best[: self.keep or n - self.byzantine])

        def combine(rows: Rows) -> NDArray[np.float64]:
            mean: NDArray[np.float64] = rows[chosen].mean(axis=0)
            return mean

        return combine


def squared_distances(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """||a - b||^2 = <a, a> + <b, b> - 2 <a, b>, (n, n); infinite on the diagonal: nobody is its own neighbour."""
    squares = np.maximum(gram.diagonal()[:, None] + gram.diagonal()[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(squares, np.inf)
    return squares


def scores(squares: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    """The sum (n,) of the squared distances to the nearest `neighbours` others."""
    total: NDArray[np.float64] = np.sort(squares, axis=1)[:, :neighbours].sum(axis=1)
    return total
