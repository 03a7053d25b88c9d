"""What one aggregator is doing at this moment, and in plain words what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from aggregator import plan
from aggregator.quota import Quotas
from aggregator.registry import Registry
from aggregator.round import Round
from aggregator.settings import RunSettings
from broker.head import Best, HeadRecord
from broker.messages import Count, Metrics, Part, Phase, Work

MOST_NAMED = 10  # participants in one line


class LiveParticipant(Part):
    """One who is live; `phase` is what it last said that it does, nil if this leader has not heard it yet.

    `ignored` messages were above its quota.
    """

    name: str
    heard_s_ago: float
    phase: Phase | None = None
    ignored: Count = 0


class RunStatus(Part):
    """Everything that `fluffle status` shows. Only the leader knows of rounds and participants."""

    role: Literal["leader", "standby", "connecting"]
    waits_for: str
    federation: str
    run_id: str
    rounds: Count  # after so many the run is finished
    name: str = ""
    epoch: Count = 0
    version: Count = 0
    round: Count = 0  # the open one, else the last closed
    work: Work = "none"
    attempt: Count = 0
    wanted: Literal["run", "pause", "stop"] = "run"
    cohort: Count = 0
    accepted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    deadline_left_s: Annotated[float, Field(ge=0)] | None = None
    live: tuple[LiveParticipant, ...] = ()
    removed: tuple[str, ...] = ()
    metrics: Metrics = {}
    best: Best | None = None
    finished: str = ""
    last_failure: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """What a leader's status is made from."""

    settings: RunSettings
    head: HeadRecord
    round: Round | None
    registry: Registry
    quotas: Quotas
    caught_up: bool
    waited_s: float  # since this leader's term began
    last_failure: str


def of_connecting(settings: RunSettings, reason: str) -> RunStatus:
    return _status("connecting", f"the broker: {reason}", settings)


def of_standby(settings: RunSettings, name: str) -> RunStatus:
    return _status("standby", "the leader's place: standing by", settings).model_copy(update={"name": name})


def blocked(found: RunStatus, reason: str) -> RunStatus:
    """The same, of one whose publishers the broker blocks: nothing goes on before it stops that."""
    return found.model_copy(update={"waits_for": f"the broker, which blocks publishers ({reason})"})


def _status(role: Literal["standby", "connecting"], waits_for: str, settings: RunSettings) -> RunStatus:
    return RunStatus(
        role=role, waits_for=waits_for, federation=settings.federation, run_id=settings.run_id,
        rounds=settings.stop.rounds,
    )  # fmt: skip


def of_leader(view: View, now: float) -> RunStatus:
    head, current = view.head, view.round
    opened = current.open if current else None
    return RunStatus(
        role="leader",
        waits_for=waits_for(view, now),
        federation=view.settings.federation,
        run_id=head.run_id,
        rounds=view.settings.stop.rounds,
        name=head.by,
        epoch=head.epoch,
        version=head.version,
        round=opened.round if opened else head.round,
        work=opened.work if opened else "none",
        attempt=opened.attempt if opened else 0,
        wanted=head.wanted,
        cohort=len(opened.cohort) if opened else 0,
        accepted=tuple(sorted(current.accepted)) if current else (),
        missing=tuple(current.missing) if current else (),
        deadline_left_s=max(0.0, opened.deadline - now) if opened else None,
        live=live_participants(view, now),
        removed=head.removed,
        metrics=head.metrics,
        best=head.best,
        finished=head.finished,
        last_failure=view.last_failure,
    )


def live_participants(view: View, now: float) -> tuple[LiveParticipant, ...]:
    registry, heard = view.registry, view.registry.last_heard()
    return tuple(
        LiveParticipant(
            name=name, heard_s_ago=max(0.0, now - heard[name]), phase=registry.phase(name),
            ignored=view.quotas.ignored(name),
        )
        for name in registry.live(now)
    )  # fmt: skip


def waits_for(view: View, now: float) -> str:
    """One line for people: what must happen before this leader goes on."""
    head = view.head
    if head.finished:
        return f"nothing: the run is finished ({head.finished})"
    if not view.caught_up:
        return "the end of the log: it reads again what came since the record"
    if view.round is not None:
        then = {"run": "", "pause": "; then the operator: paused", "stop": "; then the run is stopped"}
        return _of_round(view.round, now) + then[head.wanted]
    if head.wanted != "run":
        return "the operator: paused" if head.wanted == "pause" else "nothing: the run is being stopped"
    needed, live = plan.needed(head, view.settings, view.waited_s), len(view.registry.live(now))
    return f"at least {needed} live {'participant' if needed == 1 else 'participants'} ({_are(live)})"


def _of_round(current: Round, now: float) -> str:
    left_s = max(0.0, current.open.deadline - now)
    progress = f"{current.count} of {current.size} are in, quorum {current.quorum}"
    what = f"updates of {_names(current.missing)} until the deadline" if current.missing else "the deadline"
    return f"{what} in {left_s:.0f} s ({progress})"


def _names(participants: list[str]) -> str:
    more = len(participants) - MOST_NAMED
    return ", ".join(participants[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _are(count: int) -> str:
    return "1 is" if count == 1 else f"{count} are"
