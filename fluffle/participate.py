"""The worker as a process of its own: what the command `worker` does."""

from __future__ import annotations

import asyncio
import fcntl
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from broker.errors import ConfigError, StateError
from broker.topology import Topology
from broker.transport import Broker
from fluffle.config import Config
from fluffle.results import peak_rss_mb
from fluffle.signals import on_signal
from workers.assignment import Assignment, Holding
from workers.journal import FileJournal
from workers.link import WorkerSettings
from workers.trainer import Sizes
from workers.worker import Site, Worker

log = structlog.get_logger(__name__)


def check_site(config: Config) -> Assignment:
    """How this site finds its learning task. Raises ConfigError for what can never work here."""
    participant = config.site.participant
    if not participant:
        raise ConfigError("no participant is named: give --participant NAME, or `participant` in section [site]")
    if config.broker.url == "memory":
        raise ConfigError(
            "a worker needs a broker that others can reach: give --broker amqp://HOST, or `url` in section [broker]"
        )
    Topology(config.broker.federation).inbox(participant)
    assignment = Assignment(Holding(participant, config.task, config.site.data, config.site.threads))
    assignment.check()
    return assignment


@contextmanager
def opened_journal(config: Config) -> Iterator[FileJournal]:
    """The journal of this worker alone. Raises StateError if another process has it, or the disk refuses."""
    where = config.site.journal or f"journals/{config.broker.federation}/{config.site.participant}"
    directory = Path(where)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield FileJournal(directory)
    except BlockingIOError:
        raise StateError(
            f"{directory}: another worker is using this journal: stop it, or give this one its own --journal"
        ) from None
    except OSError as error:
        raise StateError(
            f"{directory}: cannot be used as a journal ({error.strerror or error}): choose another --journal"
        ) from None


async def participate(worker: Worker, *, once: bool) -> None:
    """Serves run after run until SIGTERM or Ctrl-C, or only until a run that it saw is over."""
    log.info("worker_started", participant=worker.participant)
    with on_signal(worker.stop, signal.SIGTERM, signal.SIGINT):
        running = asyncio.ensure_future(worker.run())
        over = asyncio.ensure_future(worker.finished.wait())
        try:
            if once:
                await asyncio.wait((running, over), return_when=asyncio.FIRST_COMPLETED)
                worker.stop()
            await running
        finally:
            over.cancel()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await over
    log.info("worker_stopped", participant=worker.participant, peak_rss_mb=round(peak_rss_mb(), 1))


def make_worker(config: Config, assignment: Assignment, journal: FileJournal, broker: Broker) -> Worker:
    settings = WorkerSettings(
        heartbeat_s=config.broker.heartbeat_s,
        patience_s=config.broker.patience_s,
        sizes=Sizes(config.broker.inline_bytes, config.broker.chunk_bytes),
        on_notice=log.info,
    )
    site = Site(config.site.participant, assignment, journal)
    return Worker(site, broker, Topology(config.broker.federation), settings)
