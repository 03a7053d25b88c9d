"""Coordinate median (Yin et al., 2018, Definition 1)."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.strategies.collected import Combine, InnerProducts, median


@dataclass(frozen=True, slots=True)
class Median:
    """x <- x + server_lr * med(Delta_1, ..., Delta_n), coordinate by coordinate.

    Of an even number it is the mean of the two in the middle. Bears `byzantine` = f bad ones among n >= 2f + 1.
    """

    byzantine: int

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def combination(self, inner_products: InnerProducts) -> Combine:  # noqa: ARG002 - looks at coordinates alone
        return median
