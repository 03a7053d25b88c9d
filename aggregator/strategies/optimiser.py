"""Server optimisers: the participants' mean change is a step of an optimiser at the aggregator (Reddi et al., 2021,
"Adaptive federated optimization", Algorithm 1: ServerOpt)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aggregator.strategies.buffers import parameters
from aggregator.strategies.contribution import Contribution
from aggregator.sums import FixedPointSum, put
from broker.errors import BadMessage, StateError
from broker.messages import Wants
from broker.tensors import MAX_NAME, Arrays, Named, blocks, check_like

Block = NDArray[np.float64]


class Rule(Protocol):
    """How one optimiser steps. It sees parameters block by block, as float64, and each value alone."""

    @property
    def moments(self) -> Mapping[str, float]:
        """What it remembers of every parameter from round to round, by name, and the value before the first."""

    def step(self, change: Block, *moments: Block) -> Block:
        """x_new - x for the mean change d = sum_i n_i Delta_i / sum_i n_i (shape of the block). `moments`, in the
        order of their names above, are overwritten by the new ones."""


class ServerOptimiser:
    """x <- x + step(d, moments), with d the mean change weighted by examples, as FedAvg has it.

    The moments are the strategy's state: for each parameter `<moment>/<name>` in float32, or float64 if the
    parameter is. What is no parameter (see `buffers.py`) is averaged plainly and has no moments.
    """

    wants: Wants = "delta"
    uses_disk = False

    def __init__(self, total: FixedPointSum, rule: Rule, buffers: Collection[str]) -> None:
        self.state: Arrays = {}
        self._sum, self._rule, self._buffers = total, rule, buffers
        self._model: Arrays = {}
        self._parameters: frozenset[str] = frozenset()

    def start(self, model: Arrays, state: Arrays) -> None:
        self._model, self.state = model, state
        self._parameters = parameters(model, self._buffers)
        self._sum.start(model)
        self._check()

    def add(self, arrays: Named, by: Contribution) -> None:
        self._sum.add(arrays, by.weight, by.damping)

    def finish(self, out: Arrays | None = None) -> Arrays:
        moved = out or {name: np.empty_like(values) for name, values in self._model.items()}
        self.state = self._own_state()
        for name, values in self._model.items():
            if name in self._parameters:
                self._move(name, values, moved[name])
            else:
                self._sum.move(name, values, 1.0, moved[name])
        return moved

    def _move(self, name: str, values: NDArray[Any], moved: NDArray[Any]) -> None:
        flat, written = values.reshape(-1), moved.reshape(-1)
        kept = [self.state[_named(moment, name)].reshape(-1) for moment in self._rule.moments]
        for part in blocks(flat, written):
            moments = [moment[part].astype(np.float64) for moment in kept]
            step = self._rule.step(self._sum.mean(name, part), *moments)
            put(flat[part].astype(np.float64) + step, written[part])
            for moment, new in zip(kept, moments, strict=True):
                put(new, moment[part])

    def _own_state(self) -> Arrays:
        """The moments to overwrite: those of `start` if they may be, else a copy, or the first ones."""
        if self.state and all(array.flags.writeable for array in self.state.values()):
            return self.state
        if self.state:
            return {name: array.copy() for name, array in self.state.items()}
        return self.first_state(self._model)

    def first_state(self, model: Arrays) -> Arrays:
        """The moments of this model before the first round."""
        return {
            _named(moment, name): np.full(model[name].shape, first, _precision(model[name]))
            for moment, first in self._rule.moments.items()
            for name in sorted(parameters(model, self._buffers))
        }

    def _check(self) -> None:
        """Raises StateError if the state is not that of this rule for this model."""
        like = {
            _named(moment, name): np.broadcast_to(_precision(self._model[name])(0), self._model[name].shape)
            for moment in self._rule.moments
            for name in self._parameters
        }
        if long := [name for name in like if len(name) > MAX_NAME]:
            raise StateError(
                f"tensor {long[0]!r} needs a shorter name in the model: its moments have none to travel"
            )
        if self.state:
            try:
                check_like(self.state, like)
            except BadMessage as bad:
                raise StateError(
                    f"the strategy's state in the record is another one's ({bad.reason}): go on with the "
                    "strategy.name and strategy.buffers that the run had, or begin again with --fresh"
                ) from None


def _named(moment: str, name: str) -> str:
    return f"{moment}/{name}"


def _precision(values: NDArray[Any]) -> type[np.float32] | type[np.float64]:
    return np.float64 if values.dtype == np.float64 else np.float32
