"""Weighted sums that come out the same, bit for bit, in whatever order updates arrive.

Each value is scaled and rounded to an integer once, and integers add up exactly. How many bits there are
for the fraction follows from committed data only (the global model, the largest admissible weight), so
every leader that replays the same updates computes the same sum. See docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.room import Zeros, in_memory
from broker.errors import BadMessage, StateError
from broker.tensors import Arrays, Named, blocks, give_back, is_mapped

LEAST_BOUND = 2.0**10


@dataclass(frozen=True, slots=True)
class Scale:
    """Values within ±bound are summed as integers in units of 2**-bits."""

    bound: float
    bits: int

    @classmethod
    def of(cls, name: str, values: NDArray[Any], weight_max: int, weight_cap: int) -> Scale:
        """Room for the values of one tensor. Raises StateError if it has no mean, or grew beyond all bounds."""
        if values.dtype.kind not in "fi":
            raise StateError(
                f"tensor {name!r} has dtype {values.dtype}, which cannot be averaged: leave it out of the model's "
                "arrays (in torch: register_buffer(..., persistent=False))"
            )
        largest = _largest(values)
        if not math.isfinite(largest):
            raise StateError(f"tensor {name!r} of the global model is not finite: the run has diverged")
        log_bound = math.ceil(math.log2(max(LEAST_BOUND, 16 * largest)))
        bits = min(62 - log_bound - _log2(weight_cap), 51 - log_bound - _log2(weight_max))
        if bits < 0:
            raise StateError(
                f"tensor {name!r} has values of {largest:g}, too large to sum exactly: scale the model"
            )
        return cls(2.0**log_bound, bits)


def _largest(values: NDArray[Any]) -> float:
    """The largest magnitude; not finite if any value is not."""
    if not values.flags.c_contiguous:  # the same value everywhere, which takes no memory
        values = values[(slice(1),) * values.ndim]
    flat, largest = values.reshape(-1), 0.0
    for part in blocks(flat):
        found = max(abs(float(flat[part].min())), abs(float(flat[part].max())))
        if not math.isfinite(found):
            return found
        largest = max(largest, found)
    return largest


def _log2(weight: int) -> int:
    return max(0, (weight - 1).bit_length())


class FixedPointSum:
    """The weighted sum of arrays shaped like a model: one int64 accumulator, however many updates. `zeros`: where
    it lies."""

    def __init__(self, weight_max: int, weight_cap: int, zeros: Zeros = in_memory) -> None:
        self.weight_max = weight_max
        self.weight_cap = weight_cap
        self.weight = 0
        self._zeros = zeros
        self._scales: dict[str, Scale] = {}
        self._sums: dict[str, NDArray[np.int64]] = {}

    def start(self, model: Arrays) -> None:
        """Begins at zero for updates of this model; accumulators in memory are allocated once per run."""
        self._scales = {name: Scale.of(name, v, self.weight_max, self.weight_cap) for name, v in model.items()}
        self.weight = 0
        is_there = {n: s.size for n, s in self._sums.items()} == {n: v.size for n, v in model.items()}
        if is_there and not any(map(is_mapped, self._sums.values())):
            for accumulator in self._sums.values():
                accumulator.fill(0)
            return
        self._sums.clear()  # a new file costs less than zeros in the old one
        sizes = [values.size for values in model.values()]
        parts = np.split(self._zeros(sum(sizes)), np.cumsum(sizes)[:-1])
        self._sums = dict(zip(model, parts, strict=True))

    def add(
        self, arrays: Named, weight: int, damping: float = 1.0, divisors: Mapping[str, float] | None = None
    ) -> None:
        """Adds weight * damping * arrays, all or nothing; those of `divisors` are divided by them, too.

        `damping` is at most 1, a divisor at least 1: neither changes what the sum is divided by in the end.

        Raises BadMessage if a value is out of bounds or not finite.
        """
        self.check(arrays, weight)
        for name, values in arrays.items():
            self._fold(name, values, weight * damping / (divisors or {}).get(name, 1.0))
        self.weight += weight

    def check(self, arrays: Named, weight: int) -> None:
        """Raises BadMessage as `add` would, and adds nothing."""
        if not 0 < weight <= self.weight_max or self.weight + weight > self.weight_cap:
            raise BadMessage(f"weight {weight} does not fit: {self.weight} of at most {self.weight_cap} is summed")
        for name, values in arrays.items():
            check_within(self._scales[name].bound, name, values)

    def _fold(self, name: str, values: NDArray[Any], weight: float) -> None:
        factor = weight * 2.0 ** self._scales[name].bits
        flat, accumulator = values.reshape(-1), self._sums[name]
        for part in blocks(flat, accumulator):
            scaled = flat[part].astype(np.float64)
            scaled *= factor
            np.rint(scaled, out=scaled)
            accumulator[part] += scaled.astype(np.int64)

    def step(
        self, model: Arrays, rate: float, out: Arrays | None = None, rates: Mapping[str, float] | None = None
    ) -> Arrays:
        """The arrays model + rate * mean, in the model's dtypes; integers are rounded, all stay in range.

        Those that `rates` names have their own. They are new, or written into `out`, which may be the model itself.
        """
        moved = out or {name: np.empty_like(values) for name, values in model.items()}
        for name, values in model.items():
            self.move(name, values, (rates or {}).get(name, rate), moved[name])
        return moved

    def move(self, name: str, values: NDArray[Any], rate: float, moved: NDArray[Any]) -> None:
        """Writes values + rate * mean into `moved`, which may be `values`."""
        flat, written = values.reshape(-1), moved.reshape(-1)
        for part in blocks(flat, written):
            put(flat[part].astype(np.float64) + rate * self.mean(name, part), written[part])

    def mean(self, name: str, part: slice) -> NDArray[np.float64]:
        """The weighted mean over a block of one tensor, seen flat."""
        divisor = float(self.weight) * 2.0 ** self._scales[name].bits
        summed = self._sums[name][part].astype(np.float64)
        give_back(self._sums[name][part])
        return summed / divisor


def put(exact: NDArray[np.float64], out: NDArray[Any]) -> None:
    """Writes values in the dtype of `out`: integers are rounded, all stay in range. Clips `exact` on the way."""
    least, most = _range(out.dtype)
    np.clip(exact, least, most, out=exact)
    out[...] = exact if out.dtype.kind == "f" else np.rint(exact)


def check_within(bound: float, name: str, values: NDArray[Any]) -> None:
    """Raises BadMessage unless all values of a tensor are finite and lie within ±bound."""
    flat = values.reshape(-1)
    for part in blocks(flat):
        block = flat[part]
        # Also false for NaN, which compares unequal to everything. In float16 a bound might be infinite.
        if not (float(block.min()) >= -bound and float(block.max()) <= bound):
            raise BadMessage(f"tensor {name!r} has values that are not finite or beyond ±{bound:g}")


def _range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The least and the largest finite value, so that nothing turns over or becomes infinite."""
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return float(limits.min), float(limits.max)
