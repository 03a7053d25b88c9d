"""How a batch of examples becomes a loss where plain training is not enough: augmented, mixed, weighted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from workers.augment import Augment

Loss = Callable[[Tensor, Tensor], Tensor]

LEAST_DOUBT = 1e-8  # 1 - p of the focal loss, whose gradient is not finite at 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one participant's steps minimise in one round. `loss` is that of a batch; all draws come from `rng`.

    `mixup` is ALPHA of mixup (Zhang et al., 2018): a batch becomes l x + (1 - l) x', with x' the batch in another
    order and l from Beta(ALPHA, ALPHA), and so do its targets. Cross-entropy is linear in them, so the loss of a
    mixed target is the mixed loss; for squared errors it is too, but for a constant. 0: no mixup.
    """

    loss: Loss
    rng: Generator
    augment: Augment | None = None
    mixup: float = 0.0

    def __call__(self, x: Tensor) -> tuple[Tensor, Loss]:
        """The inputs (n, ...) to show, and the loss of what the model says of them and their own targets."""
        if self.augment is not None:
            x = torch.from_numpy(self.augment(x.numpy(), self.rng))
        if not self.mixup:
            return x, self.loss
        share = float(self.rng.beta(self.mixup, self.mixup))
        other = torch.from_numpy(self.rng.permutation(len(x)))

        def mixed(outputs: Tensor, targets: Tensor) -> Tensor:
            others = targets[other.to(targets.device)]
            return share * self.loss(outputs, targets) + (1 - share) * self.loss(outputs, others)

        return share * x + (1 - share) * x[other], mixed


def weighted_cross_entropy(weights: Tensor | None, gamma: float) -> Loss:
    """Mean over a batch of w_y (1 - p)^gamma (-log p), p being what the model gives the true class y: the focal
    loss (Lin et al., 2017). `weights` (classes,) are 1 in the mean over the data; None: all 1.

    The mean is by examples, and not by weights as in torch, which would give a batch of one class weight 1.
    """

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(outputs, targets, reduction="none")
        if gamma:
            each = each * (-torch.expm1(-each)).clamp_min(LEAST_DOUBT) ** gamma
        return (each if weights is None else each * weights.to(targets.device)[targets]).mean()

    return loss
