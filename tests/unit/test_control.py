"""What a Control does to the record, and what the operator is told."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from aggregator import control, plan
from aggregator.progress import why_finished
from aggregator.round import Round, Step
from broker.head import HeadRecord, Obeyed, OpenRound
from broker.messages import Command, Control, Where
from tests.federation import names, settings

MODEL = Where(where="inline", size_bytes=1, sha256="a" * 64)
OPEN = OpenRound(
    work="train",
    round=3,
    attempt=1,
    task=3,
    epoch=1,
    cohort=("p01", "p02", "p03"),
    opened=0.0,
    deadline=9.0,
    allowed_s=9.0,
)


def wish(command: Command, participant: str = "", nonce: str = "n1") -> Control:
    return Control(command=command, participant=participant, nonce=nonce)


def obeyed(head: HeadRecord, *wishes: Control) -> HeadRecord:
    """The record after these, as a leader commits it."""
    for one in wishes:
        head = control.changed(one, head).with_(obeyed=control.noted(one, head))
    return head


# -- the message ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"command": "remove"},
        {"command": "admit"},
        {"command": "pause", "participant": "p01"},
        {"command": "remove", "participant": "operator"},
        {"command": "remove", "participant": "Not A Name"},
        {"command": "delete", "participant": "p01"},
    ],
)
def test_a_control_names_a_participant_exactly_if_it_is_about_one(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Control(**fields, nonce="n1")  # type: ignore[arg-type]


# -- the record -----------------------------------------------------------------------------------------------


def test_the_last_word_is_what_is_wanted() -> None:
    head = obeyed(HeadRecord(), wish("pause"), wish("stop"), wish("pause"))
    assert head.wanted == "pause"
    assert obeyed(head, wish("resume")).wanted == "run"


def test_who_is_removed_is_a_set() -> None:
    head = obeyed(HeadRecord(), wish("remove", "p02"), wish("remove", "p01"), wish("remove", "p02"))
    assert head.removed == ("p01", "p02")
    assert obeyed(head, wish("admit", "p02"), wish("admit", "p09")).removed == ("p01",)


def test_the_record_knows_what_it_holds_and_who_was_removed_before() -> None:
    first, second = wish("remove", "p01", "n1"), wish("admit", "p09", "n2")
    head = HeadRecord(removed=("p09",))
    assert control.removed_at_offset(head) == ("p09",)
    head = obeyed(head, first, second)
    assert head.obeyed == Obeyed(nonces=("n1", "n2"), removed=("p09",))
    assert control.removed_at_offset(head) == ("p09",)
    assert head.removed == ("p01",)
    assert control.was_obeyed(first, head)
    assert not control.was_obeyed(wish("remove", "p01", "n3"), head)


def test_what_is_read_again_is_answered_with_the_same_words() -> None:
    head = HeadRecord(open=OPEN)
    for one in (wish("pause"), wish("resume"), wish("stop"), wish("remove", "p01"), wish("admit", "p01")):
        before = head.with_(wanted="pause") if one.command == "resume" else head
        before = head.with_(removed=("p01",)) if one.command == "admit" else before
        said = control.answer(one, before).text
        assert "already" not in said
        assert "is not removed" not in said
        assert control.answer(one, obeyed(before, one)).text == said


@pytest.mark.parametrize(
    ("one", "head", "said"),
    [
        (wish("pause"), HeadRecord(), "paused: no round opens until resume"),
        (wish("pause"), HeadRecord(open=OPEN), "paused: round 3 goes on to its close, then no round opens"),
        (wish("pause"), HeadRecord(wanted="pause"), "already paused"),
        (wish("resume"), HeadRecord(), "already running"),
        (wish("stop"), HeadRecord(wanted="stop"), "already stopping"),
        (wish("stop"), HeadRecord(open=OPEN), "stopping: round 3 goes on to its close, then the run is finished"),
        (wish("remove", "p01"), HeadRecord(removed=("p01",)), "p01 was removed already"),
        (wish("admit", "p01"), HeadRecord(), "p01 is not removed"),
    ],
)
def test_the_operator_is_told_what_happens_now(one: Control, head: HeadRecord, said: str) -> None:
    answer = control.answer(one, head)
    assert (answer.nonce, answer.done) == ("n1", True)
    assert answer.text.startswith(said)


def test_a_wish_for_another_run_is_refused() -> None:
    one = Control(command="stop", run_id="run-2", nonce="n1")
    answer = control.answer(one, HeadRecord(run_id="run-1"))
    assert (answer.done, answer.text) == (False, "the run here is run-1, not run-2")


# -- what follows from it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["pause", "stop"])
def test_no_round_opens_unless_the_operator_wants_it(wanted: str) -> None:
    run, head = settings(2), HeadRecord(round=1, members=("p01",), wanted=wanted)
    assert not plan.enough(head, 2, run, 1e9)
    assert plan.continued(head, "train", names(2), run, 0.0).open is None
    assert plan.enough(head.with_(wanted="run"), 2, run, 0.0)


def test_a_pause_still_measures_the_version_that_was_closed() -> None:
    run = settings(2, evaluation={"mode": "federated"})
    after = plan.continued(HeadRecord(round=1, wanted="pause", model=MODEL), "train", names(2), run, 0.0)
    assert after.open
    assert after.open.work == "evaluate"


def test_a_run_that_shall_stop_is_finished() -> None:
    run = settings(2, rounds=9)
    assert why_finished(HeadRecord(round=1, wanted="stop"), run, 0.0) == "stopped by the operator"
    assert why_finished(HeadRecord(round=1, wanted="pause"), run, 0.0) == ""


# -- the open round -------------------------------------------------------------------------------------------


def test_a_round_closes_without_the_removed() -> None:
    current = Round(OPEN, settings(3).round)
    current.accept("p01", 1, 5)
    current.accept("p02", 1, 5)
    assert current.step(1.0) is Step.WAIT
    current.reopen(current.without("p03"))
    assert current.open.cohort == ("p01", "p02")
    assert current.step(1.0) is Step.CLOSE


def test_what_the_removed_delivered_stays() -> None:
    current = Round(OPEN, settings(3).round)
    current.accept("p03", 1, 5)
    assert current.without("p03") == OPEN


def test_who_failed_and_was_removed_is_no_answer_any_more() -> None:
    """Or the round would close below its quorum, with one that it still waits for."""
    current = Round(OPEN, settings(3, round={"quorum": 1}).round)
    current.accept("p01", 1, 5)
    current.fail("p03", 5)
    current.reopen(current.without("p03"))
    assert current.step(1.0) is Step.WAIT
    assert current.missing == ["p02"]


def test_a_round_is_never_nobodys() -> None:
    alone = OPEN.model_copy(update={"cohort": ("p01",)})
    assert Round(alone, settings(1).round).without("p01") == alone
