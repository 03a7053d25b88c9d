"""Diabetes: 442 patients, ten measurements, and how far the disease got in a year (25 to 346)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from workers.data import Dataset
from workers.preprocess import Preprocess, Reference
from workers.torch_task import TaskDefinition

# Public round numbers, not statistics of the participants' data.
REFERENCE = Reference(
    mean=(50.0, 1.5, 26.0, 95.0, 190.0, 115.0, 50.0, 4.0, 4.6, 90.0),
    scale=(13.0, 0.5, 4.5, 14.0, 35.0, 30.0, 13.0, 1.3, 0.5, 11.5),
)
TARGET_MEAN, TARGET_SCALE = 150.0, 75.0


def load() -> Dataset:
    """`x` (442, 10) in the original units, `y` (442,) float."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    source = "scikit-learn's diabetes (Efron, Hastie, Johnstone and Tibshirani 2004)"
    return Dataset(bunch.data, bunch.target, name="diabetes", source=source, columns=tuple(bunch.feature_names))


class InUnits(nn.Module):
    """The last layer: from a number of magnitude 1 to the target's unit, so that rmse is in that unit."""

    def forward(self, scaled: Tensor) -> Tensor:
        return TARGET_MEAN + TARGET_SCALE * scaled


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 1), InUnits())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error in units of TARGET_SCALE, so that gradients have magnitude 1 and not 5,000."""
    return F.mse_loss(outputs.squeeze(1) / TARGET_SCALE, targets / TARGET_SCALE)


DIABETES = TaskDefinition(
    name="diabetes",
    summary="disease progression after a year, linear regression",
    model=model,
    load=load,
    loss=loss,
    metric="rmse",
    preprocess=Preprocess(reference=REFERENCE),
    defaults={"lr": 0.01, "batch_size": 8, "local_epochs": 2},
)
