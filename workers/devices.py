"""Where a module trains and evaluates: the CPU, a CUDA device or Apple's (MPS). Arrays travel from the CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from broker.errors import ConfigError

AUTO = "auto"
CPU = torch.device("cpu")
FORM = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True)
class There:
    """What torch sees: how many CUDA devices, and whether there is MPS."""

    cuda: int = 0
    mps: bool = False


def there() -> There:
    return There(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available())


def find(asked: str, seen: There | None = None) -> torch.device:
    """The device of that name: `cpu`, `cuda` (the first), `cuda:N`, `mps`; or `auto`, the first there is of CUDA,
    MPS and CPU. Raises ConfigError if it is not there."""
    seen = there() if seen is None else seen
    if not FORM.fullmatch(asked):
        raise ConfigError(f"device {asked!r} is none of auto, cpu, cuda, cuda:N and mps")
    if asked == AUTO:
        asked = "cuda" if seen.cuda else "mps" if seen.mps else "cpu"
    kind, _, number = asked.partition(":")
    if (kind == "mps" and not seen.mps) or (kind == "cuda" and int(number or 0) >= seen.cuda):
        have = [f"cuda:{n}" for n in range(seen.cuda)] + ["mps"] * seen.mps + ["cpu"]
        raise ConfigError(
            f"device {asked!r} is not there: torch {torch.__version__} sees {', '.join(have)}; choose one of them "
            "or auto, or install the driver and a torch that is built for it"
        )
    return torch.device(kind, int(number or 0)) if kind == "cuda" else torch.device(kind)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The same there; to CUDA from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def draws(device: torch.device) -> Tensor | None:
    """The state of the generator that dropout draws from there; None if that is the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def set_draws(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)


def reseed(device: torch.device, seed: int) -> None:
    """Nothing for the CPU, whose generator is torch's."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
