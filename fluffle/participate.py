"""Workers as a process of their own: what the command `worker` does, for one participant or for many."""

from __future__ import annotations

import asyncio
import fcntl
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import structlog

from broker.errors import ConfigError, StateError
from broker.messages import Part
from broker.topology import Topology
from broker.transport import Broker
from fluffle import endpoint
from fluffle.config import Config
from fluffle.endpoint import Health, Pages
from fluffle.results import peak_rss_mb
from fluffle.signals import on_signal
from fluffle.stores import opened_store
from fluffle.transfers import Watch
from fluffle.watchdog import watched
from workers.assignment import Assignment, Holding
from workers.attack import attacking
from workers.journal import FileJournal
from workers.lane import Lane
from workers.link import WorkerSettings
from workers.status import WorkerStatus
from workers.trainer import Sizes
from workers.worker import Site, Worker

log = structlog.get_logger(__name__)


RANGE = re.compile(r"(.*?)(\d+)\.\.\1(\d+)")
MOST_PARTICIPANTS = 100_000  # in one process: a slip of the pen shall not fill the memory


class CrowdStatus(Part):
    """What a process tells that serves several participants."""

    workers: tuple[WorkerStatus, ...]


def participants(named: str) -> list[str]:
    """The names in `p01,p05` or `p01..p10`, in that order. Raises ConfigError."""
    names = [name for part in named.split(",") for name in _range(part.strip())]
    if len(set(names)) < len(names):
        raise ConfigError(f"site.participant = {named!r} names a participant twice")
    return names


def _range(part: str) -> list[str]:
    found = RANGE.fullmatch(part)
    if found is None:
        return [part]
    prefix, first, last = found.groups()
    count = int(last) - int(first) + 1
    if not 0 < count <= MOST_PARTICIPANTS or len(first) > len(last):
        raise ConfigError(f"site.participant = {part!r}: a range goes upwards, as p01..p10")
    return [f"{prefix}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def check_site(config: Config) -> dict[str, Assignment]:
    """How each participant here finds its learning task. Raises ConfigError for what can never work."""
    if not config.site.participant:
        raise ConfigError("no participant is named: give --participant NAME, or `participant` in section [site]")
    if config.broker.url == "memory":
        raise ConfigError(
            "a worker needs a broker that others can reach: give --broker amqp://HOST, or `url` in section [broker]"
        )
    names, site = participants(config.site.participant), config.site
    for name in names:
        Topology(config.broker.federation).inbox(name)
    has = Holding("", config.task, site.data, site.threads, site.lora_rank, site.device, site.processes)
    assignments = {name: Assignment(replace(has, participant=name)) for name in names}
    assignments[names[0]].check()
    return assignments


@contextmanager
def opened_journals(config: Config) -> Iterator[dict[str, FileJournal]]:
    """The journal of each worker. Raises StateError if another process has one, or the disk refuses."""
    names = participants(config.site.participant)
    where = Path(config.site.journal or f"journals/{config.broker.federation}")
    alone = bool(config.site.journal) and len(names) == 1
    with ExitStack() as locks:
        directories = {name: where if alone else where / name for name in names}
        for directory in directories.values():
            locks.enter_context(_locked(directory))
        lane = Lane("journal")
        yield {name: FileJournal(directory, lane) for name, directory in directories.items()}


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


async def participate(config: Config, workers: Sequence[Worker], until: Until) -> None:
    """Serves run after run until SIGTERM or Ctrl-C, or until what was asked for."""

    def stop() -> None:
        for worker in workers:
            worker.stop()

    log.info("worker_started", participant=config.site.participant)
    async with endpoint.serve(config.site.http, pages_of(workers)):
        with watched(config.process.watchdog_s), on_signal(stop, signal.SIGTERM, signal.SIGINT):
            await _serve(workers, until)
    peak_mb = await asyncio.to_thread(peak_rss_mb)
    log.info("worker_stopped", participant=config.site.participant, peak_rss_mb=round(peak_mb, 1))


def pages_of(workers: Sequence[Worker]) -> Pages:
    """Who is connected is ready; of several, all must be."""

    def told() -> list[WorkerStatus]:
        now = time.time()
        return [worker.status(now) for worker in workers]

    def status() -> Part:
        return told()[0] if len(workers) == 1 else CrowdStatus(workers=tuple(told()))

    def health() -> Health:
        every = told()
        shown = next((one for one in every if not one.connected), every[0])
        whose = "" if len(workers) == 1 else f"{shown.participant} "
        return Health(shown.connected, f"{whose}{shown.phase}: waits for {shown.waits_for}")

    return Pages(status, health)


async def _serve(workers: Sequence[Worker], until: Until) -> None:
    async with asyncio.TaskGroup() as watching:
        over = [(worker.finished.wait, [worker]) for worker in workers if until.over]
        ends = [(_end_of_input, workers)] if until.ends else []
        watches = [watching.create_task(_stop_after(end, whom)) for end, whom in (*over, *ends)]
        async with asyncio.TaskGroup() as running:
            for worker in workers:
                running.create_task(worker.run(), name=worker.participant)
        for watch in watches:
            watch.cancel()


async def _stop_after(end: Callable[[], Awaitable[object]], workers: Sequence[Worker]) -> None:
    await end()
    for worker in workers:
        worker.stop()


async def _end_of_input() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(1 << 10):
        pass


def make_workers(
    config: Config,
    assignments: Mapping[str, Assignment],
    journals: Mapping[str, FileJournal],
    broker: Broker,
    on_transfer: Watch,
) -> list[Worker]:
    """One for each participant. They share the thread that trains: two trainings never run at once."""
    settings = WorkerSettings(
        heartbeat_s=config.broker.heartbeat_s,
        patience_s=config.broker.patience_s,
        sizes=Sizes(config.broker.inline_bytes, config.broker.chunk_bytes, config.store.part_bytes),
        on_notice=log.info,
        on_transfer=on_transfer,
    )
    topology, thread = Topology(config.broker.federation), Lane("train")
    store = opened_store(config.store)
    attack = config.site.attack
    if attack:
        log.warning("worker_attacks", participant=config.site.participant, attack=attack)
    return [
        Worker(
            Site(name, attacking(task_for, attack), journals[name], thread, store, config.site.lora_rank),
            broker,
            topology,
            settings,
        )
        for name, task_for in assignments.items()
    ]
