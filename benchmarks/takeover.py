"""How soon a standby leads when the leader is killed, or frozen.

    python -m benchmarks.takeover
    python -m benchmarks.takeover --kills 2 --freezes 1 --out /tmp/takeover.json

Two aggregators and two workers as processes, over a RabbitMQ of their own. The leader is killed with -9 and started
again, or stopped (SIGSTOP) until the other one leads and then woken up, at moments that have nothing to do with its
heartbeats. The time runs from there until the other one logs `leading`, and until it has read all that was there
(`caught_up`). Who is woken up must log `term_ended` and lead no more.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from aggregator.settings import RunSettings
from benchmarks.measure import RESULTS, about, private_rabbit
from broker.rabbitmq import RabbitSettings
from fluffle.chaos.processes import Deployment, Process
from fluffle.chaos.task import Pace
from tests.federation import settings
from tests.processes import deployment

STANDBY = "standby"
ROUNDS = 100_000  # more than there is time for
WITHIN_S = 120.0


@dataclass(frozen=True)
class TakeOver:
    """Seconds from the blow until the other one led, and until it had read everything."""

    leading_s: float
    caught_up_s: float


def run_settings() -> RunSettings:
    return settings(2, ROUNDS, run_id="takeover", round={"deadline_s": 600.0}, broker={"patience_s": 20.0})


def measure(federation: Deployment, kills: int, freezes: int, dice: random.Random) -> dict[str, Any]:
    """Alternately one leads and the other; each blow is measured."""
    federation.set_up()
    run = run_settings()
    leader = federation.aggregator(run, "--set", "http.listen=")
    leader.wait_for("leading")
    standby = federation.aggregator(run, "--set", "http.listen=", name=STANDBY)
    standby.wait_for("standing_by")
    workers = [federation.worker(participant, pace=Pace(0.2)) for participant in ("p01", "p02")]
    workers[0].wait_for("update_sent")
    found: dict[str, list[TakeOver]] = {"kill -9": [], "SIGSTOP": []}
    for blow in ["kill -9"] * kills + ["SIGSTOP"] * freezes:
        time.sleep(dice.uniform(2.0, 2.0 + RabbitSettings().heartbeat_s))  # any moment between heartbeats
        found[blow].append(killed(leader, standby) if blow == "kill -9" else frozen(leader, standby))
        leader, standby = standby, leader
    return {blow: summary(times) for blow, times in found.items() if times}


def killed(leader: Process, standby: Process) -> TakeOver:
    known = len(standby.log.events)
    took = taken_over(standby, known, leader.kill())
    leader.start()
    leader.wait_for("standing_by")
    return took


def frozen(leader: Process, standby: Process) -> TakeOver:
    known, own = len(standby.log.events), len(leader.log.events)
    took = taken_over(standby, known, leader.freeze())
    leader.thaw()
    leader.wait_for("term_ended", first=own)
    leader.wait_for("standing_by", first=own)
    assert not any(event.name == "leading" for event in leader.log.events[own:]), "who was woken up does not lead"
    return took


def taken_over(standby: Process, known: int, since: float) -> TakeOver:
    leading, caught_up = (
        standby.wait_for(name, within_s=WITHIN_S, first=known) for name in ("leading", "caught_up")
    )
    return TakeOver(leading.at - since, caught_up.at - since)


def summary(times: list[TakeOver]) -> dict[str, Any]:
    leading = [took.leading_s for took in times]
    return {
        "blows": len(times),
        "leading_s": {"median": round(statistics.median(leading), 3), "max": round(max(leading), 3)},
        "caught_up_s": {"max": round(max(took.caught_up_s for took in times), 3)},
        "each_leading_s": [round(seconds, 3) for seconds in leading],
    }


@click.command()
@click.option("--kills", default=10, show_default=True, help="How often the leader is killed.")
@click.option("--freezes", default=10, show_default=True, help="How often it is frozen after that.")
@click.option("--seed", default=1, show_default=True, help="Of the moments.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "takeover.json")
def main(kills: int, freezes: int, seed: int, out: Path) -> None:
    """Measures, prints, and writes the same as JSON."""
    with (
        tempfile.TemporaryDirectory() as directory,
        private_rabbit() as rabbit,
        deployment(rabbit, Path(directory)) as federation,
    ):
        found = measure(federation, kills, freezes, random.Random(seed))
    report = json.dumps(about("takeover") | {"amqp_heartbeat_s": RabbitSettings().heartbeat_s} | found, indent=2)
    out.write_text(report + "\n")
    click.echo(report)


if __name__ == "__main__":
    main()
