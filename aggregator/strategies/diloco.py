"""DiLoCo's outer optimiser (Douillard et al., 2023, "DiLoCo: distributed low-communication training of language
models", Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.strategies.optimiser import Block


@dataclass(frozen=True, slots=True)
class DiLoCo:
    """With the outer gradient D = mean(x - w_i) = -d: v <- mu v + D; x <- x - server_lr (D + mu v), which is SGD
    with Nesterov momentum as torch has it. The paper has server_lr = 0.7 and mu = `momentum` = 0.9.

    The inner optimiser is the learning task's: the paper takes AdamW, hundreds of steps a round.
    """

    server_lr: float
    momentum: float

    @property
    def moments(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def step(self, change: Block, *moments: Block) -> Block:
        (v,) = moments
        v *= self.momentum
        v -= change
        return self.server_lr * (change - self.momentum * v)
