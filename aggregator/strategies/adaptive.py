"""FedAdagrad, FedAdam and FedYogi (Reddi et al., 2021, "Adaptive federated optimization", Algorithm 2).

    m <- beta_1 m + (1 - beta_1) d
    v <- v + d^2                                    FedAdagrad
    v <- beta_2 v + (1 - beta_2) d^2                FedAdam
    v <- v - (1 - beta_2) d^2 sign(v - d^2)         FedYogi
    x <- x + server_lr m / (sqrt(v) + tau)

with m = 0 and v = tau^2 before the first round. There is no bias correction: Algorithm 2 has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from aggregator.strategies.optimiser import Block

NextV = Callable[[Block, Block, float], Block]  # of v, d^2 and beta_2


def adagrad(v: Block, squared: Block, beta_2: float) -> Block:  # noqa: ARG001 - it forgets nothing
    return v + squared


def adam(v: Block, squared: Block, beta_2: float) -> Block:
    return beta_2 * v + (1 - beta_2) * squared


def yogi(v: Block, squared: Block, beta_2: float) -> Block:
    return v - (1 - beta_2) * squared * np.sign(v - squared)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """One of the three, by how v goes on (`next_v`)."""

    next_v: NextV
    server_lr: float
    beta_1: float
    beta_2: float
    tau: float

    @property
    def moments(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2}

    def step(self, change: Block, *moments: Block) -> Block:
        m, v = moments
        m *= self.beta_1
        m += (1 - self.beta_1) * change
        v[...] = self.next_v(v, change * change, self.beta_2)
        return self.server_lr * m / (np.sqrt(v) + self.tau)
