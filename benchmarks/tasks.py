"""Learning tasks that train nothing, so that a benchmark measures everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.tensors import Arrays, blocks
from workers.task import Evaluation, TrainConfig, TrainResult

WIDTHS, VOCABULARY = (2048, 1024, 512, 256), 50_000
SHIFT, DRIFT = f"{__name__}:Shift", f"{__name__}:Drift"


def random_model(floats: int, tensors: int = 2, seed: int = 1) -> Arrays:
    """So many random float32 values in so many tensors."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.standard_normal(floats, dtype=np.float32), tensors)
    return {f"t{number}": part for number, part in enumerate(parts)}


def transformer(floats: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer with about so many parameters: embeddings of 50,000 tokens, and as many
    layers of four square matrices and two of four times that size as it takes."""
    width = next(width for width in WIDTHS if VOCABULARY * width <= 0.6 * floats or width == WIDTHS[-1])
    sides = {"query": (1, 1), "key": (1, 1), "value": (1, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}
    layers = max(1, round((floats - VOCABULARY * width) / (12 * width * width)))
    return {"embedding": (VOCABULARY, width), "norm": (width,)} | {
        f"layers.{layer}.{name}": (rows * width, columns * width)
        for layer in range(layers)
        for name, (rows, columns) in sides.items()
    }


def random_values(number: int, out: NDArray[np.float32], seed: int = 1) -> None:
    """Fills the tensor of that number with standard normal values."""
    rng, flat = np.random.default_rng([seed, number]), out.reshape(-1)
    for part in blocks(flat):
        rng.standard_normal(dtype=np.float32, out=flat[part])


class Plain:
    """What both have in common: the aggregator has the initial model from a file."""

    name = "plain"
    num_examples = 10

    def __init__(self, participant: str, data: str) -> None:
        self.step = np.float32(sum(participant.encode()) % 97 / 97 - 0.5)

    def initial(self) -> Arrays:
        raise NotImplementedError("the initial model is a file: run.initial")

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({}, self.num_examples)


def shifted(values: NDArray[Any], step: np.float32) -> NDArray[Any]:
    """values + step. Of a mapped file little is held at a time."""
    moved = np.empty_like(values)
    flat, to = values.reshape(-1), moved.reshape(-1)
    for part in blocks(flat):
        np.add(flat[part], step, out=to[part])
    return moved


class Shift(Plain):
    """Moves every value by a step of its own: one pass over the model, the cheapest that changes all of it."""

    name = "shift"

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        return TrainResult({name: shifted(values, self.step) for name, values in arrays.items()}, self.num_examples)


class Drift(Plain):
    """Halves the values and moves them, so that a model stays where it is however many rounds there are."""

    name = "drift"

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        halved = {name: values * np.float32(0.5) for name, values in arrays.items()}
        for values in halved.values():
            values += self.step
        return TrainResult(halved, self.num_examples)
