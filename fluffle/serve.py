"""The aggregator as a process of its own: what the command `aggregator` does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from aggregator.daemon import Aggregator
from aggregator.job import Job, Surroundings
from aggregator.status import RunStatus
from broker.head import HeadRecord
from broker.store import Store
from broker.transport import Broker
from fluffle import endpoint
from fluffle.config import Config
from fluffle.display import Display, notice
from fluffle.endpoint import Health, Pages
from fluffle.signals import Terminated, on_signal
from fluffle.watchdog import watched


async def serve(
    config: Config, job: Job, broker: Broker, display: Display, store: Store | None = None
) -> HeadRecord:
    """Leads the run, or stands by until it must; returns its last record. Raises Terminated after SIGTERM."""
    around = Surroundings(on_report=display.on_report, on_notice=partial(notice, display), store=store)
    aggregator = Aggregator(job, broker, config.run_dir, around)
    running = asyncio.ensure_future(aggregator.run())
    terminated = asyncio.Event()

    def terminate() -> None:
        terminated.set()
        running.cancel()

    async with endpoint.serve(config.http.listen, pages_of(lambda: aggregator.status(around.clock()))):
        with watched(config.process.watchdog_s), on_signal(terminate):
            try:
                return await running
            except asyncio.CancelledError:
                if terminated.is_set():
                    raise Terminated from None
                raise


def pages_of(status: Callable[[], RunStatus]) -> Pages:
    """Who leads or stands by is ready."""

    def health() -> Health:
        now = status()
        return Health(now.role != "connecting", f"{now.role}: waits for {now.waits_for}")

    return Pages(status, health)


def wall_s(record: HeadRecord) -> float:
    """Seconds from the first record of the run to its last closed round, whoever led it."""
    return max(0.0, record.closed.closed - record.started) if record.closed else 0.0
