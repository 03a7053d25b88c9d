"""How each fault is done, and mended: one context manager a kind. Each strike runs in a thread of its own."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

import structlog

from broker.errors import StateError
from fluffle.chaos import plan
from fluffle.chaos.copies import Copies, Copy
from fluffle.chaos.node import Node
from fluffle.chaos.plan import Fault, Kind
from fluffle.chaos.processes import LEADER, Deployment, Process
from fluffle.chaos.progress import Progress
from fluffle.chaos.proxy import Proxies

STANDS_BY_S = 20.0  # unless something else is struck, too
STANDBY = "standby"  # the process; as in `plan`, but there it is the role

Result = TypeVar("Result")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that struck: whom, and from when to when, as `time.monotonic` has it."""

    fault: Fault
    name: str
    struck: float
    mended: float


@dataclass
class World:
    """Everything that can be struck. `over` ends every pause: the run is, too."""

    federation: Deployment
    proxies: Proxies
    progress: Progress
    node: Node | None
    pool: ThreadPoolExecutor
    copies: Copies
    run_id: str
    over: threading.Event = field(default_factory=threading.Event)
    disks_full: set[str] = field(default_factory=set)  # whose disk ever was: they may end by themselves
    ended: list[tuple[str, int]] = field(default_factory=list)  # who did, and with which exit code
    lost: list[Copy] = field(default_factory=list)  # what lay in a stream just before it lost its tail
    _locks: dict[tuple[str, str], threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def do(self, work: Callable[..., Result], *arguments: object) -> Future[Result]:
        """In a thread of its own. If it fails, whoever waits for progress is told."""
        future = self.pool.submit(work, self, *arguments)
        future.add_done_callback(self._tell)
        return future

    def end(self) -> None:
        """Nothing that ends from now on is started again."""
        self.progress.on_end = None
        self.over.set()

    def _tell(self, done: Future[Result]) -> None:
        if trouble := done.exception():
            self.progress.fail(trouble)

    def name_of(self, whom: str) -> str:
        """Leader and standby are roles; the name is that of a process."""
        leader = self.progress.leader
        return {plan.LEADER: leader, plan.STANDBY: STANDBY if leader == LEADER else LEADER}.get(whom, whom)

    def process(self, name: str) -> Process:
        return self.federation.processes[name]

    def lock(self, kind: Kind, name: str) -> threading.Lock:
        """Faults of a process, of its network and of the broker overlap; two of the same do not."""
        return self._locks["network" if kind in NETWORK else "process", name]


def strike(world: World, fault: Fault) -> Strike:
    """One fault from its strike until it is mended."""
    world.over.wait(fault.delay_s)
    name = world.name_of(fault.whom)
    with world.lock(fault.kind, name), HURTS[fault.kind](world, name, fault):
        struck = time.monotonic()
        log.info("fault_struck", kind=fault.kind, process=name, lasts_s=fault.lasts_s, round=world.progress.closed)
        world.over.wait(fault.lasts_s)
    return Strike(fault, name, struck, time.monotonic())


def restart(world: World, process: Process) -> None:
    """What a supervisor does with a process that ended by itself. Raises StateError if nothing was done to it."""
    with world.lock("kill", process.name):
        code = process.code
        if process.killed or not code:
            return
        world.ended.append((process.name, code))
        if process.name not in world.disks_full:
            raise StateError(f"{process.name} ended by itself with exit code {code}")
        log.info("process_started_again", process=process.name, code=code)
        process.start()


# -- kinds of faults --------------------------------------------------------------------------------------------


@contextmanager
def killed(world: World, name: str, _: Fault) -> Iterator[None]:
    process = world.process(name)
    process.kill()
    try:
        yield
    finally:
        if not world.over.is_set():
            process.start()


@contextmanager
def clock_wrong(world: World, name: str, fault: Fault) -> Iterator[None]:
    """The process is started again with a wall clock that is off, later with the right one. An aggregator leads."""
    process = world.process(name)
    _restarted(world, process, fault.clock_off_s)
    if fault.whom == plan.STANDBY:
        _hand_lead_to(world, process)
    try:
        yield
    finally:
        _restarted(world, process, 0)


def _restarted(world: World, process: Process, clock_off_s: int) -> None:
    process.kill()
    process.clock_off_s = clock_off_s
    if not world.over.is_set():
        process.start()


def _hand_lead_to(world: World, process: Process) -> None:
    """Cuts off whoever leads, once this one stands by: RabbitMQ has no other choice then."""
    process.log.wait_for("standing_by", {}, time.monotonic() + STANDS_BY_S)
    leader = world.progress.leader
    if leader != process.name:
        with world.lock("cut", leader):
            world.proxies.tell(leader, lambda proxy: proxy.cut())
    process.log.wait_for("leading", {}, time.monotonic() + STANDS_BY_S)


@contextmanager
def frozen(world: World, name: str, _: Fault) -> Iterator[None]:
    process = world.process(name)
    process.freeze()
    try:
        yield
    finally:
        process.thaw()


@contextmanager
def disk_full(world: World, name: str, _: Fault) -> Iterator[None]:
    """Not a full disk: the kernel refuses to let this process write into any file. It looks the same to it."""
    world.disks_full.add(name)
    pid = world.process(name).pid
    _let_write(pid, may=False)
    try:
        yield
    finally:
        _let_write(pid, may=True)


def _let_write(pid: int, *, may: bool) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself, and will be started again
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if may else 0, hard))


@contextmanager
def cut(world: World, name: str, _: Fault) -> Iterator[None]:
    world.proxies.tell(name, lambda proxy: proxy.cut())
    yield


@contextmanager
def stalled(world: World, name: str, _: Fault) -> Iterator[None]:
    world.proxies.tell(name, lambda proxy: proxy.freeze())
    try:
        yield
    finally:
        world.proxies.tell(name, lambda proxy: proxy.thaw())


@contextmanager
def slowed(world: World, name: str, fault: Fault) -> Iterator[None]:
    world.proxies.tell(name, lambda proxy: proxy.slow(1000.0 * fault.kb_per_s))
    try:
        yield
    finally:
        world.proxies.tell(name, lambda proxy: proxy.slow(0.0))


@contextmanager
def half_closed(world: World, name: str, fault: Fault) -> Iterator[None]:
    world.proxies.tell(name, lambda proxy: proxy.close_way("up" if fault.kind == "half_up" else "down"))
    yield


@contextmanager
def broker_killed(world: World, _: str, __: Fault) -> Iterator[None]:
    assert world.node
    world.node.kill()
    try:
        yield
    finally:
        if not world.over.is_set():
            world.node.start()


@contextmanager
def tail_lost(world: World, _: str, fault: Fault) -> Iterator[None]:
    """The broker's machine loses power: of these streams, nothing that came in its last seconds is there again."""
    assert world.node
    files = world.node.copy_streams(_streams(world, fault.stream))
    world.over.wait(fault.loses_s)
    world.lost += asyncio.run(world.copies.of_updates())
    world.node.kill()
    world.node.put_back(files)
    try:
        yield
    finally:
        if not world.over.is_set():
            world.node.start()


@contextmanager
def repeated(world: World, _: str, fault: Fault) -> Iterator[None]:
    """Copies of messages arrive, late and in another order; also of such that the broker lost."""
    dice = Random(f"{fault}")  # noqa: S311 - a plan that can be repeated
    asyncio.run(world.copies.repeat(fault.repeats, world.lost, dice))
    yield


def _streams(world: World, which: str) -> list[str]:
    topology, participants = world.federation.topology, world.copies.participants
    names = {
        plan.UPDATES: topology.updates,
        plan.MODEL: topology.model(world.run_id),
        **{plan.OUTBOX + name: topology.outbox(name) for name in participants},
    }
    return list(names.values()) if which == plan.ALL else [names[which]]


@contextmanager
def broker_short_of_memory(world: World, _: str, __: Fault) -> Iterator[None]:
    assert world.node
    with world.node.short_of_memory():
        yield


Hurt = Callable[[World, str, Fault], AbstractContextManager[None]]
HURTS: dict[Kind, Hurt] = {
    "kill": killed, "asleep": killed, "freeze": frozen, "freeze_long": frozen, "disk_full": disk_full, "cut": cut,
    "stall": stalled, "slow": slowed, "half_up": half_closed, "half_down": half_closed,
    "wrong_clock": clock_wrong, "broker_kill": broker_killed, "memory_alarm": broker_short_of_memory,
    "lost_tail": tail_lost, "repeat": repeated,
}  # fmt: skip
NETWORK = ("cut", "stall", "slow", "half_up", "half_down")
