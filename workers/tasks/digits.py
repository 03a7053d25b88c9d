"""Digits: 1,797 handwritten digits of 8 x 8 pixels, shipped. Trains in seconds."""

from __future__ import annotations

from torch import nn

from workers.tasks.tables import PIXELS, load_digits
from workers.torch_task import TaskDefinition


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


DIGITS = TaskDefinition(
    name="digits",
    summary="small handwritten digits (8 x 8), one hidden layer of 128",
    model=model,
    load=load_digits,
    preprocess=PIXELS,
    defaults={"lr": 0.2, "batch_size": 8, "local_epochs": 3},
)
