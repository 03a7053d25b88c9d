"""SCAFFOLD (Karimireddy et al., 2020, Algorithm 1, Option II): the participant's half. The aggregator's is
`aggregator/strategies/scaffold.py`.

    y <- y - eta (g(y) - c_i + c)                  K steps from y = x
    c_i+ = c_i - c + (x - y) / (K eta)
    sent: Delta y = y - x and Delta c_i = c_i+ - c_i = (x - y) / (K eta) - c

K is the number of steps that were really made; with step sizes that change, their sum stands for K eta.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import TaskError
from broker.tensors import Arrays
from workers.task import TrainResult


def correction(server: Arrays, own: Arrays) -> Arrays:
    """c - c_i by tensor: what is added to every gradient."""
    return {name: server[name] - own[name] for name in server}


def change(start: Arrays, result: TrainResult, server: Arrays) -> Arrays:
    """Delta c_i by tensor, like `server`, from x = `start` and what training came to; zero for buffers.

    Raises TaskError if the task does not tell the sum of its step sizes.
    """
    if not result.step_sum > 0:
        raise TaskError(
            "scaffold needs the sum of the step sizes: set TrainResult.step_sum, and add TrainConfig.correction to "
            "each gradient"
        )
    return {
        name: np.zeros_like(c) if name in result.buffers else _change(start[name], result, name, c)
        for name, c in server.items()
    }


def _change(start: NDArray[Any], result: TrainResult, name: str, c: NDArray[Any]) -> NDArray[Any]:
    mean_gradient = np.subtract(start, result.arrays[name], dtype=np.float64) / result.step_sum
    return np.asarray(mean_gradient - c, c.dtype)
