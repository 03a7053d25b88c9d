"""What robust rules have in common: updates are collected on disk, then combined block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aggregator.stack import Rows, Stack
from aggregator.strategies.buffers import parameters
from aggregator.strategies.clipping import scaled
from aggregator.strategies.contribution import Contribution
from aggregator.sums import Scale, check_within, put
from broker.errors import StateError
from broker.messages import Wants
from broker.tensors import Arrays, Named, give_back

Combine = Callable[[Rows], NDArray[np.float64]]  # (updates, values) -> (values,)
InnerProducts = Callable[[], NDArray[np.float64]]  # of whole updates, (updates, updates); it reads all of them


class RobustRule(Protocol):
    """How one vector is made of several, among which some may be anything."""

    @property
    def least(self) -> int:
        """The fewest updates among which it bears as many bad ones as it was made for."""

    def combination(self, inner_products: InnerProducts) -> Combine:
        """How the blocks of these updates are combined, each on its own."""


class Collected:
    """x <- x + server_lr * rule(Delta_1, ..., Delta_n), with one update per participant and no weights.

    What a participant says about its number of examples is not believed: one could outweigh all others. A stale
    update is one among the others, damped; if its participant delivers again, the newer one takes its place.

    Integers and buffers (see `buffers.py`) are on another scale than parameters: they do not count in distances,
    and are combined by the coordinate median, integers rounded to the nearest.
    """

    wants: Wants = "delta"
    uses_disk = True

    def __init__(
        self, rule: RobustRule | None, server_lr: float, buffers: Collection[str] = (), scratch: Path | None = None
    ) -> None:
        self._rule = rule
        self._server_lr, self._buffers = server_lr, buffers
        self.state: Arrays = {}
        self._scratch = scratch
        self._model: Arrays = {}
        self._bounds: dict[str, float] = {}
        self._stack = Stack({}, scratch)

    def start(self, model: Arrays, state: Arrays) -> None:  # noqa: ARG002 - it has none
        self._model = model
        self._bounds = {name: Scale.of(name, values, 1, 1).bound for name, values in model.items()}
        self._stack = Stack(model, self._scratch)

    def add(self, arrays: Named, by: Contribution) -> None:
        if by.damping < 1:
            arrays = scaled(arrays, by.damping)
        for name, values in arrays.items():
            check_within(self._bounds[name], name, values)
        self._stack.put(by.participant, arrays)

    def finish(self, out: Arrays | None = None) -> Arrays:
        if len(self._stack) < self.least:
            raise StateError(f"{len(self._stack)} updates are fewer than the {self.least} that it needs")
        moved = out or {name: np.empty_like(values) for name, values in self._model.items()}
        compared = sorted(parameters(self._model, self._buffers))
        combine = self._combination(compared)
        for name, values in self._model.items():
            how = combine if name in compared else self._of_others
            flat, new = values.reshape(-1), moved[name].reshape(-1)
            for part, rows in self._stack.blocks(name):
                put(flat[part].astype(np.float64) + self._server_lr * how(rows), new[part])
                give_back(flat[part])
                give_back(new[part])
        return moved

    @property
    def least(self) -> int:
        """The fewest updates that it can combine."""
        return self._rule.least if self._rule else 1

    def _combination(self, compared: list[str]) -> Combine:
        """How parameters are combined; `compared` are their names."""
        return self._rule.combination(lambda: self._stack.inner_products(compared)) if self._rule else median

    def _of_others(self, rows: Rows) -> NDArray[np.float64]:
        """How buffers and integers are combined."""
        return median(rows)


def median(rows: Rows) -> NDArray[np.float64]:
    """The coordinate median (values,) of (updates, values); of an even number the mean of the two in the middle."""
    ordered, n = np.sort(rows, axis=0), len(rows)
    middle: NDArray[np.float64] = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2  # thrice as fast as np.median
    return middle
