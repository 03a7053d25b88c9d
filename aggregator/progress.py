"""What comes after a closed round: pure decisions on evaluation, the best version, and the end of a run."""

from __future__ import annotations

from aggregator.settings import EvaluationSettings, RunSettings
from broker.errors import ConfigError
from broker.head import Best, HeadRecord

LOWER_IS_BETTER = frozenset({"loss", "rmse", "mse", "mae", "error", "perplexity", "std"})


def evaluation_due(settings: RunSettings, mode: str, round: int) -> bool:  # noqa: A002 - the design's word
    """Every n-th round, and the last that there can be."""
    wanted: EvaluationSettings = settings.evaluation
    return wanted.mode == mode and (round % wanted.every == 0 or round >= settings.stop.rounds)


def improves(metric: str, value: float, on: float) -> bool:
    return value < on if lower_is_better(metric) else value > on


def lower_is_better(metric: str) -> bool:
    """By the words of its name: of `train_loss`, `rmse`, `loss_worst_10` and `accuracy_std` less is better."""
    return not LOWER_IS_BETTER.isdisjoint(metric.split("_"))


def best_of(record: HeadRecord, metric: str) -> Best | None:
    """The best version now that `record`'s model was measured."""
    value, best = record.metrics[metric], record.best
    if record.model is None or (best and not improves(metric, value, best.value)):
        return best
    return Best(version=record.version, round=record.round, value=value, sha256=record.model.sha256)


def why_finished(record: HeadRecord, settings: RunSettings, now: float) -> str:
    """Why the run ends after the round that `record` closed and measured, or nothing."""
    stop = settings.stop
    if record.wanted == "stop":
        return "stopped by the operator"
    if stop.target_metric and _reached(stop.target_metric, record.metrics):
        return f"reached {stop.target_metric}"
    if record.round >= stop.rounds:
        return f"all {stop.rounds} rounds done"
    if (
        stop.patience
        and record.best
        and record.round - record.best.round >= stop.patience * settings.evaluation.every
    ):
        return f"no better version for {stop.patience} evaluations"
    if stop.max_seconds and now - record.started >= stop.max_seconds:
        return f"{stop.max_seconds:g} seconds passed"
    return ""


def parse_target(target: str) -> tuple[str, float]:
    """`accuracy:0.9` as name and value. Raises ConfigError."""
    name, _, value = target.partition(":")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(
            f"stop.target_metric = {target!r}: write it as NAME:VALUE, such as accuracy:0.9"
        ) from None


def _reached(target: str, metrics: dict[str, float]) -> bool:
    name, wanted = parse_target(target)
    return name in metrics and not improves(name, wanted, metrics[name])
