"""Federated stochastic gradient descent (McMahan et al., 2017, section 2)."""

from __future__ import annotations

from collections.abc import Collection

from aggregator.strategies.fedavg import FedAvg
from aggregator.sums import FixedPointSum
from broker.messages import Wants


class FedSGD(FedAvg):
    """x <- x - server_lr * sum_i n_i g_i / sum_i n_i, with g_i the gradient over participant i's examples at x.

    Gradients travel rather than weights. With full batches this is centralised gradient descent. The gradient of a
    buffer is zero: it stays as it is.
    """

    wants: Wants = "gradient"

    def __init__(self, total: FixedPointSum, server_lr: float, buffers: Collection[str] = ()) -> None:
        super().__init__(total, -server_lr, buffers)
