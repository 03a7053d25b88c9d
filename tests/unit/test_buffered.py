"""Buffered rounds: who is asked for which task, when a version is made, and what a stale update is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aggregator import plan
from aggregator.announcer import reply_to
from aggregator.buffered import Buffer, last_task
from aggregator.judge import judge, weight_of
from aggregator.round import Round, Step
from aggregator.settings import RoundSettings
from broker.head import HeadRecord, OpenRound
from broker.messages import Heartbeat, UpdateReady, Where
from tests.federation import names, settings

DEADLINE = 100.0
DIGESTS = {version: f"{version:x}" * 64 for version in range(1, 10)}
BODY = Where(where="inline", size_bytes=3, sha256="c" * 64)


def rounds(**changes: object) -> RoundSettings:
    return RoundSettings(**{"participants": 4, "policy": "buffered", "buffer": 4, "turns": 2, **changes})


def opened(*cohort: str, **changes: object) -> OpenRound:
    """Version 3 is the newest; its tasks begin with 11."""
    fields = {"work": "train", "round": 4, "attempt": 1, "task": 11, "epoch": 2}
    times = {"opened": 90.0, "deadline": DEADLINE, "allowed_s": 10.0}
    return OpenRound(**{**fields, **times, "cohort": cohort or tuple(names(4)), **changes})


def a_buffer(*cohort: str, **changes: object) -> Buffer:
    return Buffer(opened(*cohort), rounds(**changes))


# -- when a version is made -----------------------------------------------------------------------------------


def test_k_updates_make_a_version_whoever_sent_them_and_nobody_waits_for_the_rest() -> None:
    current = a_buffer()
    for participant, task in (("p01", 11), ("p02", 7), ("p01", 12)):
        current.accept(participant, 1, task)
        assert current.step(0.0) is Step.WAIT
    current.accept("p03", 1, 11)
    assert current.step(0.0) is Step.CLOSE
    assert current.missing == ["p02", "p04"]  # p02 was at an older task, and goes on with the newest


def test_at_the_deadline_a_quorum_closes_and_fewer_extend() -> None:
    current = a_buffer(quorum=2)
    current.accept("p01", 1, 11)
    assert current.step(DEADLINE) is Step.EXTEND
    current.accept("p02", 1, 11)
    assert current.step(math.nextafter(DEADLINE, 0)) is Step.WAIT
    assert current.step(DEADLINE) is Step.CLOSE


def test_if_all_that_is_left_have_used_their_turns_they_get_more_at_once() -> None:
    """Or a run of ten that nine leave would wait for the buffer for ever."""
    current = a_buffer("p01", turns=2)
    current.accept("p01", 1, 11)
    assert current.invited(["p01"], 42) == ["p01"]
    current.accept("p01", 1, 12)
    assert current.invited(["p01"], 42) == []
    assert current.step(0.0) is Step.EXTEND
    current.reopen(current.extended(0.0, ["p01"], ["p01"]))
    assert current.step(0.0) is Step.WAIT
    assert (current.turn("p01"), current.offers(14), current.offers(15)) == (2, True, False)
    current.accept("p01", 1, 13)
    current.accept("p01", 1, 14)
    assert current.step(0.0) is Step.CLOSE


def test_if_nobody_is_there_it_waits_for_its_deadline_and_does_not_spin() -> None:
    current = a_buffer()
    for name in names(4):
        current.leave(name)
    assert current.step(0.0) is Step.WAIT


def test_if_all_failed_they_are_asked_again_and_given_up_after_the_third_time() -> None:
    current = a_buffer()
    for expected in (Step.EXTEND, Step.EXTEND, Step.GIVE_UP):
        for name in names(4):
            assert current.step(0.0) is Step.WAIT
            current.fail(name, 11)
        assert current.step(0.0) is expected
        current.reopen(current.extended(0.0, names(4), names(4)))


def test_a_failure_at_an_older_task_is_none_at_the_newest() -> None:
    current = a_buffer()
    current.fail("p01", 7)
    assert current.awaits("p01")


# -- who is asked for which task ------------------------------------------------------------------------------


def test_whoever_is_done_is_asked_for_its_next_turn_and_newcomers_for_their_first() -> None:
    current = a_buffer("p01", "p02")
    assert current.invited(["p01", "p02"], 42) == []
    current.accept("p01", 1, 11)
    assert current.invited(["p01", "p02", "p05"], 42) == ["p01", "p05"]
    assert (current.turn("p01"), current.turn("p05")) == (1, 0)
    assert current.invited(["p01", "p02", "p05"], 42) == []  # told already
    current.accept("p01", 1, 12)
    assert current.invited(["p01", "p02", "p05"], 42) == []  # its turns are used


def test_a_stale_update_uses_no_turn_of_the_newest_version() -> None:
    current = a_buffer()
    current.accept("p01", 1, 7)
    assert (current.turn("p01"), current.awaits("p01"), current.invited(names(4), 42)) == (0, True, [])


def test_old_tasks_saved_up_do_not_fill_a_buffer() -> None:
    """One that answers every remembered version at once; honest ones have one stale update beside their turns."""
    current = a_buffer(buffer=8)
    for task in (7, 11, 12):  # one stale, and its two turns
        assert current.takes_from("p01")
        current.accept("p01", 1, task)
    assert not current.takes_from("p01")
    assert current.takes_from("p02")


def test_who_failed_is_not_asked_again_before_the_next_attempt_and_who_came_back_is() -> None:
    current = a_buffer()
    current.fail("p01", 11)
    current.leave("p02")
    assert current.invited(["p01", "p02"], 42) == ["p02"]


@given(concurrency=st.integers(1, 6), order=st.lists(st.integers(0, 5), max_size=20))
def test_never_more_work_than_the_concurrency_allows_and_others_take_the_place_of_who_is_done(
    concurrency: int, order: list[int]
) -> None:
    live = names(6)
    first = plan.opened(HeadRecord(), "train", live, settings(6, round={"concurrency": concurrency, **LARGE}), 0.0)
    assert first.open
    current = Buffer(first.open, RoundSettings(participants=6, concurrency=concurrency, **LARGE))
    for pick in order:
        assert len(current.missing) == concurrency
        done = current.missing[pick % concurrency]
        current.accept(done, 1, first.open.task + current.turn(done))
        assert len(current.invited(live, 42)) == 1
    assert len(current.missing) == concurrency


LARGE = {"policy": "buffered", "buffer": 100, "turns": 50}


def test_who_is_at_work_when_a_version_is_made_stays_and_free_places_are_drawn() -> None:
    run = settings(9, round={"concurrency": 3, **LARGE})
    record = plan.opened(HeadRecord(task=8, version=3), "train", names(9), run, 0.0, busy=["p08", "p09", "gone"])
    assert record.open
    assert {"p08", "p09"} < set(record.open.cohort)
    assert len(record.open.cohort) == 3


def test_who_is_at_an_older_task_is_left_alone_and_then_makes_room() -> None:
    """Or the same few would work for ever, each always one version behind."""
    current = a_buffer("p01", "p02", concurrency=2, turns=0)
    current.goes_on_after(a_buffer("p02", "p03", concurrency=2))
    assert (current.missing, current.to_tell) == (["p01", "p02"], ["p01"])
    current.accept("p02", 1, 7)
    assert current.missing == ["p01"]
    assert len(current.invited(names(4), 42)) == 1


def test_where_all_work_whoever_is_at_an_older_task_is_told_of_the_newest() -> None:
    current = a_buffer("p01", "p02")
    current.goes_on_after(a_buffer("p02", "p03"))
    assert current.to_tell == ["p01", "p02"]


# -- tasks of versions ----------------------------------------------------------------------------------------


def test_the_tasks_of_a_version_follow_one_another_and_the_next_version_s_begin_after_them() -> None:
    run = settings(4, round={"policy": "buffered", "buffer": 4, "turns": 3})
    record = plan.opened(HeadRecord(version=0), "train", names(4), run, 0.0)
    assert record.open
    assert (record.open.task, record.task) == (1, 3)
    later = plan.extended(record, plan.open_round(record.open, run.round), names(4), run, 1.0)
    assert later.task == 6
    after = plan.opened(later.with_(version=1, round=1), "train", names(4), run, 2.0)
    assert after.open
    assert after.open.task == 7
    bases = [base[0] for task in range(1, 10) if (base := after.base_of(task))]
    assert bases == [0] * 6 + [1] * 3
    assert after.base_of(0) is None


def test_only_training_is_buffered() -> None:
    evaluation = opened(work="evaluate")
    assert type(plan.open_round(evaluation, rounds())) is Round
    assert last_task(evaluation, rounds()) == 11
    assert type(plan.open_round(opened(), rounds())) is Buffer


# -- what an update is ----------------------------------------------------------------------------------------


def a_head(**changes: object) -> HeadRecord:
    lineage = ((3, 1, DIGESTS[1]), (7, 2, DIGESTS[2]), (11, 3, DIGESTS[3]))
    return HeadRecord(
        **{"run_id": "run-1", "epoch": 2, "version": 3, "task": 12, "open": opened(), "lineage": lineage, **changes}
    )


def an_update(task: int, version: int, **changes: object) -> UpdateReady:
    fields = {"participant": "p01", "run_id": "run-1", "epoch": 2, "num_examples": 50, "body": BODY}
    return UpdateReady(**{**fields, "task": task, "base_sha256": DIGESTS[version], **changes})


@pytest.mark.parametrize(
    ("task", "version", "staleness"), [(11, 3, 0), (12, 3, 0), (7, 2, 1), (9, 2, 1), (10, 2, 1), (3, 1, 2)]
)
def test_fresh_and_stale_updates_count_with_the_age_of_the_version_they_began_with(
    task: int, version: int, staleness: int
) -> None:
    judged = judge(an_update(task, version), a_head(), {}, rounds())
    assert (judged.verdict, judged.staleness) == ("counted", staleness)


def test_a_version_that_is_too_old_is_late_and_says_why() -> None:
    judged = judge(an_update(3, 1), a_head(), {}, rounds(staleness_max=1))
    assert (judged.verdict, judged.folds) == ("late", False)
    assert "2 versions old, more than round.staleness_max = 1" in judged.reason


@pytest.mark.parametrize("task", [13, 99])
def test_a_turn_that_was_not_offered_is_refused(task: int) -> None:
    assert judge(an_update(task, 3), a_head(), {}, rounds()).verdict == "refused"


def test_another_version_s_model_is_refused_and_the_same_task_counts_once() -> None:
    assert judge(an_update(9, 3), a_head(), {}, rounds()).verdict == "refused"
    assert judge(an_update(9, 2), a_head(), {"p01": (9, "counted")}, rounds()).verdict == "duplicate"
    assert judge(an_update(9, 2), a_head(), {"p01": (11, "counted")}, rounds()).verdict == "duplicate"


def test_without_an_open_round_an_update_is_late() -> None:
    assert judge(an_update(11, 3), a_head(open=None), {}, rounds()).verdict == "late"


def test_all_weigh_the_same_unless_their_examples_shall_count() -> None:
    assert weight_of(600, rounds()) == 1
    assert weight_of(600, rounds(weights="examples")) == 600
    assert weight_of(600, RoundSettings(participants=4, weights="equal")) == 1


@pytest.mark.parametrize(
    ("phase", "task", "reply"),
    [
        ("training", 11, None),
        ("training", 7, None),  # it goes on with the newest afterwards
        ("idle", 0, {}),
        ("holding", 7, {}),  # counted, not committed yet: it need not wait for that
    ],
)
def test_who_works_on_anything_is_left_alone_and_who_does_nothing_is_asked(
    phase: str, task: int, reply: object
) -> None:
    beat = Heartbeat(participant="p01", run_id="run-1", epoch=2, phase=phase, task=task)
    assert reply_to(beat, a_head(), {"p01": (7, "counted")} if phase == "holding" else {}, a_buffer()) == reply


# -- settings -------------------------------------------------------------------------------------------------


@given(participants=st.integers(1, 50), buffer=st.integers(1, 100))
def test_turns_fill_the_buffer_and_are_no_majority_where_others_are_there(participants: int, buffer: int) -> None:
    turns = RoundSettings(participants=participants, policy="buffered", buffer=buffer).turns_allowed
    assert turns * participants >= buffer
    assert turns <= buffer / 2 or turns == math.ceil(buffer / participants)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": 2}, "set round.buffer"),
        ({"cohort": 2}, "set round.concurrency"),
        ({"quorum": 4, "buffer": 3}, "round.quorum = 4 is above round.buffer = 3"),
        ({"turns": 1, "buffer": 5}, "never fill round.buffer = 5"),
    ],
)
def test_what_could_never_close_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rounds(**changes)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluation": {"mode": "federated"}}, "evaluation.mode"),
        ({"codec": {"up": "topk:0.01"}}, "error feedback"),
        ({"strategy": {"name": "fedasync", "clip_norm": 1.0}}, "clip_norm"),
        ({"strategy": {"name": "fedasync"}, "codec": {"up": "int8"}}, "whole models"),
        ({"strategy": {"name": "fedasync"}, "round": {}}, "needs round.policy"),
    ],
)
def test_what_cannot_go_together_is_refused(sections: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(4, **{"round": {"policy": "buffered", "buffer": 4}, **sections})
