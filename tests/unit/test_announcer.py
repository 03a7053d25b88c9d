"""What a status calls for, and who is told what."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from aggregator.announcer import FANOUT, Announcer, reply_to
from aggregator.lead import Lead
from aggregator.round import Round
from broker.head import ClosedRound, HeadRecord, OpenRound
from broker.memory import MemoryBroker
from broker.messages import Fate, Heartbeat, Join, TrainRound, Where
from broker.topology import AGGREGATOR, Topology
from broker.transport import Inbox
from broker.wire import decode
from tests.federation import settings

MODEL = Where(where="inline", size_bytes=5, sha256="a" * 64)
HEAD = HeadRecord(run_id="run-1", epoch=2, seq=3, version=4, task=5, round=4, model=MODEL)
Settled = Mapping[str, tuple[int, Fate]]


def beat(phase: str = "idle", task: int = 0, run_id: str = "run-1") -> Heartbeat:
    return Heartbeat(participant="p01", run_id=run_id, epoch=2, phase=phase, task=task)


def asking(missing: list[str]) -> Round:
    """A round for task 5 that waits for these."""
    return Round(opened([*missing, "p08"]), settings(2).round)


# -- what a status calls for ----------------------------------------------------------------------------------


def test_who_joins_is_told_the_newest_whatever_it_does() -> None:
    for missing in ([], ["p01"]):
        for phase in ("idle", "training", "holding"):
            join = Join(participant="p01", run_id="run-1", phase=phase, task=5)
            assert reply_to(join, HEAD, {"p01": (5, "counted")}, asking(missing)) == {}


@pytest.mark.parametrize("run_id", ["", "run-0"])
def test_who_knows_no_run_or_another_is_told_the_newest(run_id: str) -> None:
    assert reply_to(beat("holding", 9, run_id), HEAD, {}, None) == {}


@pytest.mark.parametrize(
    ("status", "missing", "told"),
    [
        (beat(), [], False),  # has nothing to do
        (beat(), ["p01"], True),  # missed its task
        (beat("training", 5), ["p01"], False),  # is at it
        (beat("training", 4), ["p01"], True),  # is at something else
        (beat("training", 4), [], False),
    ],
)
def test_who_is_asked_and_does_not_work_on_it_is_told(status: Heartbeat, missing: list[str], told: bool) -> None:
    assert reply_to(status, HEAD, {}, asking(missing)) == ({} if told else None)


@pytest.mark.parametrize(
    ("committed", "decided", "reply"),
    [
        ({"p01": (5, "counted")}, {"p01": (5, "counted")}, {}),  # its fate is known
        ({"p01": (6, "counted")}, {"p01": (6, "counted")}, {}),
        ({"p01": (4, "counted")}, {"p01": (5, "counted")}, None),  # accepted but not committed: it may be needed
        ({}, {"p01": (5, "late")}, None),
        ({"p01": (4, "counted")}, {"p01": (4, "counted")}, {"p01": (5, "missing")}),  # never arrived: send it again
        ({}, {}, {"p01": (5, "missing")}),
    ],
)
def test_who_holds_an_update_is_told_its_fate_once_it_is_committed(
    committed: Settled, decided: Settled, reply: Settled | None
) -> None:
    head = HEAD.with_(settled=dict(committed))
    for current in (None, asking(["p02"])):
        assert reply_to(beat("holding", 5), head, decided, current) == reply


# -- who is told what -----------------------------------------------------------------------------------------


def opened(cohort: list[str]) -> OpenRound:
    return OpenRound(
        work="train",
        round=5,
        attempt=2,
        task=5,
        epoch=2,
        cohort=tuple(cohort),
        opened=90.0,
        deadline=130.0,
        allowed_s=40.0,
    )


class Told:
    """An announcer on a broker, and the inboxes that it fills."""

    def __init__(self, head: HeadRecord) -> None:
        self.broker, self.topology, self.head = MemoryBroker(), Topology("default"), head
        self.inboxes: dict[str, Inbox] = {}

    async def announcer(self, participants: list[str], **sections: dict[str, object]) -> Announcer:
        transport = await self.broker.connect(AGGREGATOR, purpose="publish")
        await transport.declare(*self.topology.aggregator_declarations())
        for participant in participants:
            await transport.declare(*self.topology.inbox_declarations(participant))
            self.inboxes[participant] = await transport.consume(self.topology.inbox(participant))
        lead = Lead(transport, transport, self.topology, "me", 1.0)
        lead.record, lead.payload = self.head, memoryview(b"modelstate")
        return Announcer(lead, self.topology, settings(2, **sections), "delta")

    async def by(self, participant: str) -> list[tuple[TrainRound, bytes]]:
        """What that participant was told, oldest first."""
        orders = []
        while (delivery := await self.inboxes[participant].get(0)) is not None:
            order, payload = decode(delivery.body)
            assert isinstance(order, TrainRound)
            orders.append((order, bytes(payload)))
        return orders


async def test_one_message_tells_a_small_federation_everything() -> None:
    told = Told(HEAD.with_(settled={"p01": (4, "late"), "p09": (1, "counted")}))
    announcer = await told.announcer(["p01", "p02"], round={"late": "fold"})
    current = Round(opened(["p01", "p02"]), settings(2).round)
    current.accept("p02", 1, 5)
    await announcer.announce(current, ["p01", "p02"], 100.0)
    expected = TrainRound(
        run_id="run-1", epoch=2, seq=3, task=5, round=5, attempt=2, work="train", asked=("p01",), version=4,
        model=MODEL, seed=42, deadline_s=30.0, late_counts=True, fates={"p01": (4, "late")},
    )  # fmt: skip
    assert await told.by("p01") == await told.by("p02") == [(expected, b"model")]
    assert announcer.bytes_down > 0


async def test_between_rounds_nobody_is_asked_for_anything() -> None:
    told = Told(HEAD)
    announcer = await told.announcer(["p01"])
    await announcer.announce(None, ["p01"], 100.0)
    [(order, _)] = await told.by("p01")
    assert (order.work, order.asked, order.round, order.deadline_s, order.finished) == ("none", (), 4, 0.0, False)


async def test_a_deadline_that_passed_is_not_negative() -> None:
    told = Told(HEAD)
    announcer = await told.announcer(["p01"])
    await announcer.announce(Round(opened(["p01"]), settings(2).round), ["p01"], 200.0)
    assert (await told.by("p01"))[0][0].deadline_s == 0.0


async def test_one_participant_is_told_what_concerns_it() -> None:
    told = Told(HEAD.with_(settled={"p01": (4, "counted"), "p02": (4, "counted")}))
    announcer = await told.announcer(["p01", "p02"])
    await announcer.tell("p01", {"p01": (5, "missing")}, Round(opened(["p01", "p02"]), settings(2).round), 100.0)
    [(order, _)] = await told.by("p01")
    assert (order.asked, order.fates) == (("p01",), {"p01": (5, "missing")})
    assert await told.by("p02") == []


async def test_nobody_there_to_be_told_is_no_error() -> None:
    announcer = await Told(HEAD).announcer([])
    await announcer.announce(None, [], 100.0)
    await announcer.tell("p01", {}, None, 100.0)
    assert announcer.bytes_down == 0


async def test_in_a_large_federation_everybody_is_told_what_concerns_it_alone() -> None:
    everybody = [f"p{i:03d}" for i in range(FANOUT + 20)]
    asked, answered = everybody[:3], everybody[3:5]
    closed = ClosedRound(work="train", round=4, attempt=1, task=4, cohort=2, opened=0.0, closed=1.0)
    told = Told(HEAD.with_(closed=closed, settled=dict.fromkeys(answered, (4, "counted"))))
    announcer = await told.announcer(everybody)
    await announcer.announce(Round(opened(asked), settings(2).round), everybody, 100.0)
    for participant in everybody:
        orders = [(order.asked, order.fates) for order, _ in await told.by(participant)]
        if participant in asked:
            assert orders == [((participant,), {})]
        elif participant in answered:
            assert orders == [((), {participant: (4, "counted")})]
        else:
            assert orders == []


async def test_everybody_hears_of_the_end_of_a_run_however_many_they_are() -> None:
    everybody = [f"p{i:03d}" for i in range(FANOUT + 20)]
    told = Told(HEAD.with_(finished="all 4 rounds done"))
    announcer = await told.announcer(everybody)
    await announcer.announce(None, everybody, 100.0)
    for participant in everybody:
        assert [order.finished for order, _ in await told.by(participant)] == [True]


def test_who_holds_a_refused_update_and_is_asked_again_is_told_to_drop_it() -> None:
    refused = {"p01": (5, "refused")}
    assert reply_to(beat("holding", 5), HEAD, refused, asking(["p01"])) == refused
    assert reply_to(beat("holding", 5), HEAD, refused, asking([])) is None
