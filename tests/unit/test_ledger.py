"""The ledger: the fate of every update, of bounded size, and metrics that nobody can spoil for the others."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.ledger import LONGEST_NAME, MOST_LISTED, MOST_METRICS, Ledger, weighted_means
from broker.head import HeadRecord
from broker.messages import UpdateReady
from broker.wire import encode


def an_update(participant: str = "p01", task: int = 5, **metrics: float) -> UpdateReady:
    return UpdateReady(
        participant=participant, run_id="run-1", epoch=1, task=task, base_sha256="a" * 64, arrays="none",
        num_examples=1, metrics=metrics,
    )  # fmt: skip


def test_it_begins_as_the_record_says_and_leaves_the_record_alone() -> None:
    head = HeadRecord(settled={"p01": (4, "late")})
    ledger = Ledger(head)
    ledger.counted(an_update(), 7, 10, 0)
    assert ledger.settled == {"p01": (5, "counted")}
    assert head.settled == {"p01": (4, "late")}


def test_every_verdict_is_one_line_and_settles_what_it_settles() -> None:
    ledger = Ledger(HeadRecord())
    ledger.counted(an_update("p01"), 1, 10, 0)
    ledger.late(an_update("p02", 4), 2, 0, 1, "had closed")
    ledger.late(an_update("p03", 4), 3, 7, 1, "had closed")
    ledger.duplicate(an_update("p01"), 4, "before")
    ledger.refused("p04", 5, 5, "NaN", settles=True)
    ledger.refused("p05", 9, 6, "unknown run", settles=False)
    assert [(d.offset, d.participant, d.task, d.verdict, d.weight, d.staleness) for d in ledger.decided] == [
        (1, "p01", 5, "counted", 10, 0),
        (2, "p02", 4, "late", 0, 1),
        (3, "p03", 4, "late", 7, 1),
        (4, "p01", 5, "duplicate", 0, 0),
        (5, "p04", 5, "refused", 0, 0),
        (6, "p05", 9, "refused", 0, 0),
    ]
    assert ledger.settled == {
        "p01": (5, "counted"), "p02": (4, "late"), "p03": (4, "counted"), "p04": (5, "refused"),
    }  # fmt: skip


def test_a_refusal_takes_back_nothing_that_was_decided() -> None:
    ledger = Ledger(HeadRecord(settled={"p01": (5, "counted"), "p02": (6, "late")}))
    ledger.refused("p01", 5, 1, "so", settles=True)
    ledger.refused("p02", 5, 2, "so", settles=True)
    assert ledger.settled == {"p01": (5, "counted"), "p02": (6, "late")}


@pytest.mark.parametrize("verdict", ["refused", "duplicate"])
def test_a_flood_is_counted_listed_up_to_a_limit_and_hides_nobodys_update(verdict: str) -> None:
    ledger = Ledger(HeadRecord())
    for offset in range(MOST_LISTED + 500):
        if verdict == "refused":
            ledger.refused("p-bad", 0, offset, "\U0001f407" * 1000, settles=False)
        else:
            ledger.duplicate(an_update("p-bad"), offset, "\U0001f407" * 1000)
    ledger.counted(an_update("p01"), 9001, 10, 0)
    ledger.late(an_update("p02", 4), 9002, 0, 1, "had closed")
    assert ledger.unlisted == 500
    assert [d.participant for d in ledger.decided[MOST_LISTED:]] == ["p01", "p02"]
    assert len(encode(HeadRecord(decided=tuple(ledger.decided)))) < 1 << 20


# -- metrics --------------------------------------------------------------------------------------------------


def test_metrics_are_weighted_means_over_those_who_report_them() -> None:
    reports = {"p01": (1, {"loss": 1.0}), "p02": (3, {"loss": 5.0, "accuracy": 0.5})}
    assert weighted_means(reports, "train_") == {"train_loss": 4.0, "train_accuracy": 0.5}
    assert weighted_means({}, "train_") == {}


REPORTS = st.lists(
    st.tuples(st.integers(1, 1 << 30), st.dictionaries(st.sampled_from("abc"), st.floats(-1e6, 1e6), max_size=3)),
    max_size=6,
)


@given(reports=REPORTS, data=st.data())
def test_means_are_the_same_in_whatever_order_they_came(
    reports: list[tuple[int, dict[str, float]]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(reports))))
    forwards = weighted_means({f"p{i}": reports[i] for i in range(len(reports))}, "")
    assert weighted_means({f"p{i}": reports[i] for i in order}, "") == forwards
    for name, mean in forwards.items():
        told = [(weight, metrics[name]) for weight, metrics in reports if name in metrics]
        exact = math.fsum(weight * value for weight, value in told) / sum(weight for weight, _ in told)
        assert mean == pytest.approx(exact, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("huge", [1.7e308, -1.7e308])
def test_no_metric_makes_a_mean_that_is_not_finite(huge: float) -> None:
    reports = {"p01": (1 << 20, {"loss": huge}), "p02": (7, {"loss": huge}), "p03": (1, {"loss": -huge})}
    assert math.isfinite(weighted_means(reports, "")["loss"])


def test_who_reports_many_metrics_or_long_names_cannot_fill_the_record() -> None:
    invented = {f"{i:02d}" + "x" * 62: 1.0 for i in range(64)}
    reports = {"p-bad": (1, invented), **{p: (1, {"loss": 2.0, "accuracy": 0.5}) for p in ("p01", "p02")}}
    train, evaluation = weighted_means(reports, "train_"), weighted_means(reports, "")
    assert (train["train_loss"], evaluation["accuracy"]) == (2.0, 0.5)
    assert len(train) == len(evaluation) == MOST_METRICS
    assert max(map(len, train)) <= LONGEST_NAME
    assert HeadRecord(metrics={**train, **evaluation})
