"""Heart disease: 920 patients of four hospitals, each hospital a natural participant.

`ca`, `thal` and `slope` are left out: three of four hospitals mostly lack them. A cholesterol or blood
pressure of 0 was never measured (Switzerland has no cholesterol at all), so it is missing. Missing values
become the federated means. That cholesterol was not measured is a feature of its own (`chol missing`): ill
patients lack it more often, partly because of what each hospital does, so it helps in these four hospitals.
"""

from __future__ import annotations

import csv
from collections import OrderedDict

import numpy as np
from torch import nn

from workers.data import SHIPPED, Dataset
from workers.preprocess import Preprocess, Reference
from workers.scaler import FederatedScaler
from workers.torch_task import TaskDefinition

# Rough figures for adults with chest pain, for magnitude only; the data's own statistics are federated.
MEASURED = {
    "age": (55.0, 10.0),
    "trestbps": (130.0, 20.0),
    "chol": (240.0, 60.0),
    "thalch": (140.0, 25.0),
    "oldpeak": (1.0, 1.0),
}
YES = {"sex": "Male", "fbs": "TRUE", "exang": "TRUE"}
ONE_OF = {
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
}
NEVER_ZERO = ("trestbps", "chol")
COLUMNS = (
    *MEASURED,
    *YES,
    *(f"{name}={value}" for name, values in ONE_OF.items() for value in values),
    "chol missing",
)


def load() -> Dataset:
    """`x` (920, 16) float with NaN for missing, `y` (920,) int64: 1 is ill, `group`: the hospital."""
    with (SHIPPED / "heart_disease_uci.csv").open(newline="") as file:
        patients = list(csv.DictReader(file))
    return Dataset(
        x=np.array([features(patient) for patient in patients]),
        y=np.array([int(int(patient["num"]) > 0) for patient in patients]),
        name="heart",
        source="UCI Heart Disease (Cleveland, Hungary, Switzerland, VA Long Beach)",
        columns=COLUMNS,
        group=np.array([patient["dataset"] for patient in patients]),
    )


def features(patient: dict[str, str]) -> list[float]:
    """One patient's row, in the order of COLUMNS; NaN where a value is missing."""
    measured = [_measured(name, patient[name]) for name in MEASURED]
    answered = [_flag(patient[name], yes) for name, yes in YES.items()]
    chosen = [_flag(patient[name], value) for name, values in ONE_OF.items() for value in values]
    return [*measured, *answered, *chosen, float(np.isnan(_measured("chol", patient["chol"])))]


def _measured(name: str, text: str) -> float:
    value = float(text) if text else np.nan
    return np.nan if value == 0 and name in NEVER_ZERO else value


def _flag(text: str, yes: str) -> float:
    return float(text == yes) if text else np.nan


def _reference() -> Reference:
    """The measured columns' figures; yes-or-no columns are left as they are."""
    pairs = [MEASURED.get(name, (0.0, 1.0)) for name in COLUMNS]
    return Reference(tuple(mean for mean, _ in pairs), tuple(scale for _, scale in pairs))


def model() -> nn.Module:
    parts = [("scaler", FederatedScaler(len(COLUMNS))), ("linear", nn.Linear(len(COLUMNS), 2))]
    return nn.Sequential(OrderedDict[str, nn.Module](parts))


HEART = TaskDefinition(
    name="heart",
    summary="heart disease in four hospitals, logistic regression",
    model=model,
    load=load,
    preprocess=Preprocess(missing="keep", reference=_reference()),
    defaults={"lr": 0.02, "batch_size": 16, "local_epochs": 2, "l2": 0.01},
)
