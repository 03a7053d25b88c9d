"""W2: how a large model goes round.

    python -m benchmarks.payload
    python -m benchmarks.payload --mb 10 --rounds 2 --out /tmp/small.json

Four participants, random float32 in ten tensors, every participant changes every value, nothing is trained. Over
RabbitMQ every participant is a process; it is checked that the model comes out with the bits that the same sums
give in one process. Reference: the bare pump, as many bytes through the same queues and streams; for the embedded
broker, the arithmetic alone. With bf16 updates travel rounded; the pump sends float32 as before.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from aggregator.judge import weight_of
from aggregator.settings import CodecSettings
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from benchmarks import embedded
from benchmarks.fleet import THROUGH_BROKER, Beside, Load, Measured, rabbit, run_bare, run_fluffle
from benchmarks.measure import BYTES_PER_MB, RESULTS, line, report, table, write
from benchmarks.tasks import SHIFT, Shift
from broker import tensors
from broker.codecs import NONE, packing
from broker.codecs.difference import difference
from fluffle.chaos.node import Node
from workers.task import TrainConfig

MOST_CPU_RATIO, MOST_ROUNDED_RATIO, MOST_EMBEDDED_S = 1.3, 0.75, 0.45
ROUNDED = CodecSettings(up="bf16")


def load_of(mb: int, rounds: int) -> Load:
    floats = mb * BYTES_PER_MB // 4
    return Load(participants=4, floats=floats, tensors=10, rounds=rounds, processes=4, task=SHIFT)


def expected(load: Load) -> str:
    """The digest that the same updates give in this process, without a broker."""
    run, model = load.run, load.initial()
    strategy, up = make_strategy(run.strategy, run.round), packing(run.codec.up)
    for number in range(1, run.stop.rounds + 1):
        strategy.start(model, strategy.state)
        for name in load.names:
            trained = Shift(name, "").train(model, TrainConfig(number, seed=0))
            deltas = {key: np.subtract(values, model[key]) for key, values in trained.arrays.items()}
            if up.name != NONE:
                deltas = up.unpack(up.pack(deltas, {}, np.random.default_rng(0)).body, model)
            strategy.add(deltas, Contribution(weight_of(trained.num_examples, run.round), name))
        before, model = model, strategy.finish()
        if run.codec.down != NONE:
            model, _ = difference(run.codec.down, before, model)
    return hashlib.sha256(tensors.encode(model)).hexdigest()


def run_checked(
    node: Node, federation: str, load: Load, *options: str, beside: Beside = THROUGH_BROKER
) -> Measured:
    """One run over RabbitMQ. Raises AssertionError if its model is not the expected one."""
    ours = run_fluffle(node, federation, load, *options, beside=beside)
    assert ours.result["model_sha256"] == expected(load), "the model is not the one that these updates give"
    return ours


def measure(mb: int, rounds: int) -> dict[str, object]:
    load, model_mb = load_of(mb, rounds), mb
    rounding = replace(load, codec=ROUNDED)
    with rabbit(w2=load, rounded=rounding) as node:
        ours = run_checked(node, "w2", load)
        bare = run_bare(node, "w2", load, ours.sizes)
        rounded = run_checked(node, "rounded", rounding)
    alone, floor = embedded.run(load), embedded.run(load, bare=True)
    what = f"{model_mb} MB over RabbitMQ"
    lines = [
        line("W2", what, "CPU s/round", ours.cpu_s, bare.cpu_s, most_ratio=MOST_CPU_RATIO),
        line("W2", f"{what}, bf16", "CPU s/round", rounded.cpu_s, bare.cpu_s, most_ratio=MOST_ROUNDED_RATIO),
        line("W2", what, "s/round", ours.seconds, bare.seconds),
        line("W2", f"{what}, bf16", "s/round", rounded.seconds, bare.seconds),
        line("W2", f"{what}, aggregator", "MB at most", ours.peak_mb["aggregator"], bare.peak_mb["aggregator"]),
        line("W2", f"{what}, a worker", "MB at most", ours.peak_mb["workers"], bare.peak_mb["workers"]),
        line("W2", f"{what}, RabbitMQ", "MB at most", ours.peak_mb["rabbitmq"], bare.peak_mb["rabbitmq"]),
        line("W2", f"{model_mb} MB embedded", "s/round", alone.seconds, floor.seconds, most=MOST_EMBEDDED_S),
        line("W2", f"{model_mb} MB embedded", "CPU s/round", alone.cpu_s, floor.cpu_s),
    ]
    details = {
        "rabbitmq": ours.details,
        "bf16": rounded.details,
        "bare": bare.details,
        "embedded": alone.details,
        "arithmetic": floor.details,
    }
    return report("payload", lines, details) | {"table": table(lines)}


@click.command()
@click.option("--mb", default=100, show_default=True, help="Size of the model in MB.")
@click.option("--rounds", default=5, show_default=True, help="Rounds after the first, which warms up.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "payload.json")
def main(mb: int, rounds: int, out: Path) -> None:
    """Measures, prints a table, and writes everything as JSON."""
    found = measure(mb, rounds)
    click.echo(found.pop("table"))
    write(found, out)


if __name__ == "__main__":
    main()
