"""A whole federation in one process: the real aggregator and the real workers on the embedded broker."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import structlog

from aggregator.daemon import Aggregator
from aggregator.job import Surroundings
from aggregator.strategies import make_strategy
from broker.errors import ConfigError, first_known
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker
from fluffle.config import Config
from fluffle.display import Display, notice
from fluffle.jobs import check_metrics, task_job
from fluffle.learning import shares_of
from workers.journal import MemoryJournal
from workers.link import WorkerSettings
from workers.modules import use_threads
from workers.partition import Shard, Shares
from workers.tasks import find_task
from workers.torch_task import TaskDefinition
from workers.trainer import Sizes
from workers.worker import Site, Worker, always

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last head record of a simulated run, and the seconds it took."""

    record: HeadRecord
    wall_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a simulation needs, found to be possible before anything is written."""

    config: Config
    definition: TaskDefinition
    shares: Shares


def plan_simulation(config: Config) -> Plan:
    """Loads the task and shares out its data. Raises FluffleError for what cannot work."""
    if config.broker.url != "memory":
        raise ConfigError(
            f"broker.url = {config.broker.url.split('@')[-1]!r}: simulations run on the embedded broker only: "
            "use --broker memory"
        )
    make_strategy(config.strategy, config.round)
    definition = find_task(config.task)
    definition.recipe(config.train.chosen())
    check_metrics(config, definition)
    return Plan(config, definition, shares_of(config, definition))


async def run_simulation(plan: Plan, display: Display) -> Outcome:
    """Runs to the end, or goes on from the checkpoints in the run directory.

    All participants share one training thread with one torch thread, so that equal seeds give equal bits.
    """
    use_threads()
    display.on_notice("data_shared_out", **_holdings(plan.shares))
    topology = Topology(plan.config.broker.federation)
    broker = MemoryBroker(topology.access)
    await _set_up(broker, topology)
    began = time.monotonic()
    thread = ThreadPoolExecutor(1, "train")
    try:
        async with asyncio.TaskGroup() as group:
            workers = [_worker(plan, shard, broker, thread) for shard in plan.shares.shards]
            for worker in workers:
                group.create_task(worker.run(), name=worker.participant)
            record = await _aggregator(plan, broker, display).run()
            for worker in workers:
                worker.stop()
    except ExceptionGroup as failures:
        raise first_known(failures) or failures from failures
    finally:
        await asyncio.to_thread(thread.shutdown)
    return Outcome(record, time.monotonic() - began)


async def _set_up(broker: Broker, topology: Topology) -> None:
    """Lets workers find the federation before an aggregator leads it."""
    connection = await broker.connect(AGGREGATOR, purpose="set up")
    await connection.declare(*topology.aggregator_declarations())
    await connection.close()


def _worker(plan: Plan, shard: Shard, broker: Broker, thread: ThreadPoolExecutor) -> Worker:
    config = plan.config
    held_out = shard.held_out if len(shard.held_out) else None
    task = plan.definition.bind(shard.train, held_out, shard.name)
    log.info("data_prepared", participant=shard.name, **task.report.to_dict())
    settings = WorkerSettings(
        heartbeat_s=config.broker.heartbeat_s,
        patience_s=config.broker.patience_s,
        sizes=Sizes(config.broker.inline_bytes, config.broker.chunk_bytes),
    )
    site = Site(shard.name, always(task), MemoryJournal(), thread)
    return Worker(site, broker, Topology(config.broker.federation), settings)


def _aggregator(plan: Plan, broker: Broker, display: Display) -> Aggregator:
    job = task_job(plan.config, plan.definition, plan.shares.held_out)
    job = replace(job, from_checkpoint=True)  # the command refuses a used directory unless it is to resume
    around = Surroundings(on_report=display.on_report, on_notice=partial(notice, display))
    return Aggregator(job, broker, plan.config.run_dir, around)


def _holdings(shares: Shares) -> dict[str, object]:
    sizes = [len(shard.train) for shard in shares.shards]
    return {
        "source": shares.train.source or shares.train.name,
        "participants": len(sizes),
        "examples": f"{min(sizes)} to {max(sizes)}",
        "held_out": len(shares.held_out),
    }
