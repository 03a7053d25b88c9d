"""Preprocessing does what it is told, the same everywhere, and counts it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker.errors import DataError
from workers.data import Dataset
from workers.preprocess import Preprocess, Reference, nonzero_columns, prepare

NAN, INF = float("nan"), float("inf")


def table(*rows: list[float]) -> Dataset:
    columns = ("age", "dose", "empty")[: len(rows[0])]
    return Dataset(np.array(rows), np.arange(len(rows)), columns=columns)


def test_rows_with_nan_or_infinity_are_dropped_and_counted() -> None:
    done, report = prepare(table([1, 2], [NAN, 2], [1, INF], [3, 4]), Preprocess())
    assert done.y.tolist() == [0, 3]
    assert (report.rows, report.rows_dropped, report.values_missing) == (2, 2, 0)
    assert (done.x.dtype, done.y.dtype) == (np.float32, np.int64)


def test_missing_values_can_be_kept_but_infinity_cannot() -> None:
    done, report = prepare(table([1, 2], [NAN, 2], [1, INF]), Preprocess(missing="keep"))
    assert done.y.tolist() == [0, 1]
    assert (report.rows_dropped, report.values_missing) == (1, 1)


def test_a_target_that_is_not_finite_drops_the_row() -> None:
    done, report = prepare(Dataset(np.ones((3, 1)), np.array([0.5, NAN, INF])), Preprocess(missing="keep"))
    assert (done.y.tolist(), done.y.dtype, report.rows_dropped) == ([0.5], np.float32, 2)


def test_columns_are_kept_by_name_or_number_in_the_order_asked() -> None:
    done, report = prepare(table([1, 2, 0], [3, 4, 0]), Preprocess(keep=("dose", 0)))
    assert done.x.tolist() == [[2, 1], [4, 3]]
    assert done.columns == ("dose", "age")
    assert report.columns_dropped == 1


def test_a_column_that_is_zero_only_here_stays_and_is_reported() -> None:
    done, report = prepare(table([1, 2, 0], [3, 4, 0]), Preprocess())
    assert (done.x.shape, report.columns_zero, report.columns_dropped) == ((2, 3), 1, 0)


def test_columns_zero_in_public_data_are_dropped_everywhere() -> None:
    steps = Preprocess(keep=nonzero_columns(np.array([[1, 0, 2], [0, 0, 0]])))
    assert steps.keep == (0, 2)
    here, _ = prepare(table([0, 5, 0]), steps)
    assert here.x.tolist() == [[0, 0]]


@pytest.mark.parametrize("column", ["weight", 7, -1])
def test_an_unknown_column_is_named_with_the_known_ones(column: int | str) -> None:
    with pytest.raises(DataError, match=rf"no column {column!r}.*age, dose, empty"):
        prepare(table([1, 2, 3]), Preprocess(keep=(column,)))


def test_columns_of_images_cannot_be_chosen() -> None:
    with pytest.raises(DataError, match="flatten them"):
        prepare(Dataset(np.zeros((2, 3, 3)), np.zeros(2)), Preprocess(keep=(0,)))


@given(hnp.arrays(np.uint8, (5, 4)))
def test_pixels_land_between_0_and_1(pixels: np.ndarray) -> None:
    done, report = prepare(Dataset(pixels, np.zeros(5, int)), Preprocess(bounds=(0, 255)))
    assert np.array_equal(done.x, pixels.astype(np.float32) / 255)
    assert report.values_clipped == 0


def test_values_outside_the_bounds_are_clipped_and_counted() -> None:
    done, report = prepare(table([-1, 5], [10, 20]), Preprocess(bounds=(0, 10)))
    assert done.x.tolist() == [[0, 0.5], [1, 1]]
    assert report.values_clipped == 2


def test_standardising_uses_the_reference_and_not_the_data() -> None:
    done, _ = prepare(table([1, 10], [3, 10]), Preprocess(reference=Reference((1, 0), (2, 5))))
    assert done.x.tolist() == [[0, 2], [1, 2]]


def test_a_reference_can_be_taken_from_public_data() -> None:
    reference = Reference.of(np.array([[1, 7], [3, 7], [NAN, 7]]))
    assert reference == Reference((2, 7), (1, 1))


def test_wrong_steps_are_refused() -> None:
    with pytest.raises(DataError, match="1 columns"):
        prepare(table([1, 2]), Preprocess(reference=Reference((0,), (1,))))
    with pytest.raises(DataError, match="positive scale"):
        Reference((0,), (0,))
    with pytest.raises(DataError, match="must be below"):
        Preprocess(bounds=(1, 1))


@given(st.integers(0, 5))
def test_the_data_that_came_in_is_not_changed(n: int) -> None:
    data = Dataset(np.full((n, 2), 7.0, dtype=np.float32), np.zeros(n))
    done, report = prepare(data, Preprocess(bounds=(0, 14)))
    assert (data.x == 7).all()
    assert (done.x == 0.5).all()
    assert report.to_dict()["rows"] == n
