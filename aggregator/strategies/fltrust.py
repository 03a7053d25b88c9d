"""FLTrust (Cao et al., 2021, "FLTrust: Byzantine-robust federated learning via trust bootstrapping",
Algorithm 2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aggregator.stack import Rows
from aggregator.strategies.collected import Collected, Combine
from broker.errors import StateError
from broker.topology import AGGREGATOR


class FLTrust(Collected):
    """x <- x + server_lr sum_i TS_i (||Delta_0|| / ||Delta_i||) Delta_i / sum_i TS_i,
    TS_i = ReLU(cos(Delta_i, Delta_0)).

    Delta_0 is the aggregator's own update, from data that it trusts: it is added like the others, in the name of
    the aggregator. Whoever points away from it has no weight, whoever is longer is cut to its length. If nobody
    points its way x stays. Norms and cosines are those of all parameters together; buffers and integers become the
    aggregator's own. It bears any number of bad participants, as far as Delta_0 is right.
    """

    @property
    def least(self) -> int:
        return 2

    def _combination(self, compared: list[str]) -> Combine:
        weights = trusted(self._stack.inner_products(compared), self._root)

        def combine(rows: Rows) -> NDArray[np.float64]:
            mean: NDArray[np.float64] = (weights[:, None] * rows).sum(axis=0)
            return mean

        return combine

    def _of_others(self, rows: Rows) -> NDArray[np.float64]:
        own: NDArray[np.float64] = rows[self._root]
        return own

    @property
    def _root(self) -> int:
        if AGGREGATOR not in self._stack.participants:
            raise StateError("fltrust has no update of the aggregator's own: its job needs `root`")
        return self._stack.participants.index(AGGREGATOR)


def trusted(gram: NDArray[np.float64], root: int) -> NDArray[np.float64]:
    """The weight (n,) of each update, from the inner products (n, n) of all; that of the root itself is 0."""
    norms = np.sqrt(gram.diagonal())
    lengths = np.where(norms > 0, norms, 1.0)  # who learned nothing has a product of 0, too
    trust = np.maximum(gram[root] / (lengths * lengths[root]), 0.0)
    trust[root] = 0.0
    total = float(trust.sum())
    weights: NDArray[np.float64] = trust * (norms[root] / lengths) / (total if total > 0 else 1.0)
    return weights
