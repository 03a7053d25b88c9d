"""What operators want: what a Control makes of the record, and what is answered.

A Control changes the record but not its offset, so it is read again after a take-over. The record names those that
it holds already, and who was removed before the first of them: so whoever replays changes nothing twice, and
believes or refuses every message as the leader before did.
"""

from __future__ import annotations

import structlog

from broker.errors import Unroutable
from broker.head import HeadRecord, Obeyed
from broker.messages import Answer, Control
from broker.retry import publish
from broker.topology import OPERATOR, Topology
from broker.transport import Transport
from broker.wire import encode

log = structlog.get_logger(__name__)

MEANT = {"pause": "pause", "resume": "run", "stop": "stop"}  # what a command makes of `wanted`
ALREADY = {"pause": "already paused", "resume": "already running", "stop": "already stopping"}


def changed(control: Control, head: HeadRecord) -> HeadRecord:
    """The record as the operator wants it; the open round is for others."""
    match control.command:
        case "remove":
            return head.with_(removed=tuple(sorted({*head.removed, control.participant})))
        case "admit":
            return head.with_(removed=tuple(p for p in head.removed if p != control.participant))
    return head.with_(wanted=MEANT[control.command])


def was_obeyed(control: Control, head: HeadRecord) -> bool:
    """Whether the record holds it already, and it is only read again."""
    return head.obeyed is not None and control.nonce in head.obeyed.nonces


def noted(control: Control, head: HeadRecord) -> Obeyed:
    """What the next record shall know of Controls that will be read again. `head` is the one before."""
    before = head.obeyed or Obeyed(removed=head.removed)
    return before.model_copy(update={"nonces": (*before.nonces, control.nonce)})


def removed_at_offset(head: HeadRecord) -> tuple[str, ...]:
    """Who was removed when the message at `updates_from` came."""
    return head.obeyed.removed if head.obeyed else head.removed


def answer(control: Control, head: HeadRecord) -> Answer:
    """What the operator is told; `head` is the record before. Read again, it is told the same again."""
    if control.run_id not in ("", head.run_id):
        text = f"the run here is {head.run_id}, not {control.run_id}"
        return Answer(nonce=control.nonce, done=False, text=text)
    return Answer(nonce=control.nonce, done=True, text=_done(control, head))


def _done(control: Control, head: HeadRecord) -> str:
    name = control.participant
    if changed(control, head) == head and not was_obeyed(control, head):
        never = f"{name} was removed already" if control.command == "remove" else f"{name} is not removed"
        return never if name else ALREADY[control.command]
    until = f"round {head.open.round} goes on to its close, then " if head.open else ""
    return {
        "pause": f"paused: {until}no round opens until resume",
        "resume": "resumed: rounds open as soon as enough participants are live",
        "stop": f"stopping: {until}the run is finished",
        "remove": f"removed {name}: it is not asked any more, and what it sends is refused",
        "admit": f"admitted {name}: it takes part again as soon as its worker is heard of",
    }[control.command]


async def reply(writer: Transport, topology: Topology, answer: Answer) -> None:
    """Tells the operator, unless nobody waits for it any more."""
    try:
        await publish(writer, topology.down, OPERATOR, encode(answer))
    except Unroutable:
        log.debug("nobody_to_tell", key=OPERATOR)
