"""q-FedAvg (Li et al., 2020, "Fair resource allocation in federated learning", Algorithm 2), which minimises
sum_i F_i^(q+1) / (q + 1): whoever is served badly counts for more."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aggregator.settings import StrategySettings
from aggregator.stack import Rows
from aggregator.strategies.collected import Collected, Combine
from aggregator.strategies.contribution import Contribution
from broker.errors import BadMessage
from broker.messages import Wants
from broker.tensors import Named

LEAST_LOSS = 1e-10


class QFedAvg(Collected):
    """x <- x + server_lr sum_i F_i^q L Delta_i / sum_i h_i,  h_i = q F_i^(q-1) ||L Delta_i||^2 + L F_i^q.

    F_i is participant i's mean loss at x, before it trains, and L the Lipschitz constant of the gradients, for
    which the paper takes 1 / the local step size. Norms are those of all parameters together. With q = 0 it is the
    plain mean: everybody counts alike, as in the paper, however many examples it has. Buffers and integers get the
    plain mean. Nobody can check F_i: who claims a large one has more weight.
    """

    wants: Wants = "delta+loss"

    def __init__(self, chosen: StrategySettings, buffers: Collection[str], scratch: Path | None) -> None:
        super().__init__(None, chosen.server_lr or 1.0, buffers, scratch)
        self._q, self._lipschitz = chosen.q, chosen.lipschitz
        self._losses: dict[str, float] = {}

    @property
    def least(self) -> int:
        return 1

    def add(self, arrays: Named, by: Contribution) -> None:
        if by.start_loss is None:
            raise BadMessage(
                "the update does not tell the loss that it started from, which q-fedavg needs: its learning task "
                "must set TrainResult.start_loss"
            )
        super().add(arrays, by)
        self._losses[by.participant] = max(by.start_loss, LEAST_LOSS)

    def _combination(self, compared: list[str]) -> Combine:
        losses = np.array([self._losses[participant] for participant in self._stack.participants])
        squares = self._stack.inner_products(compared).diagonal()
        weights = fair_weights(losses, squares, self._q, self._lipschitz)

        def combine(rows: Rows) -> NDArray[np.float64]:
            mean: NDArray[np.float64] = (weights[:, None] * rows).sum(axis=0)
            return mean

        return combine

    def _of_others(self, rows: Rows) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = rows.mean(axis=0)
        return mean


def fair_weights(
    losses: NDArray[np.float64], squares: NDArray[np.float64], q: float, lipschitz: float
) -> NDArray[np.float64]:
    """What each Delta_i (n,) is multiplied by; `squares` are their ||Delta_i||^2.

    Numerator and denominator are divided by the largest loss to the power of q, or they would vanish for large q.
    """
    powers = (losses / losses.max()) ** q
    h = powers * (q / losses * lipschitz**2 * squares + lipschitz)
    weights: NDArray[np.float64] = lipschitz * powers / h.sum()
    return weights
