"""Preprocessing: runs where the data is, and says what it did.

What decides the model's shape or its inputs' meaning must be equal everywhere, so it comes from the
definition (fixed lists, bounds, public reference statistics), never from one participant's data. Statistics
that only the data can tell are federated: see `workers/scaler.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from broker.errors import DataError
from workers.data import Dataset, Mask


@dataclass(frozen=True, slots=True)
class Reference:
    """Public statistics of the columns: a rough mean and spread that anybody may know. Not secret, not exact."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.scale) or not all(scale > 0 for scale in self.scale):
            raise DataError("reference: give one mean and one positive scale per column")

    @classmethod
    def of(cls, public: NDArray[Any]) -> Reference:
        """The statistics of a public sample (n, columns), without missing values; constant columns get scale 1."""
        values = np.asarray(public, dtype=np.float64)
        spread = np.nanstd(values, axis=0)
        scale = np.where(spread > 0, spread, 1.0)
        return cls(tuple(np.nanmean(values, axis=0).tolist()), tuple(scale.tolist()))


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The steps, in this order.

    `keep`: the columns to keep, by number or name, in this order; empty keeps all (`nonzero_columns` makes a
    list from public data). `missing`: rows with NaN are dropped, or kept for a model that handles NaN, such as
    one that begins with FederatedScaler. Rows with infinity, or a target that is not finite, are always
    dropped. `bounds`: values are scaled from these bounds to [0, 1], and clipped to it. `reference`: values
    become (x - mean) / scale. `symbols`: inputs are whole numbers below this, such as characters, and reach the
    model as they are; 0 for measured values.
    """

    keep: tuple[int | str, ...] = ()
    missing: Literal["drop", "keep"] = "drop"
    bounds: tuple[float, float] | None = None
    reference: Reference | None = None
    symbols: int = 0

    def __post_init__(self) -> None:
        if self.symbols and (self.bounds or self.reference):
            raise DataError("preprocess.symbols: symbols are not scaled: leave bounds and reference out")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise DataError(f"preprocess.bounds = {self.bounds}: the first must be below the second")


@dataclass(frozen=True, slots=True)
class PreprocessReport:
    """What was done. `columns_zero` counts kept columns that are zero in every row here; they stay, because a
    column that is zero at one participant may matter at another."""

    rows: int = 0
    rows_dropped: int = 0
    columns_dropped: int = 0
    columns_zero: int = 0
    values_missing: int = 0
    values_clipped: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def prepare(
    dataset: Dataset, steps: Preprocess, dtype: type[np.floating[Any]] = np.float32
) -> tuple[Dataset, PreprocessReport]:
    """The data set as the model takes it: `x` of this dtype (symbols: uint8 or int64), `y` int64 or alike.

    Raises DataError if a step does not fit the data.
    """
    chosen = _keep_columns(dataset, steps.keep)
    usable = _usable_rows(chosen, steps)
    kept = chosen if usable.all() else chosen.take(usable)
    x = _symbols(kept, steps.symbols) if steps.symbols else np.array(kept.x, dtype=dtype, order="C")
    clipped = _scale(x, steps, dataset.name)
    report = PreprocessReport(
        rows=len(kept),
        rows_dropped=len(dataset) - len(kept),
        columns_dropped=(dataset.x[:1].size - chosen.x[:1].size),
        columns_zero=int((~kept.x.any(axis=0)).sum()) if kept.x.ndim == 2 else 0,
        values_missing=int(np.isnan(x).sum()),
        values_clipped=clipped,
    )
    return replace(kept, x=x, y=_targets(kept.y, dtype)), report


def nonzero_columns(public: NDArray[Any]) -> tuple[int, ...]:
    """The columns of a public sample (n, columns) that are not zero in every row; for `Preprocess.keep`."""
    return tuple(np.flatnonzero(np.asarray(public).any(axis=0)).tolist())


def _keep_columns(dataset: Dataset, keep: tuple[int | str, ...]) -> Dataset:
    if not keep:
        return dataset
    if dataset.x.ndim != 2:
        raise DataError(
            f"data set {dataset.name!r}: preprocess.keep needs inputs (n, columns), not {dataset.x.shape}: "
            "flatten them in `load`"
        )
    numbers = [_column_number(dataset, column) for column in keep]
    names = tuple(dataset.columns[number] for number in numbers) if dataset.columns else ()
    return replace(dataset, x=dataset.x[:, numbers], columns=names)


def _column_number(dataset: Dataset, column: int | str) -> int:
    if isinstance(column, str) and column in dataset.columns:
        return dataset.columns.index(column)
    if isinstance(column, int) and 0 <= column < dataset.x.shape[1]:
        return column
    known = ", ".join(dataset.columns) or f"0 to {dataset.x.shape[1] - 1}"
    raise DataError(
        f"data set {dataset.name!r} has no column {column!r}, named in preprocess.keep; it has: {known}"
    )


def _usable_rows(dataset: Dataset, steps: Preprocess) -> Mask:
    usable = _all_of_row(np.isfinite(dataset.y))
    if np.issubdtype(dataset.x.dtype, np.integer):
        return usable  # whole numbers are always finite
    refused = np.isinf(dataset.x) if steps.missing == "keep" else ~np.isfinite(dataset.x)
    return usable & _all_of_row(~refused)


def _all_of_row(values: Mask) -> Mask:
    return np.asarray(values.all(axis=tuple(range(1, values.ndim))))


def _scale(x: NDArray[Any], steps: Preprocess, name: str) -> int:
    """Scales in place; returns how many values were clipped."""
    clipped = 0
    if steps.bounds is not None:
        low, high = steps.bounds
        clipped = int(((x < low) | (x > high)).sum())
        x -= low
        x /= high - low
        np.clip(x, 0.0, 1.0, out=x)
    if steps.reference is not None:
        _standardise(x, steps.reference, name)
    return clipped


def _standardise(x: NDArray[Any], reference: Reference, name: str) -> None:
    if x.shape[1:] != (len(reference.mean),):
        raise DataError(
            f"data set {name!r}: the reference has {len(reference.mean)} columns, but the inputs are {x.shape}"
        )
    x -= np.asarray(reference.mean, dtype=x.dtype)
    x /= np.asarray(reference.scale, dtype=x.dtype)


def _symbols(dataset: Dataset, symbols: int) -> NDArray[Any]:
    """Up to 256 symbols take a byte each."""
    x = dataset.x
    if x.size and not (x.min() >= 0 and x.max() < symbols and (x == np.rint(x)).all()):
        raise DataError(
            f"data set {dataset.name!r}: inputs must be whole numbers from 0 to {symbols - 1} (preprocess.symbols)"
        )
    return np.array(x, dtype=np.uint8 if symbols <= 256 else np.int64, order="C")


def _targets(y: NDArray[Any], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    return y.astype(np.int64 if np.issubdtype(y.dtype, np.integer) else dtype)
