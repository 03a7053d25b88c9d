"""What the command `simulate` does, for programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from broker.messages import Scalar
from broker.tensors import Arrays
from fluffle.config import Config, from_values, load_config
from fluffle.display import LogDisplay
from fluffle.finish import finish
from fluffle.layers import from_toml
from fluffle.learning import task_defaults
from fluffle.logs import configure_logs
from fluffle.rundir import RunDir
from fluffle.shards import load_model
from fluffle.simulation import plan_simulation, run_simulation


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
    return _run(config, resume=False)


def resume(directory: Path | str, settings: dict[str, Scalar] | None = None) -> Result:
    """Goes on with the run in `directory`, from its newest checkpoint, with these settings changed.

    Raises FluffleError.
    """
    begun = from_toml(RunDir(Path(directory)).config_file)
    layers = (begun, from_values({"run.dir": str(directory), **(settings or {})}))
    return _run(load_config(*layers, defaults=task_defaults), resume=True)


def _run(config: Config, *, resume: bool) -> Result:
    if not structlog.is_configured():
        configure_logs("info")
    plan = plan_simulation(config)
    run = RunDir(config.run_dir)
    run.begin(config, resume=resume)
    with LogDisplay() as display:
        outcome = run_simulation(plan, display)
    summary = finish(run, config, outcome.record, outcome.wall_s, outcome.virtual_s)
    return Result(summary, load_model(run.model_file), run.path)
