"""Tokens per second of a worker that fine-tunes a large model, against the same training without federation.

    fluffle data fetch minilm && fluffle data fetch spam-assassin
    python -m benchmarks.tokens --device auto

The worker's part is its training (`HfBound.train`, from arrays to arrays) with the encoding of the update; the
reference is a plain loop of transformers, peft and torch.optim.AdamW over the same batches on the same device.
MiniLM under LoRA, a few times each in turns, of which the quickest counts. By the wall clock on a GPU; on the CPU
by processor seconds of the process, which a busy machine does not change much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import peft
import torch
import transformers

from benchmarks.measure import RESULTS, line, report, table, write
from broker import tensors
from workers import devices
from workers.hf.task import HfBound
from workers.modules import use_threads
from workers.recipe import recipe
from workers.task import TrainConfig
from workers.tasks.spam import SPAM
from workers.torch_task import batches

TIMES, SEED, LEAST_RATIO = 3, 7, 0.9
PLAIN = {"optimiser": "adamw", "lr": 1e-4, "clip": 1.0, "schedule": "constant"}


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is trained."""

    steps: int
    batch_size: int
    max_length: int
    precision: str

    def settings(self) -> dict[str, Any]:
        return PLAIN | {"max_steps": self.steps, "batch_size": self.batch_size, "precision": self.precision}


class Plain:
    """What one would write without federation."""

    def __init__(self, bound: HfBound, amount: Amount) -> None:
        self.device, self.amount = bound.model.device, amount
        folder = bound.definition.base() if callable(bound.definition.base) else bound.definition.base
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        config = peft.get_peft_config({"task_type": "SEQ_CLS", **dict(bound.definition.adapter or {})})
        self.model: Any = peft.get_peft_model(base, config).to(self.device)
        self.pad = bound.model.tokenizer.pad
        self.rows = [
            {name: column[row] for name, column in bound.rows.columns.items()} for row in range(len(bound.rows))
        ]
        self.labels = bound.rows.targets

    def __call__(self) -> float:
        """Trains; returns the mean loss."""
        plain = recipe({"batch_size": self.amount.batch_size, "max_steps": self.amount.steps})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=PLAIN["lr"])  # type: ignore[arg-type]
        self.model.train()
        losses = []
        for rows in batches(len(self.rows), plain, SEED):
            inputs = self.pad([self.rows[row] for row in rows.tolist()], return_tensors="pt").to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amount.precision == "bfloat16"):
                loss = self.model(**inputs, labels=self.labels[rows].to(self.device)).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, PLAIN["clip"])  # type: ignore[arg-type]
            optimiser.step()
            losses.append(loss.item())
        return float(np.mean(losses))


def worker(bound: HfBound, amount: Amount) -> Callable[[], float]:
    """What a worker does between a model and an update, both as bytes."""
    blob = tensors.encode(bound.initial())

    def train() -> float:
        start = tensors.decode(blob)
        result = bound.train(start, TrainConfig(1, SEED, amount.settings()))
        tensors.encode({name: values - start[name] for name, values in result.arrays.items()})
        return result.metrics["loss"]

    return train


def seconds_of(work: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """How long it took, with what the device still does; and its loss."""
    clock = time.process_time if device.type == "cpu" else time.monotonic
    began = clock()
    loss = work()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return clock() - began, loss


def measure(device: str, amount: Amount) -> dict[str, object]:
    use_threads()
    mails = SPAM.load()
    order = np.random.default_rng(0).permutation(len(mails))[: amount.steps * amount.batch_size]
    task = replace(SPAM, device=device, max_length=amount.max_length)
    bound = task.bind(mails.take(order))
    ours, plain, there = worker(bound, amount), Plain(bound, amount), bound.model.device
    tokens = sum(map(len, bound.rows.columns["input_ids"]))
    ours(), plain()  # whatever is slow at first
    turns = [(seconds_of(ours, there), seconds_of(plain, there)) for _ in range(TIMES)]
    speeds = [tokens / min(turn[which][0] for turn in turns) for which in (0, 1)]
    unit = "tokens per CPU s" if there.type == "cpu" else "tokens/s"
    name = torch.cuda.get_device_name(there) if there.type == "cuda" else str(there)
    what = f"MiniLM under LoRA on {name}, {amount.precision}"
    lines = [line("tokens", what, unit, *speeds, least_ratio=LEAST_RATIO)]
    details = {
        "device": name, "tokens": tokens, "steps": amount.steps, "batch_size": amount.batch_size,
        "max_length": amount.max_length, "worker_s": [turn[0][0] for turn in turns],
        "plain_s": [turn[1][0] for turn in turns], "losses": [turn[0][1] for turn in turns],
        "plain_losses": [turn[1][1] for turn in turns],
    }  # fmt: skip
    return report("tokens", lines, details) | {"table": table(lines)}


@click.command()
@click.option("--device", default=devices.AUTO, show_default=True)
@click.option("--steps", type=int, default=16, show_default=True)
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--max-length", type=int, default=64, show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "tokens.json")
def main(device: str, steps: int, batch_size: int, max_length: int, precision: str, out: Path) -> None:
    """Measures, prints a table, and writes everything as JSON."""
    found = measure(device, Amount(steps, batch_size, max_length, precision))
    click.echo(found.pop("table"))
    write(found, out)


if __name__ == "__main__":
    main()
