"""What one worker is doing at this moment, and in plain words what it waits for."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import Field

from broker.messages import Count, Fate, Part, Phase, RunId
from workers.transfer import Transfer, TransferStatus


class LinkStatus(Protocol):
    """The way to the broker: why there is none, and why nothing can be published, both empty if all is well; and
    the large body that is on its way."""

    @property
    def trouble(self) -> str: ...

    @property
    def blocked(self) -> str: ...

    @property
    def transfer(self) -> Transfer | None: ...


class WorkerStatus(Part):
    """All that a worker knows of itself. `round` and `task` are those it was told of last."""

    participant: str
    federation: str
    connected: bool
    waits_for: str
    phase: Phase
    phase_s: Annotated[float, Field(ge=0)]  # for so long
    run_id: RunId | Literal[""] = ""
    epoch: Count = 0
    round: Count = 0
    task: Count = 0  # that it trains or holds
    held: Count = 0  # the task whose finished update it keeps; 0: none
    sent: bool = False  # whether that one was confirmed by the broker
    settled: Count = 0  # the last task of which it heard what became of it
    fate: Fate | None = None
    transfer: TransferStatus | None = None  # of a large body, while it lasts


def waits_for(link: LinkStatus, phase: Phase, task: int, round_number: int) -> str:
    """One line for people: what must happen before this worker goes on."""
    if link.trouble:
        return f"the broker: {link.trouble}"
    if link.blocked:
        return f"the broker, which blocks publishers ({link.blocked})"
    if link.transfer:
        return f"the link: {link.transfer.status()}"
    match phase:
        case "training":
            return f"nothing: it works on task {task} of round {round_number}"
        case "holding":
            return f"the fate of its update of task {task}"
        case "idle":
            return "the aggregator, which has nothing for it to do"
