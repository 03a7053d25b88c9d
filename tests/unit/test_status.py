"""What an aggregator says of itself, above all what it waits for."""

from __future__ import annotations

import pytest

from aggregator import status
from aggregator.quota import Quotas
from aggregator.registry import Registry
from aggregator.round import Round
from aggregator.settings import RunSettings
from aggregator.status import LiveParticipant, RunStatus, View
from broker.head import Best, HeadRecord, OpenRound
from fluffle.control import live_table, status_page
from tests.federation import names, settings

NOW = 1000.0
RUN = settings(5, rounds=9, round={"quorum": 4})


def opened(asked: int = 5) -> OpenRound:
    return OpenRound(
        work="train",
        round=3,
        attempt=2,
        task=3,
        epoch=2,
        cohort=tuple(names(asked)),
        opened=NOW,
        deadline=NOW + 41,
        allowed_s=30.0,
    )


def view(
    head: HeadRecord, live: int = 0, accepted: int = 0, *, caught_up: bool = True, run: RunSettings = RUN
) -> View:
    registry = Registry((), 0.0, 60.0)
    for name in names(live):
        registry.hear(name, NOW - 3)
    current = Round(head.open, run.round) if head.open else None
    for name in names(accepted):
        assert current
        current.accept(name, 1, 5)
    return View(run, head, current, registry, Quotas(20.0), caught_up, 0.0, "p02 says no")


MEMBERS = HeadRecord(run_id="run-1", round=2, members=("p01",))
OPEN = MEMBERS.with_(open=opened())


@pytest.mark.parametrize(
    ("seen", "line"),
    [
        (view(OPEN, 5, 3), "updates of p04, p05 until the deadline in 41 s (3 of 5 are in, quorum 4)"),
        (view(OPEN, 5, 5), "the deadline in 41 s (5 of 5 are in, quorum 4)"),
        (
            view(OPEN.with_(wanted="pause"), 5, 4),
            "updates of p05 until the deadline in 41 s (4 of 5 are in, quorum 4); then the operator: paused",
        ),
        (
            view(OPEN.with_(wanted="stop"), 5, 4),
            "updates of p05 until the deadline in 41 s (4 of 5 are in, quorum 4); then the run is stopped",
        ),
        (view(MEMBERS, 2), "at least 4 live participants (2 are)"),
        (view(MEMBERS, 1), "at least 4 live participants (1 is)"),
        (view(HeadRecord(), 4), "at least 5 live participants (4 are)"),  # the first round waits for everybody
        (view(MEMBERS, run=settings(1)), "at least 1 live participant (0 are)"),
        (view(MEMBERS.with_(wanted="pause"), 5), "the operator: paused"),
        (view(MEMBERS.with_(wanted="stop"), 5), "nothing: the run is being stopped"),
        (view(OPEN, caught_up=False), "the end of the log: it reads again what came since the record"),
        (view(MEMBERS.with_(finished="enough")), "nothing: the run is finished (enough)"),
    ],
)
def test_one_line_says_what_a_leader_waits_for(seen: View, line: str) -> None:
    assert status.waits_for(seen, NOW) == line


def test_many_missing_participants_stay_one_line() -> None:
    line = status.waits_for(view(MEMBERS.with_(open=opened(40)), 40), NOW)
    assert line.startswith("updates of p01, p02, ")
    assert "p10 and 30 more until the deadline" in line


def test_a_leader_tells_all_it_knows() -> None:
    best = Best(version=1, round=1, value=0.5, sha256="a" * 64)
    head = OPEN.with_(by="42-ab", epoch=2, version=2, metrics={"loss": 0.4}, best=best, removed=("p09",))
    seen = view(head, live=2, accepted=1)
    seen.registry.note_phase("p01", "holding")
    assert status.of_leader(seen, NOW) == RunStatus(
        role="leader", waits_for=status.waits_for(seen, NOW), name="42-ab", federation="default", run_id="run-1",
        epoch=2, version=2, round=3, rounds=9, work="train", attempt=2, cohort=5, accepted=("p01",),
        missing=("p02", "p03", "p04", "p05"), deadline_left_s=41.0, removed=("p09",), metrics={"loss": 0.4},
        live=(
            LiveParticipant(name="p01", heard_s_ago=3.0, phase="holding"),
            LiveParticipant(name="p02", heard_s_ago=3.0),
        ),
        best=best, last_failure="p02 says no",
    )  # fmt: skip


def test_between_rounds_it_tells_of_the_last_one() -> None:
    told = status.of_leader(view(MEMBERS, 2), NOW)
    assert (told.round, told.work, told.attempt, told.cohort, told.deadline_left_s) == (2, "none", 0, 0, None)


def test_who_does_not_lead_says_what_it_waits_for() -> None:
    standby = status.of_standby(RUN, "43-cd")
    assert (standby.role, standby.name, standby.waits_for) == (
        "standby", "43-cd", "the leader's place: standing by",
    )  # fmt: skip
    connecting = status.of_connecting(RUN, "amqp: refused")
    assert (connecting.role, connecting.waits_for) == ("connecting", "the broker: amqp: refused")


def test_a_status_comes_back_from_json_as_it_was() -> None:
    told = status.of_leader(view(OPEN, 2, 1), NOW)
    assert RunStatus.model_validate_json(told.model_dump_json()) == told


def test_the_registry_remembers_the_last_phase() -> None:
    registry = Registry(["p01"], NOW, 60.0)
    assert registry.phase("p01") is None
    registry.note_phase("p01", "training")
    registry.note_phase("p01", "holding")
    assert registry.phase("p01") == "holding"
    registry.leave("p01")
    assert registry.phase("p01") is None


# -- in words -------------------------------------------------------------------------------------------------


def test_the_page_of_a_leader() -> None:
    seen = view(OPEN.with_(by="42-ab", epoch=2, wanted="pause", removed=("p09",), metrics={"loss": 0.25}), 1, 1)
    page = status_page(status.of_leader(seen, NOW))
    for line in (
        "aggregator    leader 42-ab",
        "run           run-1, epoch 2",
        "round         3 of 9: training, attempt 2",
        "model         version 0, loss 0.25",
        "updates       1 of 5 are in",
        "operator      wants a pause",
        "last failure  p02 says no",
        "waits for     updates of p02, p03, p04, p05 until the deadline in 41 s",
        "p01          3 s ago     not heard yet",
        "removed by the operator: p09",
    ):
        assert line in page


def test_the_page_of_a_standby_tells_no_round() -> None:
    page = status_page(status.of_standby(RUN, "43-cd"))
    assert "waits for   the leader's place: standing by" in page
    assert "round" not in page


def test_nobody_live_is_said() -> None:
    assert live_table(status.of_leader(view(MEMBERS), NOW)) == "no participant is live\n"
