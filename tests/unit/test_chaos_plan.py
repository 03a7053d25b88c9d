"""The plan of faults, the balance of the ledger, and what is told of how far a run is."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from broker.errors import StateError
from broker.head import Decision
from broker.messages import Verdict
from fluffle.chaos.audit import Loss, Update, balance
from fluffle.chaos.plan import (
    ALL,
    BROKER,
    CLOCK_OFF_S,
    HELD_ROUNDS,
    KINDS,
    LEADER,
    LONG_FREEZE_S,
    MODEL,
    OF_BROKER,
    OUTBOX,
    STANDBY,
    UPDATES,
    Fault,
    Kind,
    Shape,
    draw,
)
from fluffle.chaos.processes import LOG_ENDED, Event, Process
from fluffle.chaos.progress import Closing, Progress
from fluffle.chaos.report import recovery_s
from fluffle.chaos.strikes import HURTS, Strike
from workers.partition import participant_names

SHAPES = st.builds(
    lambda count, faults, own_broker, quorum, large: Shape(
        tuple(participant_names(count)), faults, own_broker=own_broker, quorum=quorum, large=large
    ),
    st.integers(2, 6), st.integers(1, 150), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
SEEDS = st.integers(0, 2**32)
NO_HURRY = given_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@NO_HURRY
@given(SEEDS, SHAPES)
def test_the_same_seed_gives_the_same_faults(seed: int, shape: Shape) -> None:
    assert draw(seed, shape) == draw(seed, shape)


@NO_HURRY
@given(SEEDS, SHAPES)
def test_as_many_faults_as_asked_for_strike_in_order_and_before_the_rounds_that_wait_for_them(
    seed: int, shape: Shape
) -> None:
    rounds = [fault.after_round for fault in draw(seed, shape)]
    assert len(rounds) == shape.faults
    assert rounds == sorted(rounds)
    assert rounds[0] >= 1
    assert rounds[-1] < shape.rounds - HELD_ROUNDS


@NO_HURRY
@given(SEEDS, SHAPES)
def test_every_kind_occurs_once_there_are_faults_enough(seed: int, shape: Shape) -> None:
    struck = {fault.kind for fault in draw(seed, shape)}
    assert struck <= set(shape.kinds)
    assert struck == set(shape.kinds) or shape.faults < len(shape.kinds)


@NO_HURRY
@given(SEEDS, SHAPES)
def test_only_what_is_there_is_struck_and_not_for_ever(seed: int, shape: Shape) -> None:
    for fault in draw(seed, shape):
        assert fault.whom in (LEADER, STANDBY, BROKER, *shape.participants)
        assert (fault.whom == BROKER) == (fault.kind in (*OF_BROKER, "repeat"))
        assert 0 <= fault.lasts_s <= LONG_FREEZE_S[1]
        assert bool(fault.kb_per_s) == (fault.kind == "slow")
        assert bool(fault.repeats) == (fault.kind == "repeat")
        assert bool(fault.stream) == bool(fault.loses_s) == (fault.kind == "lost_tail")
        assert bool(fault.clock_off_s) == (fault.kind == "wrong_clock")
        outboxes = {f"{OUTBOX}{name}" for name in shape.participants}
        assert fault.stream in ("", UPDATES, *({ALL, MODEL, *outboxes} if shape.large else ()))


def test_clocks_are_wrong_by_minutes_hours_and_days_either_way() -> None:
    offs = [fault.clock_off_s for seed in range(20) for fault in draw(seed, Shape(("p01", "p02"), 100))]
    wrong = [off_s for off_s in offs if off_s]
    assert all(CLOCK_OFF_S[0] <= abs(off_s) <= CLOCK_OFF_S[1] for off_s in wrong)
    for sign in (-1, 1):
        assert any(sign * off_s < 3600 for off_s in wrong if sign * off_s > 0)
        assert any(sign * off_s > 86400 for off_s in wrong)


def test_seeds_differ_and_leader_standby_and_workers_are_all_struck() -> None:
    shape = Shape(("p01", "p02"), 100)
    assert draw(1, shape) != draw(2, shape)
    assert {fault.whom for fault in draw(1, shape)} == {LEADER, STANDBY, BROKER, "p01", "p02"}


@pytest.mark.parametrize(
    ("own_broker", "quorum", "missing"),
    [
        (True, True, set()),
        (True, False, {"asleep"}),
        (False, False, {"asleep", "broker_kill", "memory_alarm", "lost_tail"}),
    ],
)
def test_what_cannot_be_is_not_planned(*, own_broker: bool, quorum: bool, missing: set[Kind]) -> None:
    assert set(KINDS) - set(Shape(("p01",), 1, own_broker=own_broker, quorum=quorum).kinds) == missing


def test_every_kind_can_be_done() -> None:
    assert set(HURTS) == set(KINDS)


# -- the ledger -------------------------------------------------------------------------------------------------


def decision(
    offset: int, verdict: Verdict = "counted", task: int = 0, epoch: int = 1, who: str = "p01"
) -> Decision:
    return Decision(epoch=epoch, offset=offset, participant=who, task=task or offset, verdict=verdict)


def update(offset: int, task: int = 0) -> Update:
    return Update(offset, "p01", task or offset)


NOTHING: dict[Verdict, int] = {"counted": 0, "late": 0, "refused": 0, "duplicate": 0}


def test_a_ledger_that_balances() -> None:
    unread = Decision(epoch=1, offset=7, participant="p01", task=0, verdict="refused")  # before its task was known
    found = balance([update(3), update(5), update(7), update(9)], [decision(3), decision(5, "late"), unread], end=9)
    assert found.balanced
    assert (found.published, found.after_the_end) == (3, 1)
    assert found.verdicts == {**NOTHING, "counted": 1, "late": 1, "refused": 1}
    assert found.lost_by_broker == NOTHING


WRONG: list[tuple[list[Decision], str, tuple[object, ...]]] = [
    ([decision(3)], "undecided", (5,)),
    ([decision(3), decision(5), decision(7)], "invented", (7,)),
    ([decision(3), decision(5), decision(9, "late")], "invented", (9,)),  # not read yet, the record says
    ([decision(3), decision(5, who="p02")], "invented", (5,)),
    ([decision(3), decision(5, task=4)], "invented", (5,)),
    ([decision(3), decision(5), decision(5, "late")], "contradicted", (5,)),
    ([decision(3), decision(5), decision(5, epoch=2)], "contradicted", (5,)),  # nothing was lost
    ([decision(3), decision(5), decision(5, "late", epoch=2)], "contradicted", (5,)),
]


@pytest.mark.parametrize(("decided", "wrong", "what"), WRONG)
def test_a_ledger_that_does_not(decided: list[Decision], wrong: str, what: tuple[object, ...]) -> None:
    found = balance([update(3), update(5), update(9)], decided, end=9)
    assert not found.balanced
    assert getattr(found, wrong) == what


def test_nothing_is_counted_twice() -> None:
    found = balance([update(3), update(5, task=3)], [decision(3), decision(5, task=3)], end=9)
    assert (found.balanced, found.counted_twice) == (False, (("p01", 3),))


# The leader of epoch 2 found that from offset 5 on the stream had been lost; 5 is another message now, 7 is none.
LOSS = Loss(epoch=2, offset=5)
LOST = [decision(3), decision(5), decision(7)]
NOW = [update(3), update(5, task=8)]


def test_what_the_broker_lost_is_told_apart() -> None:
    found = balance(NOW, [*LOST, decision(5, task=8, epoch=2)], 9, [LOSS])
    assert found.balanced
    assert (found.published, found.verdicts["counted"], found.lost_by_broker["counted"]) == (2, 2, 2)


def test_what_was_read_again_has_one_verdict_that_stands() -> None:
    again = [decision(5, "duplicate", epoch=2), decision(7, "duplicate", epoch=3)]
    found = balance([update(3), update(5), update(7)], [*LOST, *again], 9, [LOSS])
    assert found.balanced
    assert found.verdicts == {**NOTHING, "counted": 1, "duplicate": 2}


@pytest.mark.parametrize(
    ("later", "losses", "wrong", "what"),
    [
        ([], [LOSS], "undecided", (5,)),  # an old verdict is none about what lies there now
        ([decision(5, task=8, epoch=2)], [], "invented", (5, 7)),  # nobody said that anything was lost
        ([decision(5, task=8, epoch=2)], [Loss(2, 7)], "invented", (5,)),  # nor that this was
        ([decision(5, task=8, epoch=2)], [Loss(1, 5)], "invented", (5, 7)),  # nor later than it was decided
        ([decision(5, task=8, epoch=2), decision(6, epoch=2)], [LOSS], "invented", (6,)),
        ([decision(5, task=8, epoch=2), decision(5, "late", 8, 3)], [LOSS], "contradicted", (5,)),
        ([decision(5, task=7, epoch=2)], [LOSS], "counted_twice", (("p01", 7),)),  # before the loss, and after it
    ],
)
def test_a_loss_excuses_nothing_else(
    later: list[Decision], losses: list[Loss], wrong: str, what: tuple[object, ...]
) -> None:
    found = balance(NOW, [*LOST, *later], 9, losses)
    assert not found.balanced
    assert getattr(found, wrong) == what


# -- progress ---------------------------------------------------------------------------------------------------


def process(name: str) -> Process:
    return Process(name, (), None)  # type: ignore[arg-type]


def test_progress_is_what_anybody_tells_first() -> None:
    told: list[int] = []
    progress = Progress(told.append)
    for event, number in (("round_closed", 1), ("work_begun", 4), ("round_closed", 2), ("caught_up", 2)):
        progress.hear(process("p01"), Event(event, {"round": number}, at=float(number)))
    assert told == [1, 2, 3]
    assert progress.closings == [Closing(1, 1.0), Closing(3, 4.0)]
    assert progress.wait_beyond(1, within_s=1.0) == 3


def test_a_run_in_which_no_round_is_closed_any_more_fails() -> None:
    with pytest.raises(StateError, match=r"no round was closed after round 0 for 0\.01 s"):
        Progress(lambda _: None).wait_beyond(0, within_s=0.01)


def test_whoever_waits_is_told_what_went_wrong() -> None:
    progress = Progress(lambda _: None)
    progress.fail(StateError("p01 ended by itself"))
    with pytest.raises(StateError, match="by itself"):
        progress.wait_beyond(0, within_s=60.0)


def test_who_leads_and_who_ended_is_heard() -> None:
    progress, ended = Progress(lambda _: None), []
    progress.on_end = lambda one: ended.append(one.name)
    progress.hear(process("standby"), Event("leading", {}, at=1.0))
    progress.hear(process("p01"), Event(LOG_ENDED, {}, at=2.0))
    assert (progress.leader, ended) == ("standby", ["p01"])


def test_a_fault_lasts_until_the_next_round_closes() -> None:
    strike = Strike(Fault("kill", "p01", 1, 0.0, 2.0), "p01", struck=5.0, mended=7.0)
    assert recovery_s(strike, [Closing(1, 5.0), Closing(2, 8.5), Closing(3, 9.0)]) == 3.5
    assert recovery_s(strike, [Closing(1, 5.0)]) is None
