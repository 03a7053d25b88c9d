"""A whole federation on one machine: the real aggregator and the real workers.

On the embedded broker all of it is in this process; over RabbitMQ every worker is a process of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NoReturn

import numpy as np
import structlog

from aggregator.archive import BEHIND_S
from aggregator.checkpoints import Checkpoints
from aggregator.daemon import Aggregator
from aggregator.job import Surroundings, own_name
from aggregator.strategies import check_training, make_strategy
from broker.errors import ConfigError, TaskError, first_known
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.store import OwnMemory, Store
from broker.tensors import Arrays
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker
from fluffle.brokers import rabbit_broker
from fluffle.config import Config
from fluffle.crowd import check_credentials, crowd
from fluffle.display import Display, notice
from fluffle.jobs import check_metrics, check_strategy, task_job
from fluffle.learning import initial_model, shares_of
from fluffle.presence import Habits, Lag, Presence, habits_of
from fluffle.stores import keepers_store
from fluffle.virtual import AtOnce, VirtualLoop
from workers.attack import LABEL_FLIP, attacking
from workers.definition import BoundTask, Definition
from workers.journal import MemoryJournal
from workers.lane import Lane
from workers.link import WorkerSettings
from workers.modules import use_threads
from workers.partition import Shard, Shares
from workers.stacked import Unstackable
from workers.tasks import find_task
from workers.together import Together
from workers.torch_task import TaskDefinition, TorchTask
from workers.trainer import Sizes
from workers.worker import Site, TaskFor, Worker, always

ATTACKER_DRAWS = 3  # tells who attacks from what else the seed decides

log = structlog.get_logger(__name__)


VIRTUAL_BEHIND = 100  # median delays that files may be behind in virtual time, where that many take a moment


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last head record of a simulated run, the seconds it took, and the virtual ones since it first began."""

    record: HeadRecord
    wall_s: float
    virtual_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a simulation needs, found to be possible before anything is written. `attacks`: of each participant.
    `habits`: of participants in virtual time; None: time is real. `initial`: the model to begin with; empty: the
    task's own."""

    config: Config
    definition: Definition
    shares: Shares
    broker: Broker
    store: Store | None
    attacks: Mapping[str, str]
    habits: Habits | None = None
    initial: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timing:
    """The clocks of a run in one process, what else differs with them, and how participants share the time."""

    clock: Callable[[], float] = time.time  # Unix seconds
    stopwatch: Callable[[], float] = time.monotonic
    behind_s: float = BEHIND_S
    name: Callable[[], str] = own_name


def plan_simulation(config: Config) -> Plan:
    """Loads the task and shares out its data. Raises FluffleError for what cannot work."""
    make_strategy(config.run_settings().combining, config.round)
    check_training(config.strategy.name, config.train.chosen(), config.round)
    definition = find_task(config.task)
    check_metrics(config, definition)
    check_strategy(config, definition)
    _ranks(config)
    store = keepers_store(config.store)
    if store is None and config.broker.url == "memory":
        store = OwnMemory()
    shares = shares_of(config, definition)
    definition.check(config.train.chosen(), shares.train.x.shape[1:])
    definition.bind()  # reads a large base model while nothing waits
    initial = initial_model(config, definition)
    habits = habits_of(config, [shard.name for shard in shares.shards])
    config = _in_step(config, habits) if habits else config
    return Plan(config, definition, shares, _broker(config), store, attacks_of(config, shares), habits, initial)


def _in_step(config: Config, habits: Habits) -> Config:
    """Liveness is in proportion to heartbeats."""
    beat_s = habits.heartbeat_s(config.broker.heartbeat_s)
    liveness_s = config.broker.liveness_s * beat_s / config.broker.heartbeat_s
    broker = config.broker.model_copy(update={"heartbeat_s": beat_s, "liveness_s": liveness_s})
    return config.model_copy(update={"broker": broker})


def attacks_of(config: Config, shares: Shares) -> dict[str, str]:
    """What each participant sends instead of what it learned, or "". The bad ones are the first of an order that
    the seed gives, so more attackers are the same ones and some others. Raises ConfigError if they are too many."""
    names = [shard.name for shard in shares.shards]
    if config.study.attack and config.study.attackers > len(names):
        raise ConfigError(
            f"study.attackers = {config.study.attackers} is above the {len(names)} participants: lower it"
        )
    order = np.random.default_rng([config.run.seed, ATTACKER_DRAWS]).permutation(names)
    bad = set(order[: config.study.attackers])
    return {name: config.study.attack if name in bad else "" for name in names}


def _broker(config: Config) -> Broker:
    if config.broker.url == "memory":
        access = Topology(config.broker.federation).access
        return MemoryBroker(access, _seeded(config)) if config.simulation.virtual_time else MemoryBroker(access)
    check_credentials(config)
    return rabbit_broker(config.broker)


def _seeded(config: Config) -> Callable[[int], str]:
    """What makes texts of so many random bytes, by the seed: they become part of records."""
    random = Random(config.run.seed)  # noqa: S311 - nobody must not guess them
    return lambda count: random.randbytes(count).hex()


def run_simulation(plan: Plan, display: Display, *, abandon: str = "") -> Outcome:
    """Runs to the end, or goes on from the broker's record or the checkpoints in the run directory."""
    with asyncio.Runner(loop_factory=VirtualLoop if plan.habits else None) as runner:
        return runner.run(_run(plan, display, abandon))


async def _run(plan: Plan, display: Display, abandon: str) -> Outcome:
    use_threads()
    display.on_notice("data_shared_out", **_holdings(plan.shares))
    if bad := [name for name, attack in plan.attacks.items() if attack]:
        display.on_notice("attackers_drawn", attack=plan.config.study.attack, participants=" ".join(bad))
    began = time.monotonic()
    try:
        if plan.config.broker.url == "memory":
            record, virtual_s = await _in_one_process(plan, display)
        else:
            record, virtual_s = await _in_processes(plan, display, abandon), None
    except ExceptionGroup as failures:
        raise first_known(failures) or failures from failures
    return Outcome(record, time.monotonic() - began, virtual_s)


async def _in_one_process(plan: Plan, display: Display) -> tuple[HeadRecord, float | None]:
    """All participants share one training thread with one torch thread, so that equal seeds give equal bits.
    Returns the seconds of virtual time, too."""
    await _set_up(plan.broker, Topology(plan.config.broker.federation))
    timing = await _timing(plan, display)
    thread = Lane("train", AtOnce("train") if plan.habits else None)
    try:
        task_for = await _learning_tasks(plan, display, thread)
        async with asyncio.TaskGroup() as group:
            participants = [
                _participant(plan, timing, _site(plan, name, attacking(task_for(name), attack), thread))
                for name, attack in plan.attacks.items()
            ]
            tasks = [group.create_task(each.run(), name=each.participant) for each in participants]
            watch = group.create_task(_nobody_is_left(tasks))
            record = await _aggregator(plan, display, timing).run()
            virtual_s = timing.clock() - record.started if plan.habits else None
            watch.cancel()
            for each in participants:
                each.stop()
    finally:
        await asyncio.to_thread(thread.shutdown)
    return record, virtual_s


async def _nobody_is_left(participants: Sequence[asyncio.Task[None]]) -> NoReturn:
    """They only end by themselves if they are never there again."""
    await asyncio.wait(participants)
    raise TaskError("nobody is ever there again, and the run is not finished: let windows in the trace end later")


async def _timing(plan: Plan, display: Display) -> Timing:
    """The clocks of this run. A virtual one begins at 0, or where the run to go on with had come to."""
    if plan.habits is None:
        return Timing()
    broker, loop = plan.config.broker, asyncio.get_running_loop()
    begun_s = await asyncio.to_thread(_begun_s, plan.config.run_dir)
    display.on_notice(
        "time_made_virtual", from_s=begun_s, heartbeat_s=broker.heartbeat_s, liveness_s=broker.liveness_s
    )
    return Timing(
        clock=lambda: begun_s + loop.time(),
        stopwatch=loop.time,
        behind_s=max(BEHIND_S, VIRTUAL_BEHIND * plan.habits.delay.median_s),
        name=lambda: "simulated",
    )


def _begun_s(directory: Path) -> float:
    """When the newest checkpoint was committed, as far as it tells."""
    saved = Checkpoints(directory / "checkpoints").newest()
    if saved is None:
        return 0.0
    opened = saved.open.opened if saved.open else 0.0
    closed = saved.closed.closed if saved.closed else 0.0
    return max(saved.started, opened, closed)


async def _in_processes(plan: Plan, display: Display, abandon: str) -> HeadRecord:
    if plan.config.simulation.vectorise:
        display.on_notice("trained_one_by_one", reason="over RabbitMQ every participant is a process of its own")
    async with crowd(plan.config, plan.attacks):
        return await _aggregator(plan, display, Timing(behind_s=0.0), abandon).run()


async def _set_up(broker: Broker, topology: Topology) -> None:
    """Lets workers find the federation before an aggregator leads it."""
    connection = await broker.connect(AGGREGATOR, purpose="set up")
    await connection.declare(*topology.aggregator_declarations())
    await connection.close()


async def _learning_tasks(plan: Plan, display: Display, thread: Lane) -> Callable[[str], TaskFor]:
    """How each participant finds its learning task: its own, or one that trains together with the others'."""
    tasks = await thread.run(lambda: {shard.name: _bound(plan, shard) for shard in plan.shares.shards})
    if plan.config.simulation.vectorise:
        try:
            together = await thread.run(partial(_together, plan.config, plan.definition, tasks))
            display.on_notice("trained_together", participants=len(tasks), largest_group=together.largest_group)
            return lambda participant: partial(together.task_for, participant)
        except Unstackable as unfit:
            display.on_notice("trained_one_by_one", reason=str(unfit))
    return lambda participant: always(tasks[participant])


def _together(config: Config, definition: Definition, tasks: Mapping[str, BoundTask]) -> Together:
    own = {name: task for name, task in tasks.items() if isinstance(task, TorchTask)}
    if not isinstance(definition, TaskDefinition) or len(own) < len(tasks):
        raise Unstackable("the task does not train with torch")
    if make_strategy(config.run_settings().combining, config.round).wants != "delta":
        raise Unstackable(f"strategy {config.strategy.name!r} wants more, or other, than trained models")
    if config.round.is_buffered:
        raise Unstackable("round.policy = 'buffered': whoever is done goes on alone")
    if config.study.attack == LABEL_FLIP:
        raise Unstackable("some participants train on flipped labels")
    if config.study.lora_ranks:
        raise Unstackable("participants have adapters of their own rank (study.lora_ranks)")
    if config.personal.local or config.personal.ditto or config.strategy.fragments > 1:
        names = "personal.local, personal.ditto, strategy.fragments"
        raise Unstackable(f"participants have tensors or models of their own ({names})")
    asked = min(config.round.cohort or len(tasks), len(tasks))
    return Together(own, definition.recipe(config.train.chosen()), asked)


def _site(plan: Plan, name: str, task_for: TaskFor, thread: Lane) -> Site:
    return Site(name, task_for, MemoryJournal(), thread, plan.store, _rank(plan, name))


def _rank(plan: Plan, participant: str) -> int:
    """Of its adapters, 0: the model's."""
    ranks, names = _ranks(plan.config), [shard.name for shard in plan.shares.shards]
    return ranks[names.index(participant) % len(ranks)]


def _ranks(config: Config) -> list[int]:
    """Those that participants have in turns. Raises ConfigError."""
    words = [word.strip() for word in config.study.lora_ranks.split(",")] if config.study.lora_ranks else ["0"]
    if bad := [word for word in words if not word.isdecimal() or len(word) > 5]:
        raise ConfigError(f"study.lora_ranks: {bad[0]!r} is no rank: write whole numbers, as 4,8,16")
    if config.study.lora_ranks and config.broker.url != "memory":
        raise ConfigError(
            "study.lora_ranks is for the embedded broker: elsewhere each worker has its site.lora_rank"
        )
    return [int(word) for word in words]


def _bound(plan: Plan, shard: Shard) -> BoundTask:
    held_out = shard.held_out if len(shard.held_out) else None
    task = plan.definition.of_rank(_rank(plan, shard.name)).bind(shard.train, held_out, shard.name)
    log.info("data_prepared", participant=shard.name, **task.report.to_dict())
    return task


def _participant(plan: Plan, timing: Timing, site: Site) -> Worker | Presence:
    config = plan.config
    settings = WorkerSettings(
        heartbeat_s=config.broker.heartbeat_s,
        patience_s=config.broker.patience_s,
        sizes=Sizes(config.broker.inline_bytes, config.broker.chunk_bytes, config.store.part_bytes),
        clock=timing.clock,
        stopwatch=timing.stopwatch,
    )
    topology = Topology(config.broker.federation)
    if plan.habits is None:
        return Worker(site, plan.broker, topology, settings)

    def make(lag_s: Lag) -> Worker:
        return Worker(site, plan.broker, topology, replace(settings, lag_s=lag_s))

    return Presence(site.participant, plan.habits, make, timing.clock)


def _aggregator(plan: Plan, display: Display, timing: Timing, abandon: str = "") -> Aggregator:
    job = task_job(plan.config, plan.definition, plan.shares.held_out, plan.initial)
    job = replace(
        job, abandon=abandon, from_checkpoint=True
    )  # the command refuses a used directory unless it is to resume
    around = Surroundings(
        on_report=display.on_report, on_notice=partial(notice, display), store=plan.store,
        clock=timing.clock, behind_s=timing.behind_s, name=timing.name,
    )  # fmt: skip
    return Aggregator(job, plan.broker, plan.config.run_dir, around)


def _holdings(shares: Shares) -> dict[str, object]:
    sizes = [len(shard.train) for shard in shares.shards]
    return {
        "source": shares.train.source or shares.train.name,
        "participants": len(sizes),
        "examples": f"{min(sizes)} to {max(sizes)}",
        "held_out": len(shares.held_out),
    }
