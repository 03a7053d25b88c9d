"""Clipping by the norm, a stage before any strategy (McMahan et al., 2018; as a defence Sun et al., 2019)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aggregator.strategies.contribution import Contribution
from broker.errors import BadMessage
from broker.tensors import Arrays, Named, blocks

if TYPE_CHECKING:
    from aggregator.strategies import Strategy


class Clipped:
    """Delta <- Delta * min(1, C / ||Delta||_2) before it is added, C = `clip_norm`.

    The norm is that of the whole update, over all tensors of floating-point numbers; integers are neither counted
    nor scaled. What is longer than C is copied once in memory. Values are looked at by the strategy once they are
    clipped: a huge but finite update comes in as one of norm C.
    """

    def __init__(self, strategy: Strategy, clip_norm: float) -> None:
        self._strategy = strategy
        self._clip_norm = clip_norm
        self.wants = strategy.wants
        self.uses_disk = strategy.uses_disk

    @property
    def state(self) -> Arrays:
        return self._strategy.state

    def start(self, model: Arrays, state: Arrays) -> None:
        self._strategy.start(model, state)

    def add(self, arrays: Named, by: Contribution) -> None:
        norm = norm_of(arrays)
        if not math.isfinite(norm):
            raise BadMessage("the update has values that are not finite, or no norm")
        if norm > self._clip_norm:
            arrays = scaled(arrays, self._clip_norm / norm)
        self._strategy.add(arrays, by)

    def finish(self, out: Arrays | None = None) -> Arrays:
        return self._strategy.finish(out)


def norm_of(arrays: Named) -> float:
    """The Euclidean norm over all values of floating-point tensors together."""
    squares: list[float] = []
    for values in arrays.values():
        if values.dtype.kind == "f":
            flat = values.reshape(-1)
            with np.errstate(over="ignore"):
                squares += [_square(flat[part]) for part in blocks(flat)]
    return math.sqrt(sum(squares))


def _square(block: NDArray[Any]) -> float:
    return float(np.square(block, dtype=np.float64).sum())


def scaled(arrays: Named, factor: float) -> Arrays:
    """New arrays: floating-point values times `factor`, in their dtypes; integers as they are."""
    return {name: _times(values, factor) if values.dtype.kind == "f" else values for name, values in arrays.items()}


def _times(values: NDArray[Any], factor: float) -> NDArray[Any]:
    out = np.empty_like(values)
    np.multiply(values, factor, out=out, dtype=np.float64, casting="same_kind")
    return out
