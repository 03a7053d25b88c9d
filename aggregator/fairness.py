"""How evenly a model serves the participants: one metric of a federated evaluation, over those who answered.

Each participant counts once, whatever its number of examples: the mean over examples hides whom a model fails. The
views are those of q-FFL (Li et al., 2020): mean, worst tenth, and spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from aggregator.ledger import LONGEST_NAME
from aggregator.progress import lower_is_better
from broker.messages import Metrics

VIEWS = ("mean", "worst_10", "std", "min", "max")


def views_of(metric: str) -> tuple[str, ...]:
    """What the views of a metric are called: `accuracy_mean`, `accuracy_worst_10`, ..."""
    return tuple(f"{metric}_{view}" for view in VIEWS)


def viewed(metric: str) -> str:
    """The metric that a name is a view of: `accuracy` for `accuracy_worst_10`, and for itself."""
    return next((metric.removesuffix(f"_{view}") for view in VIEWS if metric.endswith(f"_{view}")), metric)


def fairness(reports: Mapping[str, tuple[int, Metrics]], metric: str) -> Metrics:
    """The views of `metric`, or of the one that it is a view of; nothing if nobody reported it.

    `worst_10` is the mean of the worst tenth (at least one participant), `std` the population's standard deviation.
    A view beyond all floats, or with a name that is too long, is left out: participants may report anything finite.
    """
    name = metric if any(metric in metrics for _, metrics in reports.values()) else viewed(metric)
    values = sorted(metrics[name] for _, metrics in reports.values() if name in metrics)
    if not values:
        return {}
    tenth = -(-len(values) // 10)
    worst = values[-tenth:] if lower_is_better(name) else values[:tenth]
    found = (_mean(values), _mean(worst), _std(values), values[0], values[-1])
    told = zip(views_of(name), found, strict=True)
    return {view: value for view, value in told if math.isfinite(value) and len(view) <= LONGEST_NAME}


def _mean(values: list[float]) -> float:
    return math.fsum(value / len(values) for value in values)


def _std(values: list[float]) -> float:
    mean = _mean(values)
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values))
