"""What a torch model says of inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.definition import Prediction


def outputs_of(module: nn.Module, x: Tensor, chunk_rows: int) -> Tensor:
    """The model's outputs (n, ...) as float64, so many rows at a time."""
    module.eval()
    with torch.inference_mode():
        parts = [module(some) for some in torch.split(x, chunk_rows)] if len(x) else [torch.empty(0, 1)]
    return torch.cat(parts).double()


def predictions(rows: NDArray[np.integer], outputs: Tensor, metric: str) -> Iterator[Prediction]:
    """Of classes the likeliest, of a sequence what comes after it; of measured values the value."""
    if metric == "accuracy":
        best = (outputs[..., -1] if outputs.ndim == 3 else outputs).softmax(dim=1).max(dim=1)
        for row, value, probability in zip(rows, best.indices, best.values, strict=True):
            yield Prediction(int(row), int(value), float(probability))
    else:
        for row, value in zip(rows, outputs.reshape(len(rows)), strict=True):
            yield Prediction(int(row), float(value), None)
