"""What an aggregator runs, out of a configuration. The task's code, and torch with it, is imported if it is needed.

It is not needed if the initial model comes from a file and the aggregator does not evaluate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aggregator.fairness import viewed, views_of
from aggregator.job import Job
from broker.errors import ConfigError, DataError, TaskError
from broker.tensors import Arrays
from broker.topology import AGGREGATOR
from fluffle.config import Config, Defaults, Layer, taken_on_trust
from fluffle.results import Confusion
from fluffle.shards import load_model
from workers.classes import recalls
from workers.definition import Definition
from workers.task import LearningTask, is_learning_task
from workers.tasks import CATALOGUE, find_object

FLTRUST = "fltrust"
GO_ON_FROM_BEFORE = ("fedsgd", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedasync", "diloco", "scaffold")
MEASURED = {
    "accuracy": ("loss", "accuracy", "macro_f1", "macro_recall"),
    "rmse": ("loss", "rmse", "mae"),
    "loss": ("loss",),
    "perplexity": ("loss", "perplexity"),
}


def run_defaults(*layers: Layer) -> Defaults:
    """The task's own settings as far as its code is at hand."""
    given = {name: value for layer in layers for name, (value, _) in layer.items()}
    trusted = taken_on_trust(*layers)

    def defaults(task: str) -> Any:
        if _is_self_sufficient(given.get("run.initial", ""), given.get("evaluation.mode", "central")):
            return trusted(task)
        if _is_plain(_task_named(task)):
            return trusted(task)
        from fluffle.learning import task_defaults

        return task_defaults(task)

    return defaults


def run_job(config: Config) -> Job:
    """The job of a deployed aggregator. Raises ConfigError for what cannot work."""
    initial = partial(load_model, Path(config.run.initial)) if config.run.initial else None
    if (
        initial is not None
        and config.strategy.name != FLTRUST
        and _is_self_sufficient(config.run.initial, config.evaluation.mode)
    ):
        initial()  # a missing file is told now
        return Job(config.run_settings(), initial, metric=config.evaluation.metric or "loss")
    task = _task_named(config.task)
    if _is_plain(task) and config.strategy.name == FLTRUST:
        raise ConfigError(
            "strategy.name = 'fltrust' needs a TaskDefinition: the aggregator trains on a part of its data"
        )
    if _is_plain(task):
        judge: LearningTask = task if is_learning_task(task) else task(AGGREGATOR, "")
        return _job(config, judge, initial, "loss")
    from fluffle.learning import shares_of

    check_metrics(config, task)
    task.check(config.train.chosen())
    check_strategy(config, task)
    needed = config.evaluation.mode == "central" or config.strategy.name == FLTRUST
    return _task_job(config, task, shares_of(config, task).held_out if needed else None, initial)


def task_job(config: Config, definition: Definition, held_out: Any, initial: Arrays) -> Job:
    """The job of a simulated aggregator: the examples that nobody trains on are at hand. `initial`: the model to
    begin with; empty: the task's own."""
    return _task_job(config, definition, held_out, (lambda: initial) if initial else None)


def _task_job(config: Config, definition: Definition, held_out: Any, initial: Any) -> Job:
    if config.strategy.name != FLTRUST:
        return _job(config, definition.bind(held_out=held_out), initial, definition.metric)
    from fluffle.learning import root_of

    root, rest = root_of(config, definition, held_out)
    return replace(_job(config, definition.bind(held_out=rest), initial, definition.metric), root=root)


def check_metrics(config: Config, definition: Definition) -> None:
    """Refuses to wait for a metric that nobody measures, with those that somebody does."""
    target = config.stop.target_metric.partition(":")[0]
    judged = config.evaluation.metric or (definition.metric if config.stop.patience else "")
    measured = _measured(config, definition, judged or definition.metric)
    if {target, judged} - {"", *measured}:
        measured += _recalls(config, definition)
    for setting, name in (
        ("stop.target_metric", target),
        ("evaluation.metric, which stop.patience needs,", judged),
    ):
        if name and name not in measured:
            raise ConfigError(
                f"{setting} is {name!r}, which task {definition.name!r} does not measure with evaluation.mode = "
                f"{config.evaluation.mode}: it measures {', '.join(measured)}"
            )


def _measured(config: Config, definition: Definition, judged: str) -> list[str]:
    """The metrics that a run's versions have. Fairness is that of the metric which judges them."""
    mode = config.evaluation.mode
    names = MEASURED[definition.metric] if mode != "none" else ()
    is_viewed = mode == "federated" and viewed(judged) in names
    return ["train_loss", *names, *(views_of(viewed(judged)) if is_viewed else ())]


def _recalls(config: Config, definition: Definition) -> list[str]:
    """Which classes have a metric of their own, found by measuring the initial model."""
    from fluffle.learning import evaluate

    if config.evaluation.mode != "central" or definition.metric != "accuracy":
        return []
    return list(recalls(evaluate(definition, definition.bind().initial()).confusion))


def confusion_of(config: Config, model: Path) -> Confusion | None:
    """Which classes the model takes for which, on the aggregator's held-out data; None if nobody can tell: for
    measured values, for participants' data, or for a model that diverged."""
    if config.evaluation.mode != "central" or not model.exists() or _is_plain(task := _task_named(config.task)):
        return None
    from fluffle.learning import evaluate

    try:
        found = evaluate(task, load_model(model)).confusion
    except (TaskError, DataError):
        return None
    return None if found is None else found.tolist()


def check_strategy(config: Config, definition: Definition) -> None:
    """Refuses to put together the means of an estimator, or federated statistics, in a way that does not give
    everybody's means."""
    from workers.estimators import EstimatorDefinition

    chosen = config.strategy
    if chosen.fragments > 1 and any("mean_square" in pattern for pattern in chosen.buffer_patterns):
        raise ConfigError(
            f"task {definition.name!r} standardises with federated statistics, which travel whole in round 1: set "
            "strategy.fragments to 1, or preprocess with a fixed reference"
        )
    whole = chosen.name not in GO_ON_FROM_BEFORE and chosen.server_lr in (0.0, 1.0) and not chosen.clip_norm
    by_examples = config.round.weights != "equal" and not config.round.is_buffered
    if isinstance(definition, EstimatorDefinition) and not (whole and by_examples):
        raise ConfigError(
            f"task {definition.name!r} needs the mean of all answers of a round, by examples: use strategy.name = "
            "fedavg (or a robust one), strategy.server_lr = 1, strategy.clip_norm = 0, round.policy = synchronous "
            "and round.weights = auto"
        )


def _job(config: Config, judge: LearningTask, initial: Any, metric: str) -> Job:
    def evaluate(arrays: Arrays) -> dict[str, float]:
        found = judge.evaluate(arrays)
        return {**found.metrics, **recalls(found.confusion)}

    return Job(
        settings=config.run_settings(),
        initial=initial or judge.initial,
        evaluate=evaluate if config.evaluation.mode == "central" else None,
        metric=config.evaluation.metric or metric,
    )


def _is_self_sufficient(initial: object, mode: object) -> bool:
    return bool(initial) and mode != "central"


def _is_plain(task: object) -> bool:
    """Whether it is no definition, but a learning task or what makes one."""
    return is_learning_task(task) or callable(task)


def _task_named(name: str) -> Any:
    if name in CATALOGUE and CATALOGUE[name].needs_torch and find_spec("torch") is None:
        raise ConfigError(
            f"torch is not installed here, which task {name!r} needs for its initial model and for evaluation: set "
            f"run.initial to what `fluffle initial {name} FILE` wrote, and evaluation.mode to federated or none"
        )
    return find_object(name)
