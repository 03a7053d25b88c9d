"""The geometric median of updates: robust federated aggregation, RFA (Pillutla et al., 2022, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.stack import Rows
from aggregator.strategies.collected import Combine, InnerProducts

NU = 1e-6  # no distance counts as smaller, or an update that is hit would get all the weight there is
MOST_PASSES = 1000
PRECISION = 1e-9  # of the weights, relative to 1, their sum


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """z minimises sum_i ||z - Delta_i||, by smoothed Weiszfeld passes from the mean:
    b_i = 1 / max(nu, ||z - Delta_i||), z = sum_i b_i Delta_i / sum_i b_i. Norms are those of whole updates.

    z is a weighted mean at each pass, so its distances follow from the inner products of updates, and passes
    cost next to nothing: they go on until the weights stand still, where the paper stops after three, since
    there each is a round of messages. All a_i of the paper are 1. Bears `byzantine` = f bad ones among n >= 2f + 1.
    """

    byzantine: int

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def combination(self, inner_products: InnerProducts) -> Combine:
        weights = weiszfeld(inner_products())

        def combine(rows: Rows) -> NDArray[np.float64]:
            mean: NDArray[np.float64] = (weights[:, None] * rows).sum(axis=0)
            return mean

        return combine


def weiszfeld(gram: NDArray[np.float64], passes: int = MOST_PASSES) -> NDArray[np.float64]:
    """The weights (n,), of sum 1, of the geometric median of vectors with these inner products (n, n).

    ||z - Delta_i||^2 = <z, z> - 2 <z, Delta_i> + <Delta_i, Delta_i> for z = sum_j b_j Delta_j.
    """
    weights = np.full(len(gram), 1 / len(gram))
    for _ in range(passes):
        with_z = np.einsum("ij,j->i", gram, weights)
        squares = (weights * with_z).sum() - 2 * with_z + gram.diagonal()
        nearness = 1 / np.maximum(NU, np.sqrt(np.maximum(squares, 0.0)))
        before, weights = weights, nearness / nearness.sum()
        if np.abs(weights - before).max() <= PRECISION:
            break
    return weights
