"""A learning task of your own: is a breast tumour malignant? 569 patients, 30 measurements of cell nuclei.

From the project's folder: fluffle simulate examples.own_task:TASK --participants 5 --rounds 10
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from torch import nn

from fluffle import Dataset, FederatedScaler, TaskDefinition


def load() -> Dataset:
    """`x` (569, 30): logarithms, so that every column has a magnitude of about 1; `y` (569,): 1 is benign."""
    data = load_breast_cancer()
    return Dataset(np.log1p(data.data), data.target, name="tumours", columns=tuple(data.feature_names))


def model() -> nn.Module:
    """Logistic regression on columns that are standardised with the statistics of all participants together."""
    return nn.Sequential(FederatedScaler(30), nn.Linear(30, 2))


TASK = TaskDefinition(
    name="tumours", model=model, load=load, defaults={"lr": 0.1, "batch_size": 16, "local_epochs": 2}
)
