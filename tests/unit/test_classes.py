"""Mistakes by class: against scikit-learn, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs
from torch import nn

from workers import classes, torch_task
from workers.classes import MOST_CLASSES, MOST_RECALLS, Tally, recalls, tally
from workers.data import Dataset
from workers.torch_task import TaskDefinition

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def check(found: Tally, true: list[int], predicted: list[int]) -> None:
    assert found.confusion is not None
    assert found.confusion.tolist() == theirs.confusion_matrix(true, predicted, labels=range(5)).tolist()
    told = found.metrics()
    assert told["macro_f1"] == pytest.approx(theirs.f1_score(true, predicted, average="macro", zero_division=0))
    there = sorted(set(true))
    recall = theirs.recall_score(true, predicted, labels=there, average=None)
    assert told["macro_recall"] == pytest.approx(recall.mean())
    assert recalls(found.confusion) == pytest.approx({f"recall_{c}": r for c, r in zip(there, recall, strict=True)})


@settings(deadline=None, max_examples=30)
@given(pairs=PAIRS, cut=st.integers(0, 60))
def test_counts_are_those_of_scikit_learn_however_they_are_added_up(pairs: list[tuple[int, int]], cut: int) -> None:
    true, predicted = (list(values) for values in zip(*pairs, strict=True))
    parts = [tally(np.array(true[s], int), np.array(predicted[s], int), 5) for s in (slice(cut), slice(cut, None))]
    check(parts[0] + parts[1], true, predicted)


def test_by_hand() -> None:
    found = tally(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 3)
    assert found.metrics() == pytest.approx({"macro_f1": (4 / 5 + 2 / 3) / 2, "macro_recall": (2 / 3 + 1) / 2})
    assert recalls(found.confusion) == pytest.approx({"recall_0": 2 / 3, "recall_1": 1.0})  # no example of class 2


def columns_for_rows(true: np.ndarray, predicted: np.ndarray, count: int) -> Tally:
    return tally(predicted, true, count)


def with_absent_classes(true: np.ndarray, predicted: np.ndarray, count: int) -> Tally:
    """Classes that nobody has count as never found."""
    found = tally(true, predicted, count)
    return Tally(found.right, np.maximum(found.true, 1), found.predicted, found.confusion)


@pytest.mark.parametrize("mistake", [columns_for_rows, with_absent_classes])
def test_a_mistake_in_counting_is_caught(mistake: type[Tally]) -> None:
    true, predicted = [0, 0, 0, 1], [0, 0, 1, 1]
    check(tally(np.array(true), np.array(predicted), 5), true, predicted)
    with pytest.raises(AssertionError):
        check(mistake(np.array(true), np.array(predicted), 5), true, predicted)


def test_many_classes_have_macro_metrics_only() -> None:
    many = np.arange(MOST_CLASSES + 1)
    found = tally(many, many, len(many))
    assert (found.confusion, (found + found).confusion) == (None, None)
    assert found.metrics() == {"macro_f1": 1.0, "macro_recall": 1.0}
    assert recalls(found.confusion) == {}
    several = np.arange(MOST_RECALLS + 1)
    assert recalls(tally(several, several, len(several)).confusion) == {}
    assert len(recalls(tally(several[1:], several[1:], len(several) - 1).confusion)) == MOST_RECALLS - 1


def test_a_class_that_the_model_does_not_know_is_left_out() -> None:
    assert tally(np.array([-100, 7]), np.array([0, 0]), 3).metrics() == {}


def test_an_evaluation_counts_every_held_out_example(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    data = Dataset(x, x.argmax(axis=1))
    task = TaskDefinition(name="largest", model=lambda: nn.Linear(3, 3), load=lambda: data).bind(data, data)
    whole = task.evaluate(task.initial())
    monkeypatch.setattr(torch_task, "CHUNK_ROWS", 7)
    parts = task.evaluate(task.initial())
    outputs = x @ task.initial()["weight"].T + task.initial()["bias"]
    expected = theirs.confusion_matrix(data.y, outputs.argmax(axis=1), labels=range(3))
    for found in (whole, parts):
        assert found.confusion is not None
        assert found.confusion.tolist() == expected.tolist()
    assert whole.metrics == pytest.approx(parts.metrics)
    assert classes.recalls(whole.confusion).keys() == {"recall_0", "recall_1", "recall_2"}
