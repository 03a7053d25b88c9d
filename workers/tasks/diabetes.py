"""Diabetes: 442 patients, ten measurements, and how far the disease got in a year (25 to 346)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from workers.tasks.tables import PATIENTS, PROGRESSION_MEAN, PROGRESSION_SCALE, load_diabetes
from workers.torch_task import TaskDefinition


class InUnits(nn.Module):
    """The last layer: from a number of magnitude 1 to the target's unit, so that rmse is in that unit."""

    def forward(self, scaled: Tensor) -> Tensor:
        return PROGRESSION_MEAN + PROGRESSION_SCALE * scaled


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 1), InUnits())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error in units of the target's scale, so that gradients have magnitude 1 and not 5,000."""
    return F.mse_loss(outputs.squeeze(1) / PROGRESSION_SCALE, targets / PROGRESSION_SCALE)


DIABETES = TaskDefinition(
    name="diabetes",
    summary="disease progression after a year, linear regression",
    model=model,
    load=load_diabetes,
    loss=loss,
    metric="rmse",
    preprocess=PATIENTS,
    defaults={"lr": 0.01, "batch_size": 8, "local_epochs": 2},
)
