"""The worker as a process of its own: what the command `worker` does."""

from __future__ import annotations

import asyncio
import fcntl
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import structlog

from broker.errors import ConfigError, StateError
from broker.topology import Topology
from broker.transport import Broker
from fluffle import endpoint
from fluffle.config import Config
from fluffle.endpoint import Health, Pages
from fluffle.results import peak_rss_mb
from fluffle.signals import on_signal
from fluffle.watchdog import watched
from workers.assignment import Assignment, Holding
from workers.journal import FileJournal
from workers.link import WorkerSettings
from workers.status import WorkerStatus
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
    with _locked(directory):
        yield FileJournal(directory)


def _locked(directory: Path) -> IO[str]:
    """The lock on a journal's directory, held until it is closed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
        return lock
    except BlockingIOError:
        raise StateError(
            f"{directory}: another worker is using this journal: stop it, or give this one its own --journal"
        ) from None
    except OSError as error:
        raise StateError(
            f"{directory}: cannot be used as a journal ({error.strerror or error}): choose another --journal"
        ) from None


@dataclass(frozen=True, slots=True)
class Until:
    """When a worker stops by itself: when a run that it saw is `over`, or when standard input `ends`."""

    over: bool = False
    ends: bool = False


async def participate(config: Config, worker: Worker, until: Until) -> None:
    """Serves run after run until SIGTERM or Ctrl-C, or until what was asked for."""
    log.info("worker_started", participant=worker.participant)
    async with endpoint.serve(config.site.http, pages_of(lambda: worker.status(time.time()))):
        with watched(config.process.watchdog_s), on_signal(worker.stop, signal.SIGTERM, signal.SIGINT):
            await _serve(worker, until)
    log.info("worker_stopped", participant=worker.participant, peak_rss_mb=round(peak_rss_mb(), 1))


def pages_of(status: Callable[[], WorkerStatus]) -> Pages:
    """Who is connected is ready."""

    def health() -> Health:
        now = status()
        return Health(now.connected, f"{now.phase}: waits for {now.waits_for}")

    return Pages(status, health)


async def _serve(worker: Worker, until: Until) -> None:
    async with asyncio.TaskGroup() as group:
        ends = [worker.finished.wait] * until.over + [_end_of_input] * until.ends
        waits = [group.create_task(end()) for end in ends]
        for wait in waits:
            wait.add_done_callback(lambda _: worker.stop())
        await worker.run()
        for wait in waits:
            wait.cancel()


async def _end_of_input() -> bool:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(1 << 10):
        pass
    return True


def make_worker(config: Config, assignment: Assignment, journal: FileJournal, broker: Broker) -> Worker:
    settings = WorkerSettings(
        heartbeat_s=config.broker.heartbeat_s,
        patience_s=config.broker.patience_s,
        sizes=Sizes(config.broker.inline_bytes, config.broker.chunk_bytes),
        on_notice=log.info,
    )
    site = Site(config.site.participant, assignment, journal)
    return Worker(site, broker, Topology(config.broker.federation), settings)
