"""An aggregator and workers as processes over a RabbitMQ of their own, measured from round to round.

The same for Fluffle and for the bare pump that it is compared with (`benchmarks/bare.py`): as many processes, as
many connections, under the same users.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from yarl import URL

from aggregator.checkpoints import Checkpoints
from aggregator.settings import (
    BrokerSettings,
    CodecSettings,
    EvaluationSettings,
    RoundSettings,
    RunSettings,
    StopSettings,
)
from benchmarks.measure import (
    Groups,
    Mark,
    anonymous_mb,
    between,
    forget_peaks,
    mark,
    node_pids,
    peak_mb,
    private_node,
)
from benchmarks.tasks import DRIFT, random_model, random_values
from broker import tensors
from broker.definitions import Enrolment, access_definitions, password_hash
from broker.durable import replace_file
from broker.mapped import draft
from broker.topology import Topology
from broker.wire import encode
from fluffle.chaos.node import Node
from fluffle.chaos.processes import LEADER, Deployment, Process
from workers.partition import participant_names

LONGEST_S = 600.0  # for a whole run
BARE = (sys.executable, "-m", "benchmarks.bare")
ROUND = "round_closed"
PLAIN = CodecSettings()


@dataclass(frozen=True, slots=True)
class Load:
    """What goes round: a model of so many floats, `rounds` times after a warm-up, between so many participants.

    `processes` is how many share the workers. `shapes` of tensors stand in for so many floats in so many tensors.
    `longest_s`: of a round. Without a warm-up the first round counts from when the run began.
    """

    participants: int
    floats: int
    tensors: int = 2
    rounds: int = 5
    warm_up: int = 1
    processes: int = 1
    task: str = DRIFT
    heartbeat_s: float = 30.0
    codec: CodecSettings = PLAIN
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    longest_s: float = LONGEST_S

    @property
    def names(self) -> list[str]:
        return participant_names(self.participants)

    @property
    def shares(self) -> list[str]:
        """What each process of workers is told whom it serves: a range of names."""
        names, size = self.names, -(-self.participants // self.processes)
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return [part[0] if len(part) == 1 else f"{part[0]}..{part[-1]}" for part in parts]

    @property
    def run(self) -> RunSettings:
        """Evaluates nothing and waits for everybody."""
        return RunSettings(
            run_id="bench",
            learning_task=self.task,
            round=RoundSettings(participants=self.participants, deadline_s=self.longest_s, max_examples=1024),
            stop=StopSettings(rounds=self.warm_up + self.rounds),
            evaluation=EvaluationSettings(mode="none"),
            codec=self.codec,
            broker=BrokerSettings(patience_s=60.0, heartbeat_s=self.heartbeat_s, liveness_s=10 * self.heartbeat_s),
        )

    def initial(self) -> tensors.Arrays:
        return random_model(self.floats, self.tensors)

    def write_initial(self, path: Path) -> int:
        """Writes the initial model as a file, one tensor after the other if they have shapes; returns its size."""
        if not self.shapes:
            return path.write_bytes(tensors.encode(self.initial()))
        blob = self.encoded(lambda number, out: random_values(number, out), path.parent)
        replace_file(path, blob, path.with_suffix(".new"), synced=False)
        return len(blob)

    def encoded(self, write: Callable[[int, NDArray[np.float32]], object], directory: Path) -> memoryview:
        """The file of tensors of these shapes, whose values `write(number, out)` gives, on the disk there."""
        like = {name: np.broadcast_to(np.float32(0), shape) for name, shape in self.shapes.items()}
        numbers = {name: number for number, name in enumerate(self.shapes)}
        return tensors.encode_each(like, lambda name, out: write(numbers[name], out), partial(draft, directory))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the messages of one run, so that the pump can send as many."""

    down: int
    up: int
    head: int
    body: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A round's cost, the most memory of each group, and what went round."""

    per_round: dict[str, Any]
    peak_mb: dict[str, float]
    sizes: Sizes
    anonymous_mb: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return float(self.per_round["seconds_per_round"])

    @property
    def cpu_s(self) -> float:
        return float(self.per_round["cpu_s_per_round"])

    @property
    def details(self) -> dict[str, Any]:
        found = self.per_round | {"peak_mb": self.peak_mb}
        return found | ({"anonymous_mb": self.anonymous_mb} if self.anonymous_mb else {})


def password(user: str) -> str:
    return f"secret of {user}"


@contextmanager
def rabbit(**loads: Load) -> Iterator[Node]:
    """A RabbitMQ with a federation for each load, named as the argument, and one of the same users for its pump."""
    enrolments = [
        Enrolment(Topology(name), tuple(load.names)) for key, load in loads.items() for name in (key, f"{key}-bare")
    ]
    users = {user for enrolment in enrolments for user in enrolment.users}
    with private_node(
        access_definitions(enrolments, {user: password_hash(password(user), b"salt") for user in users})
    ) as node:
        yield node


@contextmanager
def deployed(node: Node, federation: str) -> Iterator[Deployment]:
    url = URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/")
    with (
        tempfile.TemporaryDirectory(prefix="fluffle-bench-") as directory,
        Deployment(url, password, Topology(federation), Path(directory)) as deployment,
    ):
        deployment.set_up()
        yield deployment


@dataclass(frozen=True, slots=True)
class Beside:
    """A claim-check store beside the broker: its address for the aggregator and for workers, what they need in
    their environment to reach it, and who serves it."""

    aggregator: str = ""
    workers: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    pids: Groups = field(default_factory=dict)


THROUGH_BROKER = Beside()


def run_fluffle(
    node: Node, federation: str, load: Load, *options: str, beside: Beside = THROUGH_BROKER
) -> Measured:
    """One run. `options` go to the aggregator and the workers alike."""
    with deployed(node, federation) as deployment:
        initial = deployment.directory / "initial.safetensors"
        body = load.write_initial(initial)
        heartbeat = ("--set", f"broker.heartbeat_s={load.heartbeat_s}", "--log-level", "warning")
        at = (*heartbeat, "--set", f"store.url={beside.workers}", *options)
        workers = [deployment.worker(share, *at, task=load.task, **beside.environment) for share in load.shares]
        begin = ("--set", f"run.initial={initial}", "--set", f"store.url={beside.aggregator}", "--http", "")
        leader = deployment.aggregator(load.run, *begin, *options, **beside.environment)
        with anonymous_mb({"aggregator": [leader.pid], "workers": [one.pid for one in workers]}) as anonymous:
            per_round, peaks = follow(node, load, leader, workers, beside.pids)
            result = leader.result(load.longest_s)
        peaks["aggregator"] = result["aggregator_peak_rss_mb"] * (1 << 20) / 1e6
        for worker in workers:
            worker.stop()
        assert result["updates"]["accepted"] == load.participants * load.run.stop.rounds, "every update counted"
        return Measured(per_round, peaks, sizes_of(leader, load, body, result), anonymous, result)


def run_bare(node: Node, federation: str, load: Load, sizes: Sizes) -> Measured:
    """The same messages by the bare pump, in as many processes."""
    with deployed(node, f"{federation}-bare") as deployment:
        chunk_bytes = load.run.broker.chunk_bytes
        numbers = map(str, (chunk_bytes, sizes.down, sizes.up, sizes.head, sizes.body))
        about = (str(deployment.url), deployment.topology.federation, *numbers)

        def start(name: str, role: str, whom: str, *options: str) -> Process:
            return deployment.start(Process(name, (role, *about, whom, *options), deployment, program=BARE))

        everybody = f"{load.names[0]}..{load.names[-1]}"
        assert start("declare", "declare", everybody).exit_code() == 0
        workers = [start(f"workers {share}", "workers", share) for share in load.shares]
        for worker in workers:
            worker.wait_for("ready")
        leader = start(LEADER, "aggregator", everybody, "--rounds", str(load.run.stop.rounds))
        per_round, peaks = follow(node, load, leader, workers)
        peaks["aggregator"] = leader.wait_for("done").fields["peak_mb"]
        assert leader.exit_code() == 0
        return Measured(per_round, peaks, sizes)


def follow(
    node: Node, load: Load, leader: Process, workers: Sequence[Process], others: Groups = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, float]]:
    """What the rounds after the warm-up cost, of `others` too, and the most memory of workers and broker."""
    pids: dict[str, Iterable[int]] = {
        "aggregator": [leader.pid], "workers": [one.pid for one in workers], "rabbitmq": node_pids(node), **others,
    }  # fmt: skip
    forget_peaks(*pids["rabbitmq"])
    marks: list[Mark] = []
    for number in (load.warm_up, load.warm_up + load.rounds):
        if number:
            leader.wait_for(ROUND, round=number, within_s=load.longest_s)
        else:
            leader.wait_for("run_began", within_s=load.longest_s)
        marks.append(mark(pids))
    return between(*marks, load.rounds), {name: peak_mb(*pids[name]) for name in ("workers", "rabbitmq")}


def sizes_of(leader: Process, load: Load, body: int, result: dict[str, Any]) -> Sizes:
    """What the messages of a run had on average, beside the bodies that went in chunks."""
    messages = load.participants * load.run.stop.rounds
    chunked = body > load.run.broker.inline_bytes
    record = Checkpoints(leader.run_dir / "checkpoints").newest()
    assert record is not None, "the aggregator kept its checkpoints"
    head = len(encode(record)) + (0 if chunked else body)
    up, down = (result["bytes"][way] - chunked * messages * body for way in ("up", "down"))
    return Sizes(down=down // messages, up=up // messages, head=head, body=body * chunked)
