"""Federated stochastic gradient descent (McMahan et al., 2017, section 2)."""

from __future__ import annotations

from typing import Literal

from aggregator.strategies.fedavg import FedAvg
from broker.tensors import Arrays


class FedSGD(FedAvg):
    """x <- x - server_lr * sum_i n_i g_i / sum_i n_i, with g_i the gradient over participant i's examples at x.

    Gradients travel rather than weights. With full batches this is centralised gradient descent.
    """

    wants: Literal["delta", "gradient"] = "gradient"

    def finish(self, out: Arrays | None = None) -> Arrays:
        return self._sum.step(self._model, -self._server_lr, out)
