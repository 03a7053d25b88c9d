"""What participants are told: always the whole of what they should know now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog

from aggregator.lead import Lead
from aggregator.round import Round
from aggregator.settings import RunSettings
from broker.errors import Unroutable
from broker.head import HeadRecord
from broker.messages import Fate, Join, Status, TrainRound, Wants, Where
from broker.retry import publish
from broker.topology import EVERYONE, Topology
from broker.wire import encode

log = structlog.get_logger(__name__)

FANOUT = 1000  # up to so many participants share one message; beyond, each gets its own slice of it

Fates = Mapping[str, tuple[int, Fate]]


def reply_to(status: Status, head: HeadRecord, settled: Fates, current: Round | None) -> Fates | None:
    """What a status calls for: nothing (None), or the newest TrainRound, with a fate if one is to be added.

    Only committed fates are told: an update that was accepted but not committed may still be needed again.
    """
    who, nobody = status.participant, (0, "missing")
    awaited = current is not None and current.awaits(who)
    silence: Fates | None = {} if isinstance(status, Join) else None
    if status.run_id != head.run_id:
        return {}
    if status.phase == "holding":
        if head.settled.get(who, nobody)[0] >= status.task:
            return {}
        task, fate = settled.get(who, nobody)
        if task >= status.task and awaited:  # asked again: if it was refused, what it holds is of no use
            return {who: (task, "refused")} if fate == "refused" else {}
        if task >= status.task:
            return silence
        return {who: (status.task, "missing")}
    works_on_it = status.phase == "training" and current is not None and current.offers(status.task)
    return {} if awaited and not works_on_it else silence


class Announcer:
    """Publishes TrainRound messages to one participant or to all, and counts their bytes."""

    def __init__(self, lead: Lead, topology: Topology, settings: RunSettings, wants: Wants) -> None:
        self._lead = lead
        self._topology = topology
        self._settings = settings
        self._wants = wants
        self.bytes_down = 0

    @property
    def _state(self) -> Where | None:
        """Where the strategy's state is, if participants need it."""
        return self._lead.record.state if self._wants == "delta+control" else None

    async def announce(self, open_round: Round | None, live: Sequence[str], now: float) -> None:
        """Tells everybody: who is asked for what, the newest model, what became of the last updates."""
        missing = open_round.to_tell if open_round else []
        head = self._lead.record
        if len(live) <= FANOUT and len(missing) <= FANOUT:
            fates = {p: head.settled[p] for p in live if p in head.settled}
            first = [p for p in missing if open_round and not open_round.turn(p)]
            await self._publish(EVERYONE, self._order(open_round, first, fates, now), len(live))
            for participant in missing if len(first) < len(missing) else ():
                if participant not in first:  # it has done a task of this version, and is asked for its next
                    await self.tell(participant, {}, open_round, now)
        else:
            closed = head.closed.task if head.closed else 0
            told = set(live) if head.finished else {p for p, (task, _) in head.settled.items() if task == closed}
            for participant in sorted(told.union(missing)):
                await self.tell(participant, {}, open_round, now)
        state = self._state
        self.bytes_down += sum(_fetched_bytes(head, participant) for participant in missing)
        self.bytes_down += len(missing) * (state.size_bytes - _inline_bytes(state)) if state else 0

    async def tell(self, participant: str, fates: Fates, open_round: Round | None, now: float) -> None:
        """Tells one participant what concerns it."""
        known = self._lead.record.settled.get(participant)
        own = {participant: known} if known else {}
        asked = [participant] if open_round and open_round.awaits(participant) else []
        await self._publish(participant, self._order(open_round, asked, {**own, **fates}, now), 1)

    def _order(self, open_round: Round | None, asked: Sequence[str], fates: Fates, now: float) -> TrainRound:
        """All who are asked are asked for the same task."""
        head, opened = self._lead.record, open_round.open if open_round else None
        turn = open_round.turn(asked[0]) if open_round and asked else 0
        return TrainRound(
            run_id=head.run_id,
            epoch=head.epoch,
            seq=head.seq,
            task=opened.task + turn if opened else head.task,
            turn=turn,
            round=opened.round if opened else head.round,
            attempt=opened.attempt if opened else 0,
            work=opened.work if opened else "none",
            asked=tuple(asked),
            version=head.version,
            model=head.model,
            difference=head.difference,
            learning_task=self._settings.learning_task,
            data=self._settings.data,
            settings=self._settings.train,
            wants=self._wants,
            state=self._state,
            local=self._settings.personal.patterns,
            ditto=self._settings.personal.ditto,
            fragments=self._settings.strategy.fragments,
            codecs=self._settings.codec.allowed,
            seed=self._settings.seed,
            deadline_s=max(0.0, opened.deadline - now) if opened else 0.0,
            late_counts=self._settings.round.takes_stale,
            fates=dict(fates),
            finished=bool(head.finished),
        )

    async def _publish(self, key: str, order: TrainRound, readers: int) -> None:
        inline_bytes = sum(_inline_bytes(body) for body in (order.model, order.state))
        frame = encode(order, self._lead.payload[:inline_bytes])
        try:
            await publish(self._lead.writer, self._topology.down, key, frame)
            self.bytes_down += len(frame) * readers
        except Unroutable:
            log.debug("nobody_to_tell", key=key)  # nobody there yet, or gone for so long that the inbox expired


def _inline_bytes(body: Where | None) -> int:
    return body.size_bytes if body is not None and body.where == "inline" else 0


def _fetched_bytes(head: HeadRecord, participant: str) -> int:
    """Of the model, as far as can be told from here: whoever had the version before fetches the difference."""
    if head.model is None or head.model.where == "inline":
        return 0
    last_task = head.settled.get(participant, (0, ""))[0]
    version, sha256 = head.base_of(last_task) or (0, "")
    if head.difference is not None and version and sha256 == head.difference.base:  # nobody keeps version 0
        return head.difference.body.size_bytes
    return head.model.size_bytes
