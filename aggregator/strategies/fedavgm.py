"""FedAvg with server momentum (Hsu, Qi and Brown, 2019, "Measuring the effects of non-identical data distribution
for federated visual classification")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.strategies.optimiser import Block


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """v <- beta v + d; x <- x + server_lr v. The paper has server_lr = 1 and beta = `momentum` = 0.9."""

    server_lr: float
    momentum: float

    @property
    def moments(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def step(self, change: Block, *moments: Block) -> Block:
        (v,) = moments
        v *= self.momentum
        v += change
        return self.server_lr * v
