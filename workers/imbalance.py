"""Remedies for classes of unequal size, at one participant and from its own labels alone: nobody is told of them.

Either the loss weighs examples of rare classes more, or steps see them more often. Needs no torch.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from broker.errors import ConfigError
from workers.data import Indices

Labels = NDArray[np.integer]

WEIGHTS = "balanced, or effective:BETA with BETA in (0, 1), such as effective:0.99"
SAMPLINGS = ("over", "under", "balanced")


def class_weights(labels: Labels, form: str) -> NDArray[np.float32]:
    """The weight of each class 0, 1, ..., so that it is 1 in the mean over these examples; 0 for classes not here.

    With n_c examples of class c, `balanced` weighs by 1 / n_c, and `effective:BETA` by (1 - BETA) / (1 - BETA^n_c),
    the inverse effective number of samples (Cui et al., 2019, who scale the sum over classes instead).
    """
    counts = np.bincount(labels)
    beta = _beta(form)
    with np.errstate(divide="ignore"):
        inverse = 1 / counts if beta is None else (1 - beta) / (1 - beta ** counts.astype(np.float64))
    raw = np.where(counts > 0, inverse, 0.0)
    return np.asarray(raw * (len(labels) / (raw @ counts)), dtype=np.float32)


def check_weights(form: str) -> None:
    """Raises ConfigError for a form of class weights that does not exist."""
    _beta(form)


def check_sampling(how: str) -> None:
    """Raises ConfigError for a way of sampling that does not exist."""
    if how not in SAMPLINGS:
        raise ConfigError(f"setting train.sampling = {how!r} must be one of: {', '.join(SAMPLINGS)}")


def resampled(labels: Labels, how: str, rng: Generator) -> Indices:
    """One epoch's examples in the order in which they are seen; another draw each epoch.

    `over`: each class as often as the largest, whose examples all come once; others come again. `under`: each class
    as often as the smallest. `balanced`: as many examples as there are, in runs that have each class once, so each
    batch has about equally many of each.
    """
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if how == "balanced":
        return _in_turns(by_class, len(labels), rng)
    sizes = [len(rows) for rows in by_class]
    wanted = max(sizes) if how == "over" else min(sizes)
    return rng.permutation(np.concatenate([_drawn(rows, wanted, rng) for rows in by_class]))


def _drawn(rows: Indices, wanted: int, rng: Generator) -> Indices:
    """So many of these rows, each as often as any other, give or take once."""
    whole, rest = divmod(wanted, len(rows))
    return np.concatenate([np.tile(rows, whole), rng.permutation(rows)[:rest]])


def _in_turns(by_class: list[Indices], examples: int, rng: Generator) -> Indices:
    turns = -(-examples // len(by_class))
    classes = np.concatenate([rng.permutation(len(by_class)) for _ in range(turns)])[:examples]
    order = np.empty(examples, dtype=np.intp)
    for number, rows in enumerate(by_class):
        places = np.flatnonzero(classes == number)
        order[places] = rng.permutation(_drawn(rows, len(places), rng))
    return order


def _beta(form: str) -> float | None:
    """BETA of `effective:BETA`, None for `balanced`."""
    if form == "balanced":
        return None
    match = re.fullmatch(r"effective:(0\.\d{1,12})", form)
    if match is None or not 0 < (beta := float(match[1])) < 1:
        raise ConfigError(f"setting train.class_weights = {form!r} must be {WEIGHTS}")
    return beta
