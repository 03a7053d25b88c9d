"""An `nn.Module` seen as named numpy arrays, and built the same everywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from broker.errors import TaskError
from workers.devices import CPU, draws, reseed, set_draws
from workers.task import Arrays

_GENERATOR = threading.RLock()


def use_threads(threads: int = 1) -> None:
    """From now on torch computes with so many threads (0: as it likes). With several, bits of sums may differ."""
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """torch's generators of the CPU and of this device under this seed inside, as they were before outside. There
    is one in a process: other threads wait."""
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        kept = draws(device)
        torch.default_generator.manual_seed(seed)
        reseed(device, seed)
        try:
            yield
        finally:
            if kept is not None:
                set_draws(device, kept)


def build(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new module whose random initial values depend on the seed alone."""
    with seeded(seed):
        return model()


def views(module: nn.Module) -> Arrays:
    """Parameters and buffers under their `state_dict` names. Those on the CPU are not copied: writing to them
    changes the module.

    Raises TaskError if one has no numpy counterpart (such as bfloat16, or sparse).
    """
    try:
        return {name: tensor.cpu().numpy() for name, tensor in module.state_dict().items()}
    except (TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise TaskError(
            f"the model holds something that cannot travel as a numpy array ({error}): use dense tensors of "
            "float32 or int64"
        ) from error


def arrays_of(module: nn.Module) -> Arrays:
    """Parameters and buffers as copies."""
    return {name: view.copy() for name, view in views(module).items()}


def buffer_patterns(module: nn.Module) -> list[str]:
    """Patterns for what is no parameter: `*.running_mean` for all layers; a name where a parameter ends alike."""
    learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    others = [name for name in module.state_dict() if name not in learned]
    return sorted({_pattern(name, learned) for name in others})


def _pattern(name: str, learned: Collection[str]) -> str:
    _, dot, ending = name.rpartition(".")
    taken = not dot or any(parameter.endswith(dot + ending) for parameter in learned)
    return name if taken else f"*.{ending}"


def load_arrays(module: nn.Module, arrays: Arrays) -> None:
    """Copies the arrays into the module. Raises TaskError unless names, shapes and dtypes are the module's."""
    targets = views(module)
    if targets.keys() != arrays.keys():
        missing, unknown = sorted(targets.keys() - arrays.keys()), sorted(arrays.keys() - targets.keys())
        raise TaskError(
            f"the arrays are not this model's (missing {missing[:5]}, unknown {unknown[:5]}): do both sides run "
            "the same task?"
        )
    tensors = module.state_dict()
    for name, target in targets.items():
        array = arrays[name]
        if array.shape != target.shape or array.dtype != target.dtype:
            raise TaskError(
                f"array {name!r} is {array.dtype} {array.shape}, this model's is {target.dtype} {target.shape}: do "
                "both sides run the same version of the task?"
            )
        if tensors[name].device.type == "cpu":
            np.copyto(target, array)
        else:
            tensors[name].copy_(torch.from_numpy(array.copy()))
