"""The local optimisers: what a step makes of the gradients that `backward` left in a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from workers.recipe import ADAMW, Recipe
from workers.task import Arrays
from workers.terms import Parameters

FIRST, SECOND, STEPS = "m/", "v/", "steps"

log = structlog.get_logger(__name__)


class Optimiser(Protocol):
    def step(self, module: Parameters, scale: float = 1.0) -> None:
        """Moves the parameters by their gradients, `scale` times `lr` as far; may write over those."""

    def state(self) -> Arrays:
        """What the next round's steps begin with; empty if they begin anew."""

    def progress(self) -> Arrays:
        """What the next step begins with; perhaps views."""

    def go_on_from(self, progress: Arrays) -> None:
        """Takes up what `progress` gave."""


def optimiser(chosen: Recipe, module: Parameters, state: Arrays) -> Optimiser:
    """The optimiser that the recipe names, going on from `state` as it was left by the last."""
    return AdamW(chosen, module, state) if chosen.optimiser == ADAMW else Sgd(chosen)


class Sgd:
    """v <- momentum v + g; w <- w - lr v. It begins anew each round."""

    def __init__(self, chosen: Recipe) -> None:
        self._chosen = chosen
        self._velocity: dict[str, Tensor] = {}

    def step(self, module: Parameters, scale: float = 1.0) -> None:
        with torch.no_grad():
            for name, parameter, step in _gradients(module):
                if self._chosen.momentum:
                    if name in self._velocity:
                        step.add_(self._velocity[name].to(step.device), alpha=self._chosen.momentum)
                    self._velocity[name] = step  # zero_grad lets go of it, so nobody else writes to it
                parameter.sub_(step, alpha=scale * self._chosen.lr)

    def state(self) -> Arrays:
        return {}

    def progress(self) -> Arrays:
        return {name: values.cpu().numpy() for name, values in self._velocity.items()}

    def go_on_from(self, progress: Arrays) -> None:
        self._velocity = {name: torch.from_numpy(values.copy()) for name, values in progress.items()}


class AdamW:
    """Loshchilov and Hutter, 2019, Algorithm 2, in the form of torch.optim.AdamW; t counts steps over all rounds.

        w <- w - lr weight_decay w
        m <- beta_1 m + (1 - beta_1) g;  v <- beta_2 v + (1 - beta_2) g^2
        w <- w - lr (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps)

    Its state goes on from round to round, as DiLoCo's inner optimiser does (Douillard et al., 2023, Algorithm 1).
    One that does not fit the module's parameters is forgotten.
    """

    def __init__(self, chosen: Recipe, module: Parameters, state: Arrays) -> None:
        self._chosen = chosen
        own = dict(module.named_parameters())
        if state and not _fits(state, own):
            log.warning("optimiser_state_dropped", reason="it is of another model")
            state = {}
        self._own = own
        self.go_on_from(state)

    def step(self, module: Parameters, scale: float = 1.0) -> None:
        chosen, lr = self._chosen, scale * self._chosen.lr
        self._steps += 1
        first, second = 1 - chosen.beta_1**self._steps, 1 - chosen.beta_2**self._steps
        with torch.no_grad():
            for name, parameter, gradient in _gradients(module):
                parameter.mul_(1 - lr * chosen.weight_decay)
                m = self._m[name].lerp_(gradient, 1 - chosen.beta_1)
                v = self._v[name].mul_(chosen.beta_2).addcmul_(gradient, gradient, value=1 - chosen.beta_2)
                parameter.addcdiv_(m, (v / second).sqrt_().add_(chosen.eps), value=-lr / first)

    def state(self) -> Arrays:
        found = {FIRST + name: values.cpu().numpy() for name, values in self._m.items()}
        found |= {SECOND + name: values.cpu().numpy() for name, values in self._v.items()}
        return {**found, STEPS: np.array(self._steps)}

    def progress(self) -> Arrays:
        return self.state()

    def go_on_from(self, progress: Arrays) -> None:
        self._steps = int(progress[STEPS]) if progress else 0
        self._m = {name: _begun(progress, FIRST + name, values) for name, values in self._own.items()}
        self._v = {name: _begun(progress, SECOND + name, values) for name, values in self._own.items()}


def _gradients(module: Parameters) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            yield name, parameter, parameter.grad


def _fits(state: Arrays, own: dict[str, nn.Parameter]) -> bool:
    shapes = {prefix + name: tuple(values.shape) for prefix in (FIRST, SECOND) for name, values in own.items()}
    return {name: values.shape for name, values in state.items()} == {**shapes, STEPS: ()}


def _begun(state: Arrays, name: str, like: Tensor) -> Tensor:
    if not state:
        return torch.zeros_like(like, requires_grad=False)
    return torch.from_numpy(state[name].copy()).to(like.device)
