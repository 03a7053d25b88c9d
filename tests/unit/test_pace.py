"""Deadlines learned from arrivals."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.pace import ENOUGH, REMEMBERED, allowed_s, grown
from aggregator.plan import opened
from aggregator.round import Round
from aggregator.settings import RoundSettings, RunSettings
from broker.head import HeadRecord
from broker.messages import Where
from tests.federation import names

AUTO = RoundSettings(deadline="auto", deadline_s=60.0, deadline_min_s=0.1, deadline_max_s=1000.0)
SECONDS = st.lists(st.floats(0.01, 300.0), min_size=ENOUGH, max_size=REMEMBERED)


def test_it_is_the_median_and_some_spreads_more() -> None:
    pace = [8.0, 9.0, 10.0, 11.0, 12.0] * 2
    assert allowed_s(pace, AUTO) == pytest.approx(10 + 4 * 1.4826 * 1)
    one = AUTO.model_copy(update={"deadline_spreads": 6.0})
    assert allowed_s(pace, one) == pytest.approx(10 + 6 * 1.4826 * 1)


def test_until_enough_is_known_it_is_the_one_that_was_set() -> None:
    assert allowed_s([1.0] * (ENOUGH - 1), AUTO) == 60.0
    assert allowed_s([1.0] * ENOUGH, AUTO) == 1.5
    assert allowed_s([1.0] * ENOUGH, RoundSettings(deadline_s=60.0)) == 60.0


@given(SECONDS, st.floats(0.0, 10.0))
def test_it_is_above_the_median_and_within_its_bounds(pace: list[float], spreads: float) -> None:
    learned = allowed_s(pace, AUTO.model_copy(update={"deadline_spreads": spreads}))
    assert AUTO.deadline_min_s <= learned <= AUTO.deadline_max_s
    assert learned >= min(1.5 * median(pace), AUTO.deadline_max_s) * 0.999


@given(SECONDS)
def test_ten_times_slower_participants_get_ten_times_as_long(pace: list[float]) -> None:
    free = AUTO.model_copy(update={"deadline_min_s": 1e-9, "deadline_max_s": 1e9})
    assert allowed_s([10 * seconds for seconds in pace], free) == pytest.approx(10 * allowed_s(pace, free))


def test_a_few_stragglers_do_not_hold_everybody_up() -> None:
    assert allowed_s([2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.0, 600.0, 900.0], AUTO) < 4.0


def test_if_most_are_too_slow_the_deadline_grows_until_they_are_not() -> None:
    """All but two of ten take 40 seconds; the first deadline was learned from faster days."""
    pace: tuple[float, ...] = (2.0,) * 20
    for _ in range(60):
        deadline = allowed_s(pace, AUTO)
        if deadline >= 40:
            break
        pace = grown(pace, [2.0, 2.1], missing=8, waited_s=deadline)
    assert 40 <= allowed_s(pace, AUTO) < 100


def test_only_the_newest_are_remembered() -> None:
    pace = grown([9.0] * REMEMBERED, [1.0, 2.00049], missing=2, waited_s=3.0)
    assert len(pace) == REMEMBERED
    assert pace[-5:] == (9.0, 1.0, 2.0, 3.0, 3.0)


def test_a_round_opens_with_it_and_its_next_attempt_builds_on_it() -> None:
    settings = RunSettings(run_id="r", round=AUTO.model_copy(update={"participants": 3, "quorum": 3}))
    model = Where(where="inline", size_bytes=1, sha256="a" * 64)
    head = HeadRecord(run_id="r", model=model, pace=(2.0,) * 9)
    record = opened(head, "train", names(3), settings, now=100.0)
    assert record.open
    assert (record.open.deadline, record.open.allowed_s) == (103.0, 3.0)
    again = Round(record.open, settings.round).extended(103.0, names(3), names(3))
    assert (again.deadline, again.allowed_s) == (109.0, 3.0)
