"""LoRA adapters of unequal rank (Hu et al., 2022): which tensors are pairs, and what a lower rank holds of them.

Names are those of PEFT: `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r), perhaps with an
adapter's name before `weight`. A module adds (alpha / r) B A to its frozen weight, with the same alpha whatever r
is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from broker.errors import ConfigError
from broker.tensors import Arrays

A = re.compile(r"(^|\.)lora_A\.")


@dataclass(frozen=True, slots=True)
class Pair:
    """The names of one module's A and B."""

    a: str
    b: str


def pairs(model: Arrays) -> tuple[Pair, ...]:
    """All pairs, by name. Raises ConfigError for adapters that are no matrices, or have no counterpart."""
    found = [Pair(name, A.sub(r"\1lora_B.", name)) for name in sorted(model) if A.search(name)]
    for name in model.keys() - {name for pair in found for name in (pair.a, pair.b)}:
        if "lora_" in name:
            raise ConfigError(
                f"tensor {name!r} is no part of a pair <module>.lora_A.weight, <module>.lora_B.weight"
            )
    for pair in found:
        shapes = [model[name].shape if name in model else () for name in (pair.a, pair.b)]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise ConfigError(
                f"tensors {pair.a!r} {shapes[0]} and {pair.b!r} {shapes[1]} are no pair: (r, in) and (out, r)"
            )
        if {model[pair.a].dtype.kind, model[pair.b].dtype.kind} != {"f"}:
            raise ConfigError(f"tensors {pair.a!r} and {pair.b!r} must be floating-point")
    return tuple(found)


def largest_rank(model: Arrays) -> int:
    """The largest r of a model's pairs; 0 without any."""
    return max((model[pair.a].shape[0] for pair in pairs(model)), default=0)


def of_rank(model: Arrays, rank: int) -> Arrays:
    """What a participant of that rank starts from: of each pair the first `rank` rows and columns; other tensors
    whole. Its (alpha / rank) B A is that part of the global (alpha / r) B A, so B is multiplied by rank / r."""
    found = dict(model)
    for pair in pairs(model):
        a, b = model[pair.a], model[pair.b]
        if rank < (whole := a.shape[0]):
            found[pair.a] = np.ascontiguousarray(a[:rank])
            found[pair.b] = np.ascontiguousarray(b[:, :rank] * b.dtype.type(rank / whole))
    return found
