"""A large update goes up over a bad link: what it costs beyond its own bytes when the link is cut.

    python -m benchmarks.cut_upload
    python -m benchmarks.cut_upload --mb 20 --cuts 2 --kills 1 --out /tmp/small.json

One aggregator and one worker as processes, over a RabbitMQ of their own. All that the worker says goes through a
proxy, which cuts its connections at even distances of the upload, or has the worker killed with -9 and started
again. Bytes sent are all that the worker wrote to the proxy, from its start to its end: chunks and what was sent of
them twice, messages, acks of what it fetched, and what AMQP adds.
"""

from __future__ import annotations

import json
import queue
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from aggregator.settings import RunSettings
from benchmarks.fleet import LONGEST_S
from benchmarks.measure import BYTES_PER_MB, RESULTS, about, private_rabbit
from benchmarks.tasks import DRIFT
from broker import tensors
from broker.tensors import Arrays
from fluffle.chaos.processes import Deployment, Process
from fluffle.chaos.proxy import Proxy, proxied_aside
from tests.federation import settings
from tests.processes import deployment


@dataclass(frozen=True)
class Plan:
    """How large the update is, how often the link is cut, and how often the worker is killed after that."""

    mb: int = 200
    cuts: int = 5
    kills: int = 0

    @property
    def run(self) -> RunSettings:
        run = settings(1, 1, run_id="cut", round={"deadline_s": LONGEST_S}, broker={"patience_s": 60.0})
        return run.model_copy(update={"learning_task": DRIFT})

    def initial(self) -> Arrays:
        return {"w": np.linspace(-1, 1, self.mb * BYTES_PER_MB // 4, dtype=np.float32)}


def measure(plan: Plan, federation: Deployment) -> dict[str, Any]:
    """One run of one round, and what was sent. The update has the size of the model."""
    model = federation.directory / "initial.safetensors"
    payload_bytes = model.write_bytes(tensors.encode(plan.initial()))
    federation.set_up()
    with proxied_aside(federation.url.port or 5672) as proxy:
        address = federation.url.with_host("127.0.0.1").with_port(proxy.port)
        kills = marked(proxy, plan, payload_bytes)
        leader = federation.aggregator(plan.run, "--set", f"run.initial={model}")
        worker = federation.worker("p01", "--broker", str(address).rstrip("/"), task=DRIFT)
        resumed = [chunk for _ in range(plan.kills) for chunk in killed(worker, kills)]
        result = leader.result(LONGEST_S)
        worker.stop()
        resumed += resumed_at(worker)
    assert result["updates"]["accepted"] == 1, "the update was counted"
    return {
        "payload_bytes": payload_bytes, "bytes_sent": proxy.sent, "ratio": round(proxy.sent / payload_bytes, 4),
        "resumed_at_chunk": resumed, "connections": proxy.served, "model_sha256": result["model_sha256"],
    }  # fmt: skip


def marked(proxy: Proxy, plan: Plan, payload_bytes: int) -> queue.Queue[None]:
    """Has the link cut at even distances, and then something put into a queue whenever the worker shall die."""
    kills: queue.Queue[None] = queue.Queue()
    step = payload_bytes // (plan.cuts + plan.kills + 1)
    for number in range(1, plan.cuts + plan.kills + 1):
        proxy.when_sent(number * step, proxy.cut if number <= plan.cuts else partial(kills.put, None))
    return kills


def killed(worker: Process, kills: queue.Queue[None]) -> list[int]:
    """Kills the worker when it is time, and starts it again; returns where its uploads had gone on before."""
    kills.get(timeout=LONGEST_S)
    worker.kill()
    before = resumed_at(worker)
    worker.start()
    return before


def resumed_at(worker: Process) -> list[int]:
    return [int(event.fields["confirmed"]) for event in worker.all("upload_resumed")]


@click.command()
@click.option("--mb", default=Plan.mb, show_default=True, help="Size of the update in MB.")
@click.option("--cuts", default=Plan.cuts, show_default=True, help="How often the link is cut.")
@click.option("--kills", default=Plan.kills, show_default=True, help="How often the worker is killed after that.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "cut_upload.json")
def main(mb: int, cuts: int, kills: int, out: Path) -> None:
    """Measures, prints, and writes the same as JSON."""
    plan = Plan(mb, cuts, kills)
    with (
        tempfile.TemporaryDirectory() as directory,
        private_rabbit() as rabbit,
        deployment(rabbit, Path(directory)) as federation,
    ):
        report = json.dumps(about("cut_upload") | asdict(plan) | measure(plan, federation), indent=2)
    out.write_text(report + "\n")
    click.echo(report)


if __name__ == "__main__":
    main()
