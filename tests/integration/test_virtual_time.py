"""Whole simulated runs in virtual time: durations against closed forms, equal runs, participants that come and go.

The learning task is real, but takes one step: these tests are about time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from aggregator.checkpoints import Checkpoints
from aggregator.history import History, RoundReport
from broker.errors import TaskError
from broker.head import Decision
from broker.memory import MemoryBroker
from broker.messages import Scalar
from fluffle.config import from_values, load_config
from fluffle.delays import generator
from fluffle.learning import task_defaults
from fluffle.results import target_of
from fluffle.simulation import Outcome, Plan, plan_simulation, run_simulation

SEED = 7
BASE: dict[str, Scalar] = {
    "task": "digits",
    "run.id": "run-1",
    "run.seed": SEED,
    "simulation.virtual_time": True,
    "round.participants": 6,
    "stop.rounds": 4,
    "train.max_steps": 1,
    "evaluation.mode": "none",
}


@dataclass
class Watch:
    """A display that remembers, and who was connected as each round closed."""

    live = False
    broker: MemoryBroker | None = None
    reports: list[RoundReport] = field(default_factory=list)
    there: list[set[str]] = field(default_factory=list)

    def on_report(self, report: RoundReport) -> None:
        self.reports.append(report)
        if self.broker is not None:
            self.there.append({connection.user for connection in self.broker.connections})

    def on_notice(self, event: str, **fields: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Ran:
    plan: Plan
    outcome: Outcome
    watch: Watch
    ledger: list[Decision]

    @property
    def durations(self) -> list[float]:
        return [report.duration_s for report in self.watch.reports]

    def fingerprint(self) -> list[Any]:
        """All that two equal runs must have in common."""
        newest = Checkpoints(self.plan.config.run_dir / "checkpoints").newest()
        assert newest is not None
        return [
            self.outcome.record.model_dump_json(),
            newest.model_dump_json(),
            [decision.model_dump_json() for decision in self.ledger],
            [(r.opened, r.closed, r.bytes_up, r.bytes_down, r.model_sha256) for r in self.watch.reports],
            self.outcome.virtual_s,
        ]


def run(directory: Path, **settings: Scalar) -> Ran:
    """`simulation__delay="constant:3"` sets simulation.delay."""
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    config = load_config(from_values({**BASE, "run.dir": str(directory), **dotted}), defaults=task_defaults)
    plan = plan_simulation(config)
    assert isinstance(plan.broker, MemoryBroker)
    watch = Watch(broker=plan.broker)
    outcome = run_simulation(plan, watch)
    with History(directory / "history.sqlite") as history:
        return Ran(plan, outcome, watch, history.ledger("run-1"))


def half_normal(scale: float, task: int, participants: int = 6) -> list[float]:
    """What each participant draws for a task that it begins for the first time."""
    names = [f"p{number:02}" for number in range(1, participants + 1)]
    return [abs(generator(SEED, "delay", name, task, 0).normal()) * scale for name in names]


def test_a_round_takes_as_long_as_its_slowest_participant(tmp_path: Path) -> None:
    ran = run(tmp_path, simulation__delay="half-normal:2")
    expected = [max(half_normal(2, task)) for task in range(1, 5)]
    assert ran.durations == pytest.approx(expected, rel=1e-9)
    assert ran.outcome.virtual_s == pytest.approx(sum(expected), rel=1e-9)
    assert ran.outcome.record.finished == "all 4 rounds done"


def test_with_a_target_a_round_takes_as_long_as_the_order_statistic(tmp_path: Path) -> None:
    ran = run(tmp_path, simulation__delay="half-normal:2", round__target=4)
    assert ran.durations == pytest.approx([sorted(half_normal(2, task))[3] for task in range(1, 5)], rel=1e-9)
    assert [report.accepted for report in ran.watch.reports] == [4] * 4


def test_with_a_quorum_a_round_ends_at_its_deadline(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("participant,delay_s\n" + "".join(f"p0{n},{n}\n" for n in range(1, 7)))
    ran = run(tmp_path, simulation__delay=f"trace:{tmp_path / 't.csv'}", round__quorum=3, round__deadline_s=4.5)
    assert ran.durations == pytest.approx([4.5] * 4)
    assert [report.accepted for report in ran.watch.reports] == [4] * 4


def test_some_are_always_slow_if_a_delay_is_drawn_once(tmp_path: Path) -> None:
    ran = run(tmp_path, simulation__delay="log-normal:5,1", simulation__delay_per="participant")
    names = [f"p0{number}" for number in range(1, 7)]
    slowest = max(5 * np.exp(generator(SEED, "delay", name).normal()) for name in names)
    assert ran.durations == pytest.approx([slowest] * 4)


def test_transfers_take_the_time_of_their_bytes(tmp_path: Path) -> None:
    ran = run(tmp_path, simulation__delay="constant:1", simulation__mbit_s=0.5)
    model = ran.outcome.record.model
    assert model is not None
    assert ran.durations == pytest.approx([1 + 2 * model.size_bytes * 8 / 0.5e6] * 4)


def test_buffered_versions_come_when_their_buffers_are_full(tmp_path: Path) -> None:
    """Nobody waits: whoever takes d seconds sends at d, 2 d, 3 d, ..., and every sixth closes a version."""
    delays = {"p01": 2.0, "p02": 2.3, "p03": 2.7, "p04": 3.1, "p05": 3.3, "p06": 3.7}
    (tmp_path / "t.csv").write_text("participant,delay_s\n" + "".join(f"{n},{s}\n" for n, s in delays.items()))
    ran = run(
        tmp_path, simulation__delay=f"trace:{tmp_path / 't.csv'}", round__policy="buffered", round__buffer=6,
        stop__rounds=8,
    )  # fmt: skip
    arrivals = sorted(turn * seconds for seconds in delays.values() for turn in range(1, 40))
    assert [report.closed for report in ran.watch.reports] == pytest.approx(arrivals[5 : 6 * 8 : 6])
    assert [report.accepted for report in ran.watch.reports] == [6] * 8


@contextmanager
def busy() -> Iterator[None]:
    """Another thread wants the processor all the time."""
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            sum(range(5000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


EVENTFUL: dict[str, Scalar] = {
    "simulation__delay": "half-normal:1",
    "simulation__dropout": 0.15,
    "simulation__back_after": "log-normal:10,1",
    "simulation__available": "40s/60s",
    "round__participants": 10,
    "round__target": 7,
    "round__quorum": 2,
    "round__deadline_s": 3.0,
    "round__late": "fold",
    "stop__rounds": 12,
}


def test_equal_seeds_give_equal_records_ledgers_and_times_in_any_process(tmp_path: Path) -> None:
    """Under load, and with another order of Python's sets."""
    code = (
        "import sys, json; from pathlib import Path; from tests.integration.test_virtual_time import *;"
        "print(json.dumps(run(Path(sys.argv[1]), **EVENTFUL).fingerprint()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with busy():
        first = run(tmp_path / "1", **EVENTFUL)
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "2")], env=environment, capture_output=True, check=True
    )
    assert json.loads(json.dumps(first.fingerprint())) == json.loads(other.stdout.splitlines()[-1])
    assert run(tmp_path / "3", **EVENTFUL, run__seed=SEED + 1).fingerprint()[2:] != first.fingerprint()[2:]
    verdicts = {decision.verdict for decision in first.ledger}
    assert verdicts == {"counted", "late"}, "else little was compared"


def test_who_drops_out_is_gone_and_comes_back(tmp_path: Path) -> None:
    ran = run(
        tmp_path, simulation__delay="constant:1", simulation__dropout=0.2, simulation__back_after="constant:25",
        round__quorum=1, round__deadline_s=2.0, broker__liveness_s=20.0, stop__rounds=60,
    )  # fmt: skip
    everybody = {f"p0{number}" for number in range(1, 7)}
    away = [everybody - there for there in ran.watch.there]
    for name in everybody:
        gone = [name in missing for missing in away]
        assert any(gone), f"{name} is away as some rounds close"
        begin = gone.index(True)
        assert False in gone[begin:], f"{name} is back later"
        times = [r.closed for r, is_gone in zip(ran.watch.reports, gone, strict=True) if is_gone]
        assert times[-1] - times[0] >= 20, "for 25 seconds"
    counted = {(d.participant, d.task) for d in ran.ledger if d.verdict == "counted"}
    assert all(len({task for name, task in counted if name == each}) > 10 for each in everybody)
    assert sum(report.accepted < 6 for report in ran.watch.reports) > 20, "its work is lost"


def test_outside_its_window_a_participant_is_not_there(tmp_path: Path) -> None:
    trace = ["p01,0,10.5", "p01,100.5,1000", *(f"p0{n},0,1000" for n in range(2, 7))]
    (tmp_path / "w.csv").write_text("participant,from_s,until_s\n" + "\n".join(trace))
    ran = run(
        tmp_path, simulation__available=f"trace:{tmp_path / 'w.csv'}", simulation__delay="constant:2",
        round__quorum=2, round__deadline_s=4.0, broker__liveness_s=20.0, stop__rounds=52,
    )  # fmt: skip
    for report, there in zip(ran.watch.reports, ran.watch.there, strict=True):
        assert ("p01" in there) == (not 10.5 < report.closed < 100.5), report.closed
    own = {decision.task for decision in ran.ledger if decision.participant == "p01"}
    closed = [report.closed for report in ran.watch.reports if report.task in own]
    assert min(closed) < 10
    assert not [at for at in closed if 11 < at < 102]
    assert max(closed) > 102
    asked = {round(report.closed): report.cohort for report in ran.watch.reports}
    assert asked[min(asked)] == 6
    assert 5 in asked.values(), "once it was silent for long enough, nobody waits for it"


def test_if_nobody_is_ever_there_again_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("participant,from_s,until_s\n" + "".join(f"p0{n},0,9\n" for n in range(1, 7)))
    with pytest.raises(TaskError, match="nobody is ever there again"):
        run(tmp_path, simulation__available=f"trace:{tmp_path / 'w.csv'}", simulation__delay="constant:5")


OFFERED: dict[str, dict[str, Scalar]] = {
    "state of a strategy": {"strategy__name": "fedadam"},
    "gradients": {"strategy__name": "fedsgd", "train__batch_size": 0},
    "robust, attacked": {"strategy__name": "median", "round__quorum": 3, "study__attack": "sign-flip:5"},
    "codec with feedback": {"codec__up": "topk:0.1+zstd"},
    "codecs to choose from": {"codec__up": "none,fp16"},
    "large bodies": {"broker__inline_bytes": 1000, "codec__down": "fp16"},
    "learned deadline": {"round__deadline": "auto", "round__quorum": 2},
    "federated evaluation": {"evaluation__mode": "federated"},
    "buffered": {"round__policy": "buffered", "round__buffer": 3},
    "in one pass": {"simulation__vectorise": True},
    "claim-check store": {"broker__inline_bytes": 1000, "store__url": "FOLDER"},
}


@pytest.mark.parametrize("settings", OFFERED.values(), ids=OFFERED)
def test_what_simulations_offer_works_in_virtual_time(settings: dict[str, Scalar], tmp_path: Path) -> None:
    if settings.get("store__url"):
        (tmp_path / "store").mkdir()
        settings = settings | {"store__url": str(tmp_path / "store")}
    ran = run(tmp_path / "run", simulation__delay="half-normal:1", stop__rounds=3, **settings)
    assert ran.outcome.record.finished == "all 3 rounds done"
    assert {decision.verdict for decision in ran.ledger} <= {"counted", "late"}
    assert ran.outcome.virtual_s is not None
    assert 0 < ran.outcome.virtual_s < 60
    if "round__deadline" not in settings and "round__policy" not in settings:
        expected = [max(half_normal(1, r.task)) for r in ran.watch.reports if r.work == "train"]
        assert [r.duration_s for r in ran.watch.reports if r.work == "train"] == pytest.approx(expected)


def test_a_resumed_run_goes_on_at_the_time_it_had_come_to(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", simulation__delay="half-normal:2")
    run(tmp_path / "cut", simulation__delay="half-normal:2", stop__rounds=2)
    resumed = run(tmp_path / "cut", simulation__delay="half-normal:2")
    assert resumed.outcome.record.model == whole.outcome.record.model
    assert resumed.outcome.virtual_s == pytest.approx(whole.outcome.virtual_s)
    assert resumed.durations == pytest.approx(whole.durations[2:])


def test_it_is_told_what_reaching_the_target_took(tmp_path: Path) -> None:
    ran = run(
        tmp_path, simulation__delay="constant:10", evaluation__mode="central", stop__target_metric="accuracy:0.6",
        train__max_steps=0,
    )  # fmt: skip
    reports = ran.watch.reports
    assert target_of(ran.plan.config, reports, 0.0) == {
        "metric": "accuracy",
        "value": 0.6,
        "reached": {
            "round": len(reports),
            "model_version": len(reports),
            "updates": 6 * len(reports),
            "bytes": {"up": sum(r.bytes_up for r in reports), "down": sum(r.bytes_down for r in reports)},
            "seconds": 10.0 * len(reports),
        },
    }
    assert target_of(ran.plan.config, reports[:-1], 0.0) == {"metric": "accuracy", "value": 0.6, "reached": None}


def test_slow_work_has_few_heartbeats(tmp_path: Path) -> None:
    ran = run(tmp_path, simulation__delay="constant:3600", round__deadline_s=7200.0)
    assert (ran.plan.config.broker.heartbeat_s, ran.plan.config.broker.liveness_s) == (3600, 21600)
    assert ran.outcome.virtual_s == 4 * 3600
    assert isinstance(ran.plan.broker, MemoryBroker)
    assert ran.plan.broker.stats().streams["fl.default.updates"].published < 100
