"""What an aggregator is given: the job, and the surroundings in which it does it."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import structlog

from aggregator.history import RoundReport
from aggregator.settings import RunSettings
from broker.messages import Metrics
from broker.offload import contained
from broker.store import Store
from broker.tensors import Arrays

log = structlog.get_logger(__name__)

Notice = Callable[[str, Mapping[str, object]], None]  # an event's past-tense word, and its fields


@dataclass(frozen=True, slots=True)
class Job:
    """What is run. `evaluate` measures a model on held-out data; `metric` judges versions.

    An unfinished other run is given up only if `abandon` names it; a run whose record is gone but whose
    checkpoints are there goes on `from_checkpoint`, or begins again if `fresh`.
    """

    settings: RunSettings
    initial: Callable[[], Arrays]
    evaluate: Callable[[Arrays], Metrics] | None = None
    metric: str = "loss"
    abandon: str = ""
    from_checkpoint: bool = False
    fresh: bool = False

    async def measure(self, model: Arrays, on_notice: Notice) -> Metrics:
        """The metrics of a model on held-out data; those that are not finite are told and left out."""
        if self.evaluate is None:
            return {}
        measured = await asyncio.to_thread(contained(self.evaluate), model)
        if strange := {name: str(value) for name, value in measured.items() if not math.isfinite(value)}:
            on_notice("metric_not_finite", strange)
        return {name: float(value) for name, value in measured.items() if name not in strange}


def log_report(report: RoundReport) -> None:
    log.info("round_closed", **asdict(report))


def log_notice(event: str, fields: Mapping[str, object]) -> None:
    log.info(event, **fields)


def own_name() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Time and listeners, so that tests and simulations bring their own; and the claim-check store, if there is
    one: then large bodies go there and not through the broker.

    `name` makes one for a leader, which must differ from all others.
    `behind_s`: by how many seconds files may lag behind what was committed, where nothing outlives the process
    anyway (see `Archive`).
    """

    clock: Callable[[], float] = time.time
    name: Callable[[], str] = own_name
    behind_s: float = 0.0
    on_report: Callable[[RoundReport], None] = log_report
    on_notice: Notice = log_notice
    store: Store | None = None
