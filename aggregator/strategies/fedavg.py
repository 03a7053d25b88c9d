"""Federated averaging (McMahan et al., 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Collection

from aggregator.strategies.buffers import parameters
from aggregator.strategies.contribution import Contribution
from aggregator.sums import FixedPointSum
from broker.messages import Wants
from broker.tensors import Arrays, Named


class FedAvg:
    """x <- x + server_lr * sum_i n_i Delta_i / sum_i n_i, over the updates really received.

    Delta_i = w_i - x_start is participant i's change to the version it started from, n_i its weight (number
    of examples). With server_lr = 1 this is the paper's weighted mean of the w_i. Buffers such as BatchNorm
    statistics are averaged whatever server_lr is; integer ones are rounded to the nearest.
    """

    wants: Wants = "delta"
    uses_disk = False

    def __init__(self, total: FixedPointSum, server_lr: float, buffers: Collection[str] = ()) -> None:
        self.state: Arrays = {}
        self._sum, self._server_lr, self._buffers = total, server_lr, buffers
        self._model: Arrays = {}

    def start(self, model: Arrays, state: Arrays) -> None:  # noqa: ARG002 - it has none
        self._model = model
        self._sum.start(model)

    def add(self, arrays: Named, by: Contribution) -> None:
        self._sum.add(arrays, by.weight, by.damping)

    def finish(self, out: Arrays | None = None) -> Arrays:
        rates = dict.fromkeys(parameters(self._model, self._buffers), self._server_lr)
        return self._sum.step(self._model, 1.0, out, rates)
