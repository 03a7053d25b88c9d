"""Thousands of rounds with faults: does anything grow that should not?

    python -m benchmarks.soak
    python -m benchmarks.soak --rounds 200 --faults 6 --json /tmp/small.json

`fluffle chaos`, for long: RabbitMQ, leader, standby and four workers as processes, and faults planned from a seed.
A model of 80 kB goes in chunks, so that streams reach their limits and drop what is old. Faults come in storms, at
the beginning of each of three phases, and quiet rounds follow, so that every process has lives that are long enough
for a slope. Every few rounds it is noted what everybody holds: memory, file descriptors and threads of every
process, messages in queues and streams, files. `limits` says what is still flat, `benchmarks/flat.py` judges.

The exit code is 0 if nothing grew, the ledger balances and the model is the undisturbed run's.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import probe
from benchmarks.flat import BROKER, Life, Limits, Sample, faults_found, largest, last, lives, slope, summary
from benchmarks.measure import RESULTS, about
from benchmarks.probe import Usage
from broker.topology import AGGREGATOR, Topology
from broker.transport import Stream
from fluffle.chaos.plan import HELD_ROUNDS, Fault, Shape, draw
from fluffle.chaos.processes import LEADER
from fluffle.chaos.report import build_report
from fluffle.chaos.scenario import STALLED_S, Outcome, Scenario, perform
from fluffle.chaos.strikes import STANDBY, World
from fluffle.chaos.task import LARGE
from fluffle.display import progress_bar
from fluffle.logs import configure_logs
from workers.partition import participant_names

RUN = "soak"
TRAINING_S = 0.02
MODEL_BYTES = 4 * LARGE
STORM_SHARE = 5  # a storm takes one part in five of its phase
INSIDE_EVERY = 20  # samples: RabbitMQ takes seconds to tell
RABBIT_FOLDERS = ("quorum", "coordination", "msg_stores")


@dataclass(frozen=True)
class Plan:
    """How long, and what strikes."""

    rounds: int = 2000
    faults: int = 60
    seed: int = 1
    phases: int = 3
    every: int = 5  # rounds between samples

    @property
    def command(self) -> str:
        options = ("rounds", "faults", "seed", "phases")
        return " ".join(["python -m benchmarks.soak", *(f"--{name} {getattr(self, name)}" for name in options)])

    @property
    def shape(self) -> Shape:
        return Shape(tuple(participant_names(4)), self.faults, run_rounds=self.rounds)

    @property
    def scenario(self) -> Scenario:
        return Scenario(self.seed, self.shape, RUN, RUN, large=True, training_s=TRAINING_S)

    @property
    def strikes(self) -> list[Fault]:
        return in_storms(draw(self.seed, self.shape), self.rounds, self.phases)


def in_storms(drawn: Sequence[Fault], rounds: int, phases: int) -> list[Fault]:
    """The faults of each phase, in the same order, moved into its beginning. What follows is quiet."""
    length = rounds // phases

    def moved(fault: Fault) -> Fault:
        phase = min(fault.after_round // length, phases - 1)
        within = fault.after_round - phase * length
        return replace(fault, after_round=max(1, phase * length + within // STORM_SHARE))

    return [moved(fault) for fault in drawn]


def limits(topology: Topology, participants: Sequence[str]) -> Limits:
    """Queues: the head record and the one before; the newest order; what broken uploads were refused for.

    Streams: what they were declared with, and a segment that is being written, and its index. Files: three
    checkpoints and the best one of 80 kB with manifests; journals with an order and an update. RabbitMQ's own logs:
    32,768 messages (classic queues) and 64 MB (quorum queues).
    """
    declared = [
        *topology.aggregator_declarations(), *topology.model_declarations(RUN, MODEL_BYTES),
        *(one for name in participants for one in topology.outbox_declarations(name, MODEL_BYTES)),
    ]  # fmt: skip
    streams = {s.name.replace(".", "_"): s for s in declared if isinstance(s, Stream)}
    room = {name: 1.1 * (s.max_bytes + 2 * s.segment_bytes) / probe.MIB for name, s in streams.items()}
    queues = {topology.head: 4, topology.rejected: 100} | {topology.inbox(name): 1 for name in participants}
    files = {"run of leader": 2.0, "run of standby": 2.0, "journals": 2.0}
    rabbit = {"quorum": 64.0, "coordination": 64.0, "msg_stores": 64.0}
    return Limits(messages=queues, disk_mb={**room, **files, **rabbit})


@dataclass
class Watch:
    """Takes a sample every few rounds, until the last rounds, which wait for it."""

    plan: Plan
    began: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def __call__(self, world: World) -> None:
        for number in range(self.plan.every, self.plan.rounds - HELD_ROUNDS, self.plan.every):
            closed = world.progress.wait_beyond(number - 1, STALLED_S)
            if closed < number + self.plan.every:  # else the next one is due
                self.samples.append(self._sample(world, closed))

    def _sample(self, world: World, closed: int) -> Sample:
        assert world.node
        topology = world.federation.topology
        address = world.federation.url.with_user(AGGREGATOR).with_password(world.federation.password(AGGREGATOR))
        pids = {name: process.pid for name, process in world.federation.processes.items()}
        found = {name: probe.usage(pid) for name, pid in {**pids, BROKER: probe.beam(world.node)}.items()}
        return Sample(
            round=closed,
            at_s=round(time.monotonic() - self.began, 1),
            leader=world.progress.leader,
            processes={name: usage for name, usage in found.items() if usage},
            messages=probe.messages(address, queues(topology, self.plan.shape.participants)),
            disk_mb=disk(world),
            inside=probe.inside(world.node) if len(self.samples) % INSIDE_EVERY == 0 else {},
        )


def queues(topology: Topology, participants: Sequence[str]) -> list[str]:
    of_each = (topology.inbox, topology.outbox)
    shared = [topology.head, topology.rejected, topology.updates, topology.model(RUN)]
    return shared + [name(participant) for participant in participants for name in of_each]


def disk(world: World) -> dict[str, float]:
    """MiB on disk. What grows by design has a name of its own: histories (a line for each update) and logs."""
    assert world.node
    directory = world.federation.directory
    run_dirs = [directory / f"run of {name}" for name in (LEADER, STANDBY)]
    history = {path.name: probe.disk_mb(*path.glob("history.sqlite*")) for path in run_dirs}
    return {
        **{path.name: round(probe.disk_mb(path) - history[path.name], 3) for path in run_dirs},
        "history": round(sum(history.values()), 3),
        "journals": probe.disk_mb(directory / "journals"),
        "logs": probe.disk_mb(*directory.glob("*.log")),
        **probe.streams_mb(world.node),
        **{name: probe.disk_mb(*world.node.directory.glob(f"mnesia/*/{name}")) for name in RABBIT_FOLDERS},
    }


# -- what it came to --------------------------------------------------------------------------------------------


def report(plan: Plan, outcome: Outcome, samples: Sequence[Sample]) -> dict[str, Any]:
    """The object that `--json` writes. `passed` is what the exit code says."""
    allowed = limits(Topology(RUN), plan.shape.participants)
    chaos, wrong, found = (
        build_report(plan.scenario, outcome),
        faults_found(samples, allowed),
        lives(samples, allowed),
    )
    kept = ("faults", "ended_by_themselves", "recovery_median_s", "recovery_max_s", "updates", "balanced", "same",
            "model_sha256", "seconds")  # fmt: skip
    disks, waiting = [sample.disk_mb for sample in samples], [sample.messages for sample in samples]
    return {
        **about("soak"),
        "command": plan.command,
        "passed": chaos["passed"] and not wrong,
        "not_flat": wrong,
        **asdict(plan),
        **{name: chaos[name] for name in kept},
        "limits": asdict(allowed),
        "memory_mb_per_1000_rounds": summary(found),
        "lives": [line(life) for life in found],
        "most_messages": largest(waiting),
        "most_disk_mb": largest(disks),
        "last_disk_mb": last(disks),
        "disk_mb_per_1000_rounds": disk_slopes(samples),
        "inside_rabbitmq": [{"round": sample.round, **sample.inside} for sample in samples if sample.inside],
        "waiting_and_files": [[s.round, s.messages, s.disk_mb] for s in samples[::INSIDE_EVERY]],
        "columns": ["round", "at_s", "leader", {name: list(Usage.__slots__) for name in samples[-1].processes}],
        "samples": [compact(sample) for sample in samples],
    }


def line(life: Life) -> dict[str, Any]:
    first, end = life.usages[0], life.usages[-1]
    return {
        "process": life.name, "role": life.role, "rounds": [life.began, life.rounds[-1]],
        "mb_per_1000_rounds": round(life.rss.value, 3), "error": round(life.rss.error, 3),
        "pss_mb_per_1000_rounds": round(life.pss.value, 3),
        "rss_mb": [first.rss_mb, end.rss_mb], "fds": [first.fds, end.fds], "more_fds": life.more("fds"),
        "threads": [first.threads, end.threads],
    }  # fmt: skip


def disk_slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Over the second half, when streams have reached their limits."""
    half = samples[len(samples) // 2 :]
    names = [name for name in half[0].disk_mb if all(name in sample.disk_mb for sample in half)]
    rounds = [sample.round for sample in half]
    return {name: round(slope(rounds, [sample.disk_mb[name] for sample in half]).value, 3) for name in names}


def compact(sample: Sample) -> list[Any]:
    of_each = {name: list(asdict(usage).values()) for name, usage in sample.processes.items()}
    return [sample.round, sample.at_s, sample.leader, of_each]


def text(told: dict[str, Any]) -> str:
    memory = [
        f"  {role:9} {m['lives']:2} lives: median {m['median']:+.2f}, largest {m['largest']:+.2f}, together "
        f"{m['together']:+.2f} ± {2 * m['together_error']:.2f} MB in 1,000 rounds"
        for role, m in told["memory_mb_per_1000_rounds"].items()
    ]
    lines = [
        f"{told['rounds']} rounds, {told['faults']['struck']} faults, {told['seconds']:.0f} s",
        f"ledger {'balanced' if told['balanced'] else 'NOT BALANCED'}",
        f"model {'the same' if told['same'] else 'DIFFERENT'}",
        *memory,
        *(f"NOT FLAT: {words}" for words in told["not_flat"]),
        "all is flat within the limits, nothing was lost" if told["passed"] else "SOMETHING WENT WRONG",
    ]
    return "\n".join(lines)


def written(told: dict[str, Any]) -> str:
    """JSON with a line for each life and each sample."""
    rows = {name: told[name] for name in ("lives", "waiting_and_files", "samples")}
    rest = json.dumps({name: value for name, value in told.items() if name not in rows}, indent=2)
    tables = (f'  "{name}": [\n    ' + ",\n    ".join(map(json.dumps, of)) + "\n  ]" for name, of in rows.items())
    return rest.removesuffix("\n}") + ",\n" + ",\n".join(tables) + "\n}\n"


def soak(plan: Plan, directory: Path, on_round: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """One run and its report. Raises StateError if it does not get to its end."""
    watch = Watch(plan)
    outcome = perform(plan.scenario, plan.strikes, directory, on_round, watch)
    return report(plan, outcome, watch.samples)


@click.command()
@click.option("--rounds", type=click.IntRange(min=40), default=Plan.rounds, show_default=True)
@click.option("--faults", type=click.IntRange(min=0), default=Plan.faults, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=Plan.seed, show_default=True)
@click.option("--phases", type=click.IntRange(min=1), default=Plan.phases, show_default=True, help="Storms.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "soak.json")
def main(rounds: int, faults: int, seed: int, phases: int, out: Path) -> None:
    """Goes through it, prints what came of it, and writes everything as JSON."""
    configure_logs("warning" if sys.stderr.isatty() else "info")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends this ends what it started
    with (
        tempfile.TemporaryDirectory(prefix="fluffle-soak-") as directory,
        progress_bar("rounds", rounds) as advance,
    ):
        told = soak(Plan(rounds, faults, seed, phases), Path(directory), advance)
    out.write_text(written(told))
    click.echo(text(told))
    sys.exit(0 if told["passed"] else 1)


if __name__ == "__main__":
    main()
