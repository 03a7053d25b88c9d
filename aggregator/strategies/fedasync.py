"""Asynchronous federated optimisation (Xie et al., 2019, "Asynchronous federated optimization", Algorithm 1)."""

from __future__ import annotations

import math

import numpy as np

from aggregator.strategies.contribution import Contribution
from aggregator.sums import FixedPointSum, put
from broker.messages import Wants
from broker.tensors import Arrays, Named, blocks


class FedAsync:
    """x <- (1 - a_tau) x + a_tau w, with a_tau = server_lr s(tau): the trained model itself is mixed in.

    w is a participant's model and not its change: what others changed meanwhile is partly undone, as in the paper.
    The staleness function is s(tau) = (1 + tau)^-0.5, the paper's polynomial one with a = 0.5. With a buffer of
    K > 1 it is the mean of K such steps from the same x. Buffers and integers are mixed alike.
    """

    wants: Wants = "model"
    uses_disk = False

    def __init__(self, total: FixedPointSum, server_lr: float) -> None:
        self.state: Arrays = {}
        self._sum, self._server_lr = total, server_lr
        self._model: Arrays = {}
        self._dampings: list[float] = []  # n_i s(tau_i)

    def start(self, model: Arrays, state: Arrays) -> None:  # noqa: ARG002 - it has none
        self._model = model
        self._dampings.clear()
        self._sum.start(model)

    def add(self, arrays: Named, by: Contribution) -> None:
        self._sum.add(arrays, by.weight, by.damping)
        self._dampings.append(by.weight * by.damping)

    def finish(self, out: Arrays | None = None) -> Arrays:
        moved = out or {name: np.empty_like(values) for name, values in self._model.items()}
        damping = math.fsum(self._dampings) / self._sum.weight  # exact, so in any order the same
        for name, values in self._model.items():
            flat, new = values.reshape(-1), moved[name].reshape(-1)
            for part in blocks(flat, new):
                x = flat[part].astype(np.float64)
                put(x + self._server_lr * (self._sum.mean(name, part) - damping * x), new[part])
        return moved
