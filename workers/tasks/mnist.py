"""MNIST: 70,000 handwritten digits of 28 x 28 pixels (12,000 of them are shipped)."""

from __future__ import annotations

from torch import nn

from workers.data import load_mnist
from workers.preprocess import Preprocess
from workers.torch_task import TaskDefinition

PIXELS = Preprocess(bounds=(0.0, 255.0))


def logreg() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def two_layers() -> nn.Module:
    """The 2NN of McMahan et al. 2017: 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def cnn() -> nn.Module:
    """The CNN of McMahan et al. 2017: 1,663,370 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


LOGREG = TaskDefinition(
    name="mnist-logreg",
    summary="handwritten digits, softmax regression",
    model=logreg,
    load=load_mnist,
    preprocess=PIXELS,
    defaults={"lr": 0.1, "batch_size": 32, "local_epochs": 2, "l2": 0.01},
)

TWO_LAYERS = TaskDefinition(
    name="mnist-2nn",
    summary="handwritten digits, two hidden layers of 200",
    model=two_layers,
    load=load_mnist,
    preprocess=PIXELS,
    defaults={"lr": 0.1, "batch_size": 10, "local_epochs": 1},
)

CNN = TaskDefinition(
    name="mnist-cnn",
    summary="handwritten digits, two convolutions",
    model=cnn,
    load=load_mnist,
    preprocess=PIXELS,
    defaults={"lr": 0.1, "batch_size": 10, "local_epochs": 1},
)
