"""Examples and inputs from files: `.npz` with arrays, or `.csv` with column names in its first line."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import DataError
from workers.data import Dataset

TARGET = "target"  # the column, or the array `y`, that is to be learnt
TEXT, PAIR = "text", "pair"  # the columns of texts


def read_inputs(path: Path, like: Dataset) -> Dataset:
    """Inputs from `.npz` (an array named `x`) or `.csv`, shaped like the task's data. Raises DataError.

    A CSV file has the data's column names in its first line, in any order, or without names as many values a
    row as an example has; an empty cell is a missing value. Texts are in a CSV file's column `text`, and the second
    of a pair in `pair`.
    """
    x = _texts(path) if _has_texts(like) else _values(path, "x", like.columns)
    return _shaped(path, x, np.zeros(len(x), dtype=np.int64), like)


def read_examples(path: Path, like: Dataset) -> Dataset:
    """Inputs as `read_inputs` reads them, with their targets: the array `y`, or the column `target`."""
    x = _texts(path) if _has_texts(like) else _values(path, "x", like.columns or _columns(path))
    y = _values(path, "y", (TARGET,)).reshape(len(x))
    if np.issubdtype(like.y.dtype, np.integer):
        if not (np.isfinite(y) & (y == np.rint(y))).all():
            raise DataError(
                f"{path}: the targets of data set {like.name!r} are classes: whole numbers, none missing"
            )
        y = y.astype(np.int64)
    return _shaped(path, x, y, like)


def _has_texts(like: Dataset) -> bool:
    return like.x.dtype == object


def _texts(path: Path) -> NDArray[Any]:
    """(n,), or (n, 2) with the column `pair`. Raises DataError."""
    try:
        lines = _lines(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as texts: {error}") from None
    names = lines[0] if lines else []
    if TEXT not in names:
        raise DataError(f"{path}: column {TEXT!r} is missing: texts come as .csv whose first line names it")
    places = [names.index(name) for name in (TEXT, PAIR) if name in names]
    texts = np.array([[line[place] for place in places] for line in lines[1:]], dtype=object)
    return texts[:, 0] if len(places) == 1 else texts


def _columns(path: Path) -> tuple[str, ...]:
    return tuple(name for name in _names(path) if name != TARGET)


def _shaped(path: Path, x: NDArray[Any], y: NDArray[Any], like: Dataset) -> Dataset:
    shape = like.x.shape[1:]
    if x.size != len(x) * int(np.prod(shape)):
        raise DataError(f"{path}: rows of shape {x.shape[1:]}, but data set {like.name!r} has {shape}")
    return replace(like, x=x.reshape(len(x), *shape), y=y, group=None, source=path.name)


def _values(path: Path, array: str, columns: tuple[str, ...]) -> NDArray[Any]:
    try:
        return _read_npz(path, array) if path.suffix == ".npz" else _read_csv(path, columns)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as inputs: {error}") from None


def _read_npz(path: Path, name: str) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as file:
        if name not in file:
            raise DataError(f"{path}: has no array named {name}, only {', '.join(file.files) or 'nothing'}")
        values: NDArray[Any] = file[name]
    return values


def _read_csv(path: Path, columns: tuple[str, ...]) -> NDArray[np.float64]:
    lines = _lines(path)
    if not columns:
        return np.array([[_number(cell) for cell in line] for line in lines])
    names = lines[0] if lines else []
    if missing := [name for name in columns if name not in names]:
        raise DataError(f"{path}: column {missing[0]!r} is missing: the first line must name {', '.join(columns)}")
    places = [names.index(name) for name in columns]
    return np.array([[_number(line[place]) for place in places] for line in lines[1:]])


def _names(path: Path) -> list[str]:
    if path.suffix == ".npz":
        return []
    try:
        lines = _lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read as examples: {error}") from None
    return lines[0] if lines else []


def _lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [line for line in csv.reader(file) if line]


def _number(cell: str) -> float:
    return float(cell) if cell.strip() else float("nan")
