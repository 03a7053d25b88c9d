"""`simulate` for programs: what the command does, as one call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.messages import Scalar
from broker.tensors import Arrays
from fluffle.config import from_values, load_config
from fluffle.display import LogDisplay
from fluffle.finish import finish
from fluffle.learning import load_model, task_defaults
from fluffle.rundir import RunDir
from fluffle.simulation import run_simulation


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: `summary` is what `--json` writes, `arrays` the global model, `directory` has the rest."""

    summary: dict[str, Any]
    arrays: Arrays
    directory: Path


def simulate(task: str, settings: dict[str, Scalar] | None = None) -> Result:
    """Trains `task` (a shipped name or `package.module:Object`) with aggregator and workers in this process.

    `settings` are those of `fluffle settings`, by dotted name: `{"round.participants": 10, "train.lr": 0.1}`.
    Raises FluffleError.
    """
    config = load_config(from_values({"task": task, **(settings or {})}), defaults=task_defaults)
    run = RunDir(config.run_dir)
    run.begin(config, resume=False)
    with LogDisplay() as display:
        outcome = asyncio.run(run_simulation(config, display))
    summary = finish(run, config, outcome.record, outcome.wall_s)
    return Result(summary, load_model(run.model_file), run.path)
