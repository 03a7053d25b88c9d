"""The round: when it closes, how it goes on, and what an update is before anybody looks at its arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.judge import damping, judge, weight_of
from aggregator.round import Round, Step, deadline_s, reckoned
from aggregator.settings import RoundSettings
from broker.head import HeadRecord, OpenRound
from broker.messages import UpdateReady, Where
from tests.federation import names

DEADLINE = 100.0
BASE, OLDER = "b" * 64, "a" * 64
BODY = Where(where="inline", size_bytes=3, sha256="c" * 64)


def opened(asked: int = 10, **changes: object) -> OpenRound:
    """Task 5, which the leader of epoch 2 offered to `asked` participants."""
    fields = {"work": "train", "round": 3, "attempt": 1, "task": 5, "epoch": 2}
    times = {"opened": 90.0, "deadline": DEADLINE, "allowed_s": 10.0}
    return OpenRound(**{**fields, **times, "cohort": tuple(names(asked)), **changes})


def a_round(asked: int = 10, accepted: int = 0, **settings: object) -> Round:
    current = Round(opened(asked), RoundSettings(**{"participants": 10, "deadline_s": 10.0, **settings}))
    for participant in names(accepted):
        current.accept(participant, 1, 5)
    return current


# -- clocks that differ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_a_deadline_that_another_clock_set_is_never_further_away_than_an_attempt_may_take(attempt: int) -> None:
    settings = RoundSettings(participants=10, deadline_s=10.0)
    current = opened(attempt=attempt)
    longest_s = deadline_s(settings, current.allowed_s, attempt)
    assert reckoned(current, settings, DEADLINE - longest_s) == current
    assert reckoned(current, settings, DEADLINE + 9999.0) == current  # it has passed, whoever is right
    assert reckoned(current, settings, DEADLINE - 9999.0).deadline == DEADLINE - 9999.0 + longest_s


# -- when it closes -------------------------------------------------------------------------------------------


def test_the_target_closes_a_round_at_once() -> None:
    assert a_round(accepted=8, target=8).step(0.0) is Step.CLOSE
    assert a_round(accepted=7, target=8).step(0.0) is Step.WAIT
    assert a_round(accepted=10).step(0.0) is Step.CLOSE
    assert a_round(accepted=9).step(0.0) is Step.WAIT


def test_the_quorum_closes_a_round_at_its_deadline_and_not_before() -> None:
    current = a_round(accepted=7, quorum=7)
    assert current.step(math.nextafter(DEADLINE, 0)) is Step.WAIT
    assert current.step(DEADLINE) is Step.CLOSE


def test_below_the_quorum_a_deadline_extends() -> None:
    assert a_round(accepted=6, quorum=7).step(DEADLINE) is Step.EXTEND
    assert a_round(accepted=9).step(DEADLINE) is Step.EXTEND  # without a quorum of its own it is the target


def test_a_round_closes_early_if_only_failures_miss_and_the_quorum_is_there() -> None:
    current = a_round(accepted=7, quorum=7)
    for participant in current.missing[:-1]:
        current.fail(participant, 5)
    assert current.step(0.0) is Step.WAIT
    current.fail(current.missing[0], 5)
    assert current.step(0.0) is Step.CLOSE


def test_if_all_failed_they_are_asked_again_at_once_and_given_up_after_the_third_time() -> None:
    current = a_round(quorum=7)
    for expected in (Step.EXTEND, Step.EXTEND, Step.GIVE_UP):
        for participant in names(10):
            assert current.step(DEADLINE - 1) is Step.WAIT
            current.fail(participant, 5)
        assert current.missing == []
        assert current.step(DEADLINE - 1) is expected
        current.reopen(current.extended(DEADLINE - 1, names(10), names(10)))


def test_a_failure_after_the_update_or_of_a_stranger_changes_nothing() -> None:
    current = a_round(accepted=1)
    current.fail("p01", 5)
    current.fail("somebody-else", 5)
    assert current.failed == set()


def test_an_update_after_a_failure_counts() -> None:
    current = a_round(asked=1)
    current.fail("p01", 5)
    current.accept("p01", 3, 5)
    assert current.step(0.0) is Step.CLOSE


@given(asked=st.integers(1, 12), target=st.integers(0, 12))
def test_the_target_is_never_more_than_were_asked(asked: int, target: int) -> None:
    assert 1 <= a_round(asked, participants=12, target=target).target <= asked


def test_a_quorum_that_was_set_is_never_lowered() -> None:
    current = a_round(asked=3, accepted=3, quorum=4)
    assert current.step(0.0) is Step.WAIT
    assert current.step(DEADLINE) is Step.EXTEND


# -- how it goes on -------------------------------------------------------------------------------------------


def test_nobody_waits_for_who_left_unless_it_is_back_in_time() -> None:
    current = a_round(asked=3, accepted=2, quorum=2)
    current.leave("p01")  # delivered before
    current.leave("p03")
    assert current.missing == []
    assert current.step(0.0) is Step.CLOSE
    current.come_back("p03")
    assert current.missing == ["p03"]
    assert current.step(0.0) is Step.WAIT
    current.fail("p03", 5)
    current.come_back("p03")
    assert current.missing == []  # it failed, and would again


def test_an_update_of_who_left_counts() -> None:
    current = a_round(asked=1)
    current.leave("p01")
    current.accept("p01", 3, 5)
    assert (current.left, current.step(0.0)) == (set(), Step.CLOSE)


def test_an_extension_is_the_same_task_with_a_longer_deadline() -> None:
    current = a_round(accepted=2, quorum=7)
    again = current.extended(DEADLINE, names(10), names(10))
    assert again == current.open.model_copy(update={"attempt": 2, "deadline": DEADLINE + 20.0})


def test_deadlines_grow_up_to_a_limit() -> None:
    settings = RoundSettings(deadline_s=10.0, deadline_growth=2.0, deadline_max_s=70.0)
    assert [deadline_s(settings, 10.0, attempt) for attempt in range(1, 6)] == [10.0, 20.0, 40.0, 70.0, 70.0]
    assert deadline_s(settings, 10.0, 10**9) == 70.0
    assert deadline_s(RoundSettings(deadline_max_s=5.0), 10.0, 3) == 10.0


def test_a_further_attempt_keeps_what_was_accepted_and_asks_the_others_again() -> None:
    current = a_round(accepted=2, quorum=7)
    current.fail("p03", 5)
    current.reopen(current.extended(DEADLINE, names(10), names(10)))
    assert set(current.accepted) == {"p01", "p02"}
    assert current.missing == names(10)[2:]


def test_who_failed_is_not_asked_again_within_the_attempt() -> None:
    current = a_round(asked=3)
    current.fail("p03", 5)
    current.reopen(opened(4))
    assert current.missing == ["p01", "p02", "p04"]


def test_the_vanished_make_room_for_reserves_unless_they_delivered() -> None:
    current = a_round(asked=4, accepted=1)  # p01 delivered and vanished, p02 vanished
    again = current.extended(DEADLINE, ["p03", "p04", "p05", "p06"], ["p03", "p04", "p05", "p06"])
    assert again.cohort == ("p01", "p03", "p04", "p05")


def test_who_failed_makes_room_for_reserves_and_is_asked_again_without_any() -> None:
    current = a_round(asked=3)
    current.fail("p02", 5)
    assert current.extended(DEADLINE, names(4), names(4)).cohort == ("p01", "p03", "p04")
    assert current.extended(DEADLINE, names(3), names(3)).cohort == ("p01", "p02", "p03")


def test_an_extension_asks_enough_for_the_quorum() -> None:
    again = a_round(asked=3, quorum=5).extended(DEADLINE, names(8), names(8))
    assert again.cohort == ("p01", "p02", "p03", "p04", "p05")


def test_if_everybody_vanished_the_same_are_asked_again() -> None:
    current = a_round(asked=3)
    assert current.extended(DEADLINE, [], []).cohort == current.open.cohort


ROUNDS = st.integers(1, 8).flatmap(
    lambda most: st.builds(
        RoundSettings,
        participants=st.just(most),
        target=st.integers(0, most),
        quorum=st.just(0),
        deadline_s=st.floats(0.1, 50),
        deadline_growth=st.floats(1, 3),
        deadline_max_s=st.floats(0.1, 200),
    ).flatmap(
        lambda s: st.integers(0, s.target or most).map(lambda quorum: s.model_copy(update={"quorum": quorum}))
    )
)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["accept", "fail", "leave", "pass", "vanish", "return"]), st.integers(0, 9)),
    max_size=60,
)


@given(settings=ROUNDS, asked=st.integers(1, 8), events=EVENTS)
def test_no_sequence_of_events_hangs_a_round(  # noqa: C901 - one case per event
    settings: RoundSettings, asked: int, events: list[tuple[str, int]]
) -> None:
    """Driven as the daemon does: it either waits for a moment ahead or closes; then all return, and it closes."""
    everybody = names(10)
    current, now, live = Round(opened(asked, deadline=1.0), settings), 0.0, set(everybody)
    for event, number in events:
        participant = everybody[number]
        match event:
            case "accept" if participant in current.open.cohort:
                current.accept(participant, 1, 5)
            case "fail":
                current.fail(participant, 5)
            case "leave":
                current.leave(participant)
                live.discard(participant)
            case "pass":
                now += settings.deadline_s * number / 4
            case "vanish":
                live.discard(participant)
            case "return":
                current.come_back(participant)
                live.add(participant)
        if settle(current, now, sorted(live)) in (Step.CLOSE, Step.GIVE_UP):
            return
    now = current.open.deadline
    if settle(current, now, everybody) in (Step.CLOSE, Step.GIVE_UP):
        return
    for participant in current.missing:
        current.accept(participant, 1, 5)
    assert settle(current, now, everybody) is Step.CLOSE


def settle(current: Round, now: float, live: list[str]) -> Step:
    """What the daemon does at `now`, with everything checked that must hold whatever happened before."""
    step, before = current.step(now), set(current.accepted)
    assert current.target <= len(current.open.cohort)
    if step is Step.EXTEND:
        assert now >= current.open.deadline or current.failed == set(current.open.cohort)
        attempt = current.open.attempt
        current.reopen(current.extended(now, live, live))
        assert current.open.attempt == attempt + 1
        assert before <= set(current.open.cohort)
        step = current.step(now)
        assert step is not Step.EXTEND
    if step is Step.CLOSE:
        assert len(current.accepted) >= current.quorum >= 1
    elif step is Step.GIVE_UP:
        assert current.failed == set(current.open.cohort)
    else:
        assert current.open.deadline > now
    assert set(current.accepted) == before
    return step


# -- what an update is ----------------------------------------------------------------------------------------


def a_head(**changes: object) -> HeadRecord:
    """Two versions committed; task 5 is open on version 2, task 4 was on version 1."""
    fields = {"run_id": "run-1", "epoch": 3, "version": 2, "task": 5}
    known = {"lineage": ((4, 1, OLDER), (5, 2, BASE)), "open": opened(3)}
    return HeadRecord(**{**fields, **known, **changes})


def an_update(**changes: object) -> UpdateReady:
    """p01's answer to the open task."""
    named = {"participant": "p01", "run_id": "run-1", "epoch": 2, "task": 5, "base_sha256": BASE}
    return UpdateReady(**{**named, "arrays": "delta", "num_examples": 10, "body": BODY, **changes})


FOLDS = RoundSettings(participants=3, late="fold", staleness_max=1)
LATE = {"task": 4, "base_sha256": OLDER, "epoch": 1}


def test_an_answer_to_the_open_task_counts() -> None:
    for epoch in (2, 3):  # offered by the leader of epoch 2, repeated by that of epoch 3
        judged = judge(an_update(epoch=epoch), a_head(), {"p01": (4, "counted")}, RoundSettings())
        assert (judged.verdict, judged.staleness, judged.folds) == ("counted", 0, False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": "run-2"}, "unknown run 'run-2': the run here is 'run-1'"),
        ({"epoch": 4}, "was never offered"),
        ({"task": 6}, "was never offered"),
        ({"task": 0}, "was never offered"),
        ({"body": None}, "exactly if it has a body"),
        ({"arrays": "none"}, "exactly if it has a body"),
        ({"base_sha256": OLDER}, "is not version 2"),
        ({"task": 4}, "is not version 1"),
        ({"epoch": 1}, "epoch 1 is older than task 5"),
        ({"participant": "p04"}, "p04 was not asked"),
        ({"arrays": "none", "body": None}, "do not answer work 'train'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes: Mapping[str, object], reason: str) -> None:
    judged = judge(an_update(**changes), a_head(), {}, RoundSettings())
    assert judged.verdict == "refused"
    assert reason in judged.reason


def test_arrays_do_not_answer_an_evaluation() -> None:
    head = a_head(open=opened(3, work="evaluate"))
    assert judge(an_update(), head, {}, RoundSettings()).verdict == "refused"
    assert judge(an_update(arrays="none", body=None), head, {}, RoundSettings()).verdict == "counted"


@pytest.mark.parametrize("fate", ["counted", "late"])
def test_what_was_decided_is_a_duplicate(fate: str) -> None:
    for task in (5, 6):
        assert judge(an_update(), a_head(), {"p01": (task, fate)}, RoundSettings()).verdict == "duplicate"
    assert judge(an_update(), a_head(), {"p02": (5, fate)}, RoundSettings()).verdict == "counted"


def test_what_was_refused_may_be_tried_again() -> None:
    assert judge(an_update(), a_head(), {"p01": (5, "refused")}, RoundSettings()).verdict == "counted"
    assert judge(an_update(**LATE), a_head(), {"p01": (5, "refused")}, RoundSettings()).verdict == "duplicate"


def test_an_answer_to_a_closed_task_is_late() -> None:
    judged = judge(an_update(**LATE), a_head(), {}, RoundSettings())
    assert (judged.verdict, judged.staleness, judged.folds) == ("late", 1, False)


def test_a_late_update_folds_if_the_policy_says_so_and_it_is_not_too_stale() -> None:
    assert judge(an_update(**LATE), a_head(), {}, FOLDS).folds
    staler = judge(an_update(**LATE), a_head(version=3), {}, FOLDS)
    assert (staler.verdict, staler.staleness, staler.folds) == ("late", 2, False)


def test_a_late_update_folds_only_into_an_open_training_round() -> None:
    for nowhere in (None, opened(3, work="evaluate")):
        judged = judge(an_update(**LATE), a_head(open=nowhere), {}, FOLDS)
        assert (judged.verdict, judged.folds) == ("late", False)
    assert not judge(an_update(**LATE, arrays="none", body=None), a_head(), {}, FOLDS).folds


def test_between_rounds_an_update_is_late() -> None:
    assert judge(an_update(), a_head(open=None), {}, RoundSettings()).verdict == "late"


def test_a_task_that_nobody_remembers_is_late_and_never_folds() -> None:
    judged = judge(an_update(task=1), a_head(), {}, FOLDS)
    assert (judged.verdict, judged.folds) == ("late", False)


@given(num_examples=st.integers(1, 1 << 40), most=st.integers(1, 1 << 30))
def test_weights_are_capped_examples(num_examples: int, most: int) -> None:
    assert weight_of(num_examples, RoundSettings(max_examples=most)) == min(num_examples, most)


def test_a_fresh_update_is_not_damped_and_a_stale_one_by_the_root_of_its_age() -> None:
    """Not 1/(1 + sqrt(tau)), and no version too many: both were got wrong elsewhere."""
    assert [damping(staleness) for staleness in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


def test_a_copy_with_another_cohort_asks_that_one() -> None:
    """The set of names is worked out once for each record, and not copied with its fields."""
    opened = OpenRound(
        work="train", round=1, attempt=1, task=1, epoch=1, cohort=("p01",), opened=0.0, deadline=1.0, allowed_s=1.0
    )
    assert opened.asks("p01")
    other = opened.model_copy(update={"cohort": ("p02",)})
    assert (other.asks("p01"), other.asks("p02")) == (False, True)
    assert other == OpenRound(**{**opened.model_dump(), "cohort": ("p02",)})
