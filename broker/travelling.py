"""What an update consists of beside the model's arrays, and which of them it leaves out. Both sides must agree."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

import numpy as np

from broker.codecs import BESIDE
from broker.errors import ConfigError
from broker.messages import Wants
from broker.tensors import Arrays, Named


def is_local(name: str, local: Collection[str]) -> bool:
    """Whether a tensor stays with each participant: one of the patterns matches its name; `*` is anything."""
    return any(fnmatchcase(name, pattern) for pattern in local)


def shared(model: Arrays, local: Collection[str]) -> Arrays:
    """The tensors of a model that travel."""
    return {name: values for name, values in model.items() if not is_local(name, local)} if local else model


def due(model: Arrays, fragments: int, number: int) -> Arrays:
    """Those tensors of a (shared) model that travel in round `number` (1, 2, ...): all of them, or those of one
    fragment after the other. Raises ConfigError as `cut` does."""
    if fragments == 1:
        return model
    fragment = cut(model, fragments)
    return {name: values for name, values in model.items() if fragment[name] == (number - 1) % fragments}


def cut(model: Arrays, fragments: int) -> dict[str, int]:
    """Which fragment (0, 1, ...) each tensor is in. Neighbours by name are together, so whatever is of one layer
    mostly is, and each has about the same bytes. Raises ConfigError if one would be empty."""
    found, before = {}, 0
    total = max(1, sum(values.nbytes for values in model.values()))
    for name in sorted(model):
        middle = before + model[name].nbytes / 2
        found[name] = min(fragments - 1, int(middle / total * fragments))
        before += model[name].nbytes
    if len(set(found.values())) < fragments:
        largest = max(model, key=lambda name: model[name].nbytes) if model else ""
        raise ConfigError(
            f"strategy.fragments = {fragments} is too many: the model's {len(model)} tensors cannot be cut into so "
            f"many parts of about the same size (its largest is {largest!r}): lower it"
        )
    return found


def beside(model: Arrays, wants: Wants) -> Arrays:
    """What travels beside the change of a (shared) model, as zeros of the right shapes and dtypes.

    With `delta+control` a control variate for every floating-point tensor, in float32 at least. That of a buffer
    is zero, but has its place: then nobody need agree on what is a parameter.
    """
    return named_controls(zero_controls(model)) if wants == "delta+control" else {}


def zero_controls(model: Arrays) -> Arrays:
    """Control variates of zero by tensor; they take no memory and are read-only."""
    return {
        name: np.broadcast_to(np.zeros((), np.result_type(values, np.float32)), values.shape)
        for name, values in model.items()
        if values.dtype.kind == "f"
    }


def named_controls(controls: Named) -> Arrays:
    """As they travel and are kept: `control/` and the tensor's name."""
    return {BESIDE + name: values for name, values in controls.items()}


def controls_in(named: Named) -> Arrays:
    """By tensor again."""
    return {name.removeprefix(BESIDE): values for name, values in named.items() if name.startswith(BESIDE)}
