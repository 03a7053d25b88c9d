"""Shipped data that several tasks learn from, without torch."""

from __future__ import annotations

import numpy as np

from workers.data import SHIPPED, Dataset
from workers.preprocess import Preprocess, Reference

PIXELS = Preprocess(bounds=(0.0, 16.0))  # of the small digits
# Public round numbers, not statistics of the participants' data.
PATIENTS = Preprocess(
    reference=Reference(
        mean=(50.0, 1.5, 26.0, 95.0, 190.0, 115.0, 50.0, 4.0, 4.6, 90.0),
        scale=(13.0, 0.5, 4.5, 14.0, 35.0, 30.0, 13.0, 1.3, 0.5, 11.5),
    )
)
PROGRESSION_MEAN, PROGRESSION_SCALE = 150.0, 75.0  # of the diabetes data's target


def load_digits() -> Dataset:
    """`x` (1797, 64) with values 0 to 16, `y` (1797,) int64."""
    table = np.loadtxt(SHIPPED / "digits.csv.gz", delimiter=",")
    source = "UCI Optical Recognition of Handwritten Digits, test part (shipped)"
    return Dataset(x=table[:, :-1], y=table[:, -1].astype(np.int64), name="digits", source=source)


def load_diabetes() -> Dataset:
    """`x` (442, 10) in the original units, `y` (442,) float."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    source = "scikit-learn's diabetes (Efron, Hastie, Johnstone and Tibshirani 2004)"
    return Dataset(bunch.data, bunch.target, name="diabetes", source=source, columns=tuple(bunch.feature_names))
