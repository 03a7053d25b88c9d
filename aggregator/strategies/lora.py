"""The mathematics of averaging low-rank products, in numpy. Nothing here knows of participants or files.

The mean of products is not the product of the means. Stacked it is exact (FLoRA, Wang et al., 2024):

    sum_i p_i B_i A_i = [p_1 B_1 ... p_n B_n] [A_1; ...; A_n]

Its rank is up to sum_i r_i; the best product of rank r is what the r largest singular values leave (Eckart and
Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Sum:
    """A sum of products B A, (out, in), kept as [B_1 ... B_n] and [A_1; ...; A_n], in the order in which they came.

    Once there are more columns than the smaller side of the product has, it becomes one term: memory is bounded by
    about twice the product itself, however many terms there are.
    """

    def __init__(self, out: int, into: int) -> None:
        self._least = min(out, into)
        self._into = into
        self._b: list[Matrix] = []
        self._a: list[Matrix] = []

    def add(self, b: NDArray[np.floating], a: NDArray[np.floating], weight: float | Matrix) -> None:
        """Adds B diag(weight) A; a plain number weighs the whole product, once."""
        self._b.append(b.astype(np.float64) * weight)
        self._a.append(a.astype(np.float64))
        if sum(len(rows) for rows in self._a) > 2 * self._least:
            self._become_one_term()

    def factors(self) -> tuple[Matrix, Matrix]:
        """B and A, stacked."""
        return np.concatenate(self._b, axis=1), np.concatenate(self._a)

    def _become_one_term(self) -> None:
        b, a = self.factors()
        whole, one = b @ a, np.eye(self._least)
        self._b, self._a = ([whole], [one]) if self._least == self._into else ([one], [whole])


@dataclass(frozen=True, slots=True)
class Factored:
    """A product of rank r: b (out, r), a (r, in). Frobenius norms of the whole, and of what was cut off."""

    b: Matrix
    a: Matrix
    norm: float
    lost: float


def factored(b: Matrix, a: Matrix, rank: int, least: float = 1.0) -> Factored:
    """The best approximation of B A with that rank. Rows of the new A are orthogonal, the most important first; so
    the first k rows and columns are the best of rank k, too.

    A row of A and its column of B share the singular value evenly, so that steps of both are of one size; but no
    row is shorter than `least`: with both zero, no gradient would ever move them. Signs: the largest value of each
    row of A is positive. Without B A ever being computed: QR of both, SVD of what is between.
    """
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(sizes))
    rows = v[:kept] @ q_a.T
    signs = np.sign(rows[np.arange(kept), np.abs(rows).argmax(axis=1)])
    found_b, found_a = np.zeros((len(b), rank)), np.zeros((rank, a.shape[1]))
    lengths = np.maximum(least, np.sqrt(sizes[:kept]))
    found_a[:kept] = (signs * lengths)[:, None] * rows
    found_b[:, :kept] = q_b @ u[:, :kept] * (signs * sizes[:kept] / lengths)
    return Factored(found_b, found_a, float(np.linalg.norm(sizes)), float(np.linalg.norm(sizes[kept:])))
