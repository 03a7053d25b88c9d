"""What a classifier's mistakes come to, class by class. Pure counts, so they add up over examples.

Per class, with tp right, n true and m predicted examples: recall is tp / n, and F1 = 2 tp / (n + m), the harmonic
mean of precision and recall. The macro ones are plain means over classes, so a rare class counts as much as a
frequent one: over those that there are examples of (recall), or that are true or predicted somewhere (F1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

MOST_CLASSES = 256  # of a confusion matrix
MOST_RECALLS = 20  # classes that get a metric of their own: a record holds 64 names


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """Counts by class, each (classes,). `confusion` (classes, classes) has a row for each true class and a column
    for each predicted one; it is None beyond MOST_CLASSES."""

    right: Counts
    true: Counts
    predicted: Counts
    confusion: Counts | None

    def __add__(self, other: Tally) -> Tally:
        both = None if self.confusion is None or other.confusion is None else self.confusion + other.confusion
        return Tally(self.right + other.right, self.true + other.true, self.predicted + other.predicted, both)

    def metrics(self) -> dict[str, float]:
        """`macro_f1` and `macro_recall`; nothing if there was no example."""
        held, seen = self.true > 0, self.true + self.predicted > 0
        if not held.any():
            return {}
        recall = self.right[held] / self.true[held]
        f1 = 2 * self.right[seen] / (self.true[seen] + self.predicted[seen])
        return {"macro_f1": float(f1.mean()), "macro_recall": float(recall.mean())}


def tally(true: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> Tally:
    """Counts examples (n,). Those whose true class is not one of `classes` are left out: no model can know it."""
    known = (true >= 0) & (true < classes)
    true, predicted = true[known], predicted[known]
    confusion = None
    if classes <= MOST_CLASSES:
        confusion = np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
    by_class = [np.bincount(of, minlength=classes) for of in (true[true == predicted], true, predicted)]
    return Tally(by_class[0], by_class[1], by_class[2], confusion)


def recalls(confusion: Counts | None) -> dict[str, float]:
    """`recall_0`, `recall_1`, ... of the classes that there are examples of; nothing with many classes."""
    if confusion is None or len(confusion) > MOST_RECALLS:
        return {}
    true = confusion.sum(axis=1)
    return {f"recall_{c}": float(confusion[c, c] / true[c]) for c in np.flatnonzero(true).tolist()}
