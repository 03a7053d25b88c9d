"""Federated averaging (McMahan et al., 2017, Algorithm 1)."""

from __future__ import annotations

from typing import Literal

from aggregator.sums import FixedPointSum
from broker.tensors import Arrays


class FedAvg:
    """x <- x + server_lr * sum_i n_i Delta_i / sum_i n_i, over the updates really received.

    Delta_i = w_i - x_start is participant i's change to the version it started from, n_i its weight (number
    of examples). With server_lr = 1 this is the paper's weighted mean of the w_i. Buffers such as BatchNorm
    statistics are averaged alike; integer ones are rounded to the nearest.
    """

    wants: Literal["delta", "gradient"] = "delta"
    uses_disk = False

    def __init__(self, total: FixedPointSum, server_lr: float) -> None:
        self._sum = total
        self._server_lr = server_lr
        self._model: Arrays = {}

    def start(self, model: Arrays) -> None:
        self._model = model
        self._sum.start(model)

    def add(self, arrays: Arrays, weight: int, participant: str) -> None:  # noqa: ARG002 - sums do not ask whose
        self._sum.add(arrays, weight)

    def finish(self, out: Arrays | None = None) -> Arrays:
        return self._sum.step(self._model, self._server_lr, out)
