"""A federation of real processes goes through a plan of faults, to the end of its run."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from yarl import URL

from aggregator.settings import (
    BrokerSettings,
    CodecSettings,
    EvaluationSettings,
    RoundSettings,
    RunSettings,
    StopSettings,
)
from broker.definitions import SALT_BYTES, Enrolment, definitions, password_hash
from broker.errors import StateError
from broker.topology import Topology
from fluffle.chaos import audit
from fluffle.chaos.copies import Copies
from fluffle.chaos.node import Node
from fluffle.chaos.plan import HELD_ROUNDS, Fault, Shape
from fluffle.chaos.processes import LEADER, Deployment, Process
from fluffle.chaos.progress import Closing, Progress
from fluffle.chaos.proxy import proxies
from fluffle.chaos.quiet import undisturbed_sha256
from fluffle.chaos.strikes import STANDBY, Strike, World, restart, strike
from fluffle.chaos.task import LARGE_TASK, TASK, Gate, Pace

STALLED_S = 180.0  # without a closed round: something hangs
AT_ONCE = 64  # strikes, most of which wait for something
TRAINS_S, QUORUM_TRAINS_S = 0.1, 1.0
AMQP_PORT = 5672
LONG_S = 3600.0
CODED = CodecSettings(up="topk:0.05+zstd", down="int8+zstd")
IN_CHUNKS = {"inline_bytes": 1024, "chunk_bytes": 16 << 10}


@dataclass(frozen=True)
class Address:
    """A broker: where it is, and the password of each user."""

    url: URL
    password: Callable[[str], str]


@dataclass(frozen=True)
class Scenario:
    """What is run and struck. `broker` None: a private RabbitMQ."""

    seed: int
    shape: Shape
    run_id: str = "chaos"
    federation: str = "chaos"
    broker: Address | None = None
    stalled_s: float = STALLED_S
    coded: bool = False  # updates are encoded and owe something, models go as rounded differences
    asynchronous: bool = False  # rounds are buffered: no two runs make the same versions, as with a quorum
    training_s: float | None = None  # None: long enough for a round to be something that can be struck

    @property
    def trains_s(self) -> float:
        usual = QUORUM_TRAINS_S if self.shape.quorum else TRAINS_S
        return usual if self.training_s is None else self.training_s

    @property
    def run(self) -> RunSettings:
        sizes = IN_CHUNKS if self.shape.large else {}
        return RunSettings(
            run_id=self.run_id,
            federation=self.federation,
            seed=self.seed,
            learning_task=LARGE_TASK if self.shape.large else TASK,
            stop=StopSettings(rounds=self.shape.rounds),
            evaluation=EvaluationSettings(mode="none"),
            round=self._round(),
            codec=CODED if self.coded else CodecSettings(),
            broker=BrokerSettings(heartbeat_s=2.0, patience_s=20.0, liveness_s=self._liveness_s, **sizes),
        )

    @property
    def _liveness_s(self) -> float:
        """For equal digests everybody is asked in every round, also who was frozen for a long time."""
        return 6.0 if self.shape.quorum else LONG_S

    def _round(self) -> RoundSettings:
        count = len(self.shape.participants)
        if self.asynchronous:
            return RoundSettings(
                participants=count, policy="buffered", buffer=count, deadline_s=3.0, deadline_max_s=10.0
            )
        if not self.shape.quorum:
            return RoundSettings(participants=count, deadline_s=120.0, deadline_max_s=120.0)
        return RoundSettings(
            participants=count, quorum=max(1, count - 1), deadline_s=3.0, deadline_max_s=10.0, late="fold"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run through faults came to."""

    strikes: list[Strike]
    closings: list[Closing]
    models: dict[str, str]  # the digest that each aggregator ended with
    undisturbed_sha256: str
    balance: audit.Balance
    ended: list[tuple[str, int]]  # processes that ended by themselves, and how
    seconds: float


def perform(
    scenario: Scenario,
    plan: Sequence[Fault],
    directory: Path,
    on_round: Callable[[int], None],
    watch: Callable[[World], None] = lambda _: None,
) -> Outcome:
    """First undisturbed, then through the faults. Raises StateError if the run does not get to its end.

    `watch` looks on in a thread of its own; the last rounds wait until it returns.
    """
    run = scenario.run
    undisturbed = undisturbed_sha256(run, scenario.shape.participants, directory / "undisturbed")
    with (
        Gate(directory / "first gate") as first,
        Gate(directory / "last gate") as last,
        _world(scenario, directory, on_round) as world,
    ):
        began = time.monotonic()
        _start(scenario, world, (first, last))
        watching = world.do(watch)
        first.open()
        strikes = _struck(world, plan, watching, scenario.stalled_s)
        last.open()
        models = {name: _model_of(world.process(name), scenario.stalled_s) for name in (LEADER, STANDBY)}
        asyncio.run(world.copies.forget_orders())  # the broker may not be ours
        return Outcome(
            strikes=strikes,
            closings=world.progress.closings,
            models=models,
            undisturbed_sha256=undisturbed,
            balance=_balance(world.federation, run),
            ended=world.ended,
            seconds=time.monotonic() - began,
        )


# -- before the faults ------------------------------------------------------------------------------------------


@contextmanager
def _world(scenario: Scenario, directory: Path, on_round: Callable[[int], None]) -> Iterator[World]:
    """Broker, proxies and an empty federation. When the block ends nothing of it runs any more."""
    participants, topology = scenario.shape.participants, Topology(scenario.federation)
    progress = Progress(on_round)
    with ExitStack() as stack:
        node = None if scenario.broker else stack.enter_context(_private_node(topology, participants))
        at = scenario.broker or _address(node)
        names = (LEADER, STANDBY, *participants)
        between = stack.enter_context(proxies(names, at.url.port or AMQP_PORT, at.url.host or "127.0.0.1"))
        federation = Deployment(at.url, at.password, topology, directory, between.ports, progress.hear)
        stack.enter_context(federation)
        pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        run_dirs = [directory / f"run of {name}" for name in (LEADER, STANDBY)]
        copies = Copies(federation.broker(), topology, participants, run_dirs, scenario.shape.large)
        world = World(federation, between, progress, node, pool, copies, scenario.run_id)
        progress.on_end = lambda process: world.do(restart, process)
        stack.callback(world.end)
        yield world


@contextmanager
def _private_node(topology: Topology, participants: Sequence[str]) -> Iterator[Node]:
    enrolment = Enrolment(topology, tuple(participants))
    hashes = {user: password_hash(private_password(user), b"salt"[:SALT_BYTES]) for user in enrolment.users}
    node = Node.create(Path(tempfile.mkdtemp(prefix="fluffle-rabbit-")), definitions([enrolment], hashes))
    try:
        node.start()
        yield node
    finally:
        node.end()


def private_password(user: str) -> str:
    """Of a broker on loopback that lives for minutes."""
    return f"secret of {user}"


def _address(node: Node | None) -> Address:
    assert node
    return Address(URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/"), private_password)


def _start(scenario: Scenario, world: World, gates: tuple[Gate, Gate]) -> None:
    """Everybody. The first round waits for the first gate, the last rounds for the other."""
    federation, run = world.federation, scenario.run
    federation.set_up()
    asyncio.run(world.copies.keep_orders())
    for name in (LEADER, STANDBY):
        federation.aggregator(run, "--set", "http.listen=", name=name).wait_for("standing_by")
    pace = Pace(scenario.trains_s, str(gates[1].path), run.stop.rounds - HELD_ROUNDS + 1, str(gates[0].path))
    settings = ("heartbeat_s", "patience_s", "inline_bytes", "chunk_bytes")
    options = [word for name in settings for word in ("--set", f"broker.{name}={getattr(run.broker, name)}")]
    for participant in scenario.shape.participants:
        federation.worker(participant, *options, pace=pace, task=run.learning_task)
    for participant in scenario.shape.participants:
        world.process(participant).wait_for("work_begun")
    if world.node:
        world.node.settle()  # everything that the run needs is declared now


# -- faults, and after them -------------------------------------------------------------------------------------


def _struck(world: World, plan: Sequence[Fault], watching: Future[None], stalled_s: float) -> list[Strike]:
    """Strikes as the rounds proceed; returns when everything is mended and whoever looks on has seen enough.

    Raises StateError if nothing goes on.
    """
    progress = world.progress
    try:
        strikes: list[Future[Strike]] = []
        for fault in plan:
            while progress.closed < fault.after_round:
                progress.wait_beyond(progress.closed, stalled_s)
            strikes.append(world.do(strike, fault))
        watching.result()  # which is told as well if nothing goes on
        return [struck.result(stalled_s) for struck in strikes]
    except (StateError, TimeoutError) as error:
        world.federation.fail(str(error) or f"a fault was not mended within {stalled_s:g} s")


def _model_of(process: Process, within_s: float) -> str:
    return str(process.result(within_s)["model_sha256"])


def _balance(federation: Deployment, run: RunSettings) -> audit.Balance:
    published = asyncio.run(audit.published(federation.broker(), federation.topology, run.run_id))
    end = audit.read_to([federation.processes[name].run_dir for name in (LEADER, STANDBY)])
    lost = [event.fields for event in federation.logged("updates_stream_lost_its_tail")]
    losses = [audit.Loss(fields["epoch"], fields["read_again_from"]) for fields in lost]
    return audit.balance(published, federation.decisions(run), end, losses)
