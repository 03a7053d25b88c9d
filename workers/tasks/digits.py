"""Digits: 1,797 handwritten digits of 8 x 8 pixels, shipped. Trains in seconds."""

from __future__ import annotations

import numpy as np
from torch import nn

from workers.data import SHIPPED, Dataset
from workers.preprocess import Preprocess
from workers.torch_task import TaskDefinition


def load() -> Dataset:
    """`x` (1797, 64) with values 0 to 16, `y` (1797,) int64."""
    table = np.loadtxt(SHIPPED / "digits.csv.gz", delimiter=",")
    source = "UCI Optical Recognition of Handwritten Digits, test part (shipped)"
    return Dataset(x=table[:, :-1], y=table[:, -1].astype(np.int64), name="digits", source=source)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


DIGITS = TaskDefinition(
    name="digits",
    summary="small handwritten digits (8 x 8), one hidden layer of 128",
    model=model,
    load=load,
    preprocess=Preprocess(bounds=(0.0, 16.0)),
    defaults={"lr": 0.2, "batch_size": 8, "local_epochs": 3},
)
