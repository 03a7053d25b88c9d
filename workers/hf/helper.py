"""A process that computes gradients for a participant (`crew.py`). It reads what it loads from its standard input,
writes the base's identity once it is ready, and then answers until its input ends."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch

from workers.data import Dataset
from workers.hf.crew import START_S, Lines, Work, dist
from workers.hf.definition import HfTask
from workers.hf.recipe import choose
from workers.hf.task import HfBound, loss_of
from workers.hf.text import Examples
from workers.modules import seeded, use_threads


def nothing() -> Dataset:
    """A helper has no data of its own."""
    raise NotImplementedError


def serve(told: BinaryIO, ready: BinaryIO) -> None:
    hello: dict[str, Any] = json.loads(told.readline())
    place = hello.pop("place")
    use_threads(place["threads"])
    hello["base"] = Path(hello.pop("where"))
    bound = HfTask(name="helper", load=nothing, **hello).bind()
    ready.write(bound.model.identity.encode() + b"\n")
    ready.flush()
    store = dist.TCPStore("127.0.0.1", place["port"], is_master=False, timeout=timedelta(seconds=START_S))
    lines = Lines.opened(store, place["rank"], place["size"], bound.model.device)
    while line := told.readline():
        content = torch.empty(int(line), dtype=torch.uint8)
        lines.said.recv([content], 0, 0).wait()
        answer(bound, Work.from_bytes(content.numpy().tobytes()), lines)


def answer(bound: HfBound, work: Work, lines: Lines) -> None:
    """One step: the first one's parameters, the gradient of these examples, the sum of all."""
    parameters = list(bound.model.parameters.values())
    lines.share(parameters)
    told, chosen, module = work.told, choose(work.told["settings"]), bound.model.module
    weights = work.arrays.pop("weights", None)
    examples = Examples.from_arrays(work.arrays)
    with bound.running(chosen), seeded(told["seed"], bound.model.device):
        module.train()
        module.zero_grad()
        loss = loss_of(chosen.recipe, None if weights is None else torch.from_numpy(weights))
        total = bound.accumulate(examples, torch.arange(len(examples)), chosen, loss, told["whole"])
    lines.add_up(parameters, total)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print is for people
    serve(sys.stdin.buffer, answers)
