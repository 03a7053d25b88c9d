"""SmolLM2 learns Shakespeare over a RabbitMQ of its own, each participant a process: what that takes.

    python -m benchmarks.language_model --run-dir runs/bard
    python -m benchmarks.language_model --participants 2 --rounds 1 --steps 1 --no-evaluation

Needs `fluffle[llm]` and `fluffle data fetch smollm2`. Prints perplexity, bytes, and the most memory that the kernel
saw each process hold (ru_maxrss). The aggregator holds the model only if it evaluates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from yarl import URL

from benchmarks.fleet import password
from benchmarks.measure import private_node
from broker.definitions import Enrolment, access_definitions, password_hash
from broker.topology import AGGREGATOR, Topology
from fluffle.chaos.node import Node
from workers.partition import participant_names

TASK = "shakespeare-lora"
LONGEST_S = 3600  # for a round


@contextmanager
def rabbit(names: list[str]) -> Iterator[Node]:
    enrolment = Enrolment(Topology("default"), tuple(names))
    hashes = {user: password_hash(password(user), b"salt") for user in enrolment.users}
    with private_node(access_definitions([enrolment], hashes)) as node:
        yield node


def start(stack: ExitStack, node: Node, user: str, *arguments: str) -> subprocess.Popen[bytes]:
    """One process of Fluffle, ended with the stack if it has not ended by then."""
    url = URL.build(scheme="amqp", host="127.0.0.1", port=node.port, user=user, password=password(user), path="/")
    words = (*arguments, "--broker", str(url), "--log-format", "json", "--log-level", "error")
    process = subprocess.Popen([sys.executable, "-m", "fluffle", *words], stdout=subprocess.DEVNULL)
    stack.callback(process.kill)
    return process


def peak_mb(process: subprocess.Popen[bytes]) -> float:
    """Waits for the end of a process; the most memory that it ever held, in MB."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"a process failed with exit code {process.returncode}")
    return round(usage.ru_maxrss * 1024 / 1e6)


def settings(run_dir: Path, participants: int, rounds: int, *, evaluates: bool) -> Mapping[str, object]:
    """By dotted name."""
    initial = run_dir.with_name(f"{run_dir.name}-initial.safetensors")
    found = {"round.participants": participants, "stop.rounds": rounds, "round.deadline_s": LONGEST_S}
    if evaluates:
        return found
    subprocess.run([sys.executable, "-m", "fluffle", "initial", TASK, str(initial)], check=True)
    return found | {"evaluation.mode": "none", "run.initial": initial}


def measure(run_dir: Path, chosen: Mapping[str, object], names: list[str]) -> dict[str, Any]:
    """One run from begin to end."""
    sets = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    file = run_dir.with_name(f"{run_dir.name}.toml")
    file.write_text(f'task = "{TASK}"\n')
    result = file.with_suffix(".json")
    with rabbit(names) as node, tempfile.TemporaryDirectory() as journals, ExitStack() as stack:
        workers = {
            name: start(
                stack, node, name, "worker", "--participant", name, "--journal", f"{journals}/{name}", "--once"
            )
            for name in names
        }
        places = ("--run-dir", str(run_dir), "--json", str(result))
        leader = start(stack, node, AGGREGATOR, "aggregator", str(file), *places, *sets)
        peaks = {AGGREGATOR: peak_mb(leader)} | {name: peak_mb(process) for name, process in workers.items()}
    return json.loads(result.read_text()) | {"peak_mb": peaks}


@click.command()
@click.option("--participants", default=4, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--steps", default=0, help="Of a participant in a round.  [default: the task's]")
@click.option("--evaluation/--no-evaluation", default=True, help="Whether the aggregator measures every version.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Where the run is kept.")
def main(participants: int, rounds: int, steps: int, run_dir: Path | None, *, evaluation: bool) -> None:
    """Runs it, and prints what came out as JSON."""
    names = participant_names(participants)
    with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as scratch:
        place = run_dir or Path(scratch) / "run"
        place.parent.mkdir(parents=True, exist_ok=True)
        chosen = settings(place, participants, rounds, evaluates=evaluation)
        found = measure(place, {**chosen, **({"train.max_steps": steps} if steps else {})}, names)
    kept = ("run_id", "metrics", "bytes", "updates", "model_sha256", "wall_s", "history", "peak_mb")
    click.echo(json.dumps({name: found[name] for name in kept if name in found}, indent=2))


if __name__ == "__main__":
    main()
