"""Learning tasks that train nothing, so that a benchmark measures everything else."""

from __future__ import annotations

import numpy as np

from broker.tensors import Arrays
from workers.task import Evaluation, TrainConfig, TrainResult

SHIFT, DRIFT = f"{__name__}:Shift", f"{__name__}:Drift"


def random_model(floats: int, tensors: int = 2, seed: int = 1) -> Arrays:
    """So many random float32 values in so many tensors."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.standard_normal(floats, dtype=np.float32), tensors)
    return {f"t{number}": part for number, part in enumerate(parts)}


class Plain:
    """What both have in common: the aggregator has the initial model from a file."""

    name = "plain"
    num_examples = 10

    def __init__(self, participant: str, data: str) -> None:
        self._step = np.float32(sum(participant.encode()) % 97 / 97 - 0.5)

    def initial(self) -> Arrays:
        raise NotImplementedError("the initial model is a file: run.initial")

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({}, self.num_examples)


class Shift(Plain):
    """Moves every value by a step of its own: one pass over the model, the cheapest that changes all of it."""

    name = "shift"

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        return TrainResult({name: values + self._step for name, values in arrays.items()}, self.num_examples)


class Drift(Plain):
    """Halves the values and moves them, so that a model stays where it is however many rounds there are."""

    name = "drift"

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        halved = {name: values * np.float32(0.5) for name, values in arrays.items()}
        for values in halved.values():
            values += self._step
        return TrainResult(halved, self.num_examples)
