"""Participants with LoRA adapters of different ranks: products are averaged, not factors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import structlog

from aggregator.stack import Stack
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.lora import Factored, Sum, factored
from aggregator.sums import FixedPointSum, Scale, check_within, put
from broker.errors import BadMessage, ConfigError
from broker.lora import Pair, pairs
from broker.messages import Wants
from broker.tensors import Arrays, Named

log = structlog.get_logger(__name__)


class LoraStack:
    """(alpha / r) B A <- the best of rank r for sum_i p_i [ (alpha / r_i) B_i A_i + what i was not given of B A ].

    The sum is that of FLoRA (Wang et al., 2024), stacked and exact; then a truncated SVD brings it back to the
    global rank. Participant i of rank r_i trained the first r_i rows and columns, which are the best of that rank.
    The others stay as they were for it: B A = sum_k b_k a_k, and those with k > r_i count with its weight p_i.
    alpha is the same for all, so alpha / r_i is r / r_i in units of the global scale. Tensors outside pairs get
    the weighted mean.

    Updates are kept on the disk and combined sorted by participant, module by module: in whatever order they come,
    the bits are the same. LAPACK's bits may differ between kinds of machines.
    """

    wants: Wants = "model"
    uses_disk = True
    sum_of = Sum

    def __init__(self, total: FixedPointSum, scratch: Path | None = None) -> None:
        self.state: Arrays = {}
        self._sum, self._scratch = total, scratch
        self._model: Arrays = {}
        self._pairs: tuple[Pair, ...] = ()
        self._stack = Stack({}, scratch)
        self._weights: dict[str, int] = {}
        self._ranks: dict[str, int] = {}

    def start(self, model: Arrays, state: Arrays) -> None:  # noqa: ARG002 - it has none
        """Raises ConfigError if the model has no adapters, or others than PEFT's."""
        self._model, self._pairs = model, pairs(model)
        if not self._pairs:
            raise ConfigError(
                f"strategy.name = 'lora-stack' needs tensors <module>.lora_A.weight and <module>.lora_B.weight, "
                f"and the model has {', '.join(sorted(model)[:10])}: use fedavg"
            )
        self._stack = Stack(self._paired(model), self._scratch)
        self._weights.clear()
        self._ranks.clear()
        self._sum.start(self._others(model))

    def add(self, arrays: Named, by: Contribution) -> None:
        if by.damping < 1:
            raise BadMessage("a stale update cannot be damped: it is a model, and what it began with is gone")
        for name in self._names:
            check_within(Scale.of(name, self._model[name], 1, 1).bound, name, arrays[name])
        self._sum.add({name: arrays[name] for name in self._others(self._model)}, by.weight)
        self._stack.put(by.participant, {name: _padded(arrays[name], self._model[name]) for name in self._names})
        self._weights[by.participant] = by.weight
        self._ranks[by.participant] = max(arrays[pair.a].shape[0] for pair in self._pairs)

    def finish(self, out: Arrays | None = None) -> Arrays:
        moved = out or {name: np.empty_like(values) for name, values in self._model.items()}
        others = self._others(self._model)
        self._means(others, moved)
        squares = np.zeros(2)
        for pair in self._pairs:
            found = self._combined(pair)
            put(found.b, moved[pair.b])
            put(found.a, moved[pair.a])
            squares += [found.lost**2, found.norm**2]
        lost = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
        log.info("lora_factored", modules=len(self._pairs), ranks=sorted(set(self._ranks.values())), lost=lost)
        return moved

    def _combined(self, pair: Pair) -> Factored:
        """The new factors of one module, with the global rank."""
        a, b = self._model[pair.a], self._model[pair.b]
        rank, whole = len(a), sum(self._weights.values())
        total, stays = self.sum_of(len(b), a.shape[1]), np.zeros(rank)
        for participant in self._stack.participants:
            share, own = self._weights[participant] / whole, min(rank, self._ranks[participant])
            its_b, its_a = (
                self._stack.one(participant, name).reshape(self._model[name].shape) for name in (pair.b, pair.a)
            )
            total.add(its_b[:, :own], its_a[:own], share * rank / own)
            stays[own:] += share
        total.add(b, a, stays)
        shortest = float(np.linalg.norm(a.astype(np.float64), axis=1).min())
        return factored(*total.factors(), rank, shortest)

    def _means(self, others: Arrays, moved: Arrays) -> None:
        for name, values in others.items():
            zero = np.zeros_like(values)
            self._sum.move(name, zero, 1.0, moved[name])

    @property
    def _names(self) -> list[str]:
        return [name for pair in self._pairs for name in (pair.a, pair.b)]

    def _paired(self, model: Arrays) -> Arrays:
        return {name: model[name] for name in self._names}

    def _others(self, model: Arrays) -> Arrays:
        return {name: values for name, values in model.items() if name not in set(self._names)}


def _padded(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """In the first rows and columns of zeros: so that all have one size on the disk."""
    if values.shape == like.shape:
        return values
    whole = np.zeros_like(like)
    whole[: values.shape[0], : values.shape[1]] = values
    return whole
