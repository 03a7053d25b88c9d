"""Terms that are added to a gradient: the L2 penalty, the proximal term, and SCAFFOLD's correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from workers.task import TrainConfig


class Parameters(Protocol):
    """A module, or whatever else has named parameters to move."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def add_penalty(module: Parameters, l2: float) -> None:
    """Adds l2 w for parameters with two or more dimensions."""
    for _, parameter in module.named_parameters() if l2 else ():
        if parameter.grad is not None and parameter.ndim > 1:
            parameter.grad.add_(parameter.detach(), alpha=l2)


def origin(module: Parameters, config: TrainConfig) -> dict[str, Tensor]:
    """The parameters to which a proximal term pulls: those that were told, or those that the module has now."""
    if config.origin is None:
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {
        name: torch.from_numpy(config.origin[name].copy()).to(parameter.device)
        for name, parameter in module.named_parameters()
    }


def correct(module: Parameters, correction: Mapping[str, Tensor]) -> None:
    """Adds what SCAFFOLD told."""
    for name, parameter in module.named_parameters() if correction else ():
        if name in correction and parameter.grad is not None:
            parameter.grad.add_(correction[name])


def pull_back(module: Parameters, mu: float, start: Mapping[str, Tensor]) -> None:
    """Adds mu (w - x)."""
    for name, parameter in module.named_parameters() if mu else ():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start[name], alpha=mu)
