"""How updates are combined. A strategy sees arrays and weights, never transports, clocks or participants."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal, Protocol

from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.fedsgd import FedSGD
from aggregator.sums import FixedPointSum
from broker.errors import ConfigError
from broker.tensors import Arrays, Named


class Strategy(Protocol):
    """One round: `start`, any number of `add`, `finish`. `wants` says what participants send."""

    wants: Literal["delta", "gradient"]

    def start(self, model: Arrays) -> None:
        """Begins a round that departs from this global model."""

    def add(self, arrays: Named, weight: int) -> None:
        """Takes one update, all or nothing; its arrays may be decoded anew whenever they are asked for. Raises
        BadMessage if its values cannot be summed, or decoded."""

    def finish(self, out: Arrays | None = None) -> Arrays:
        """The new global model, written into `out`, if that is given: it may be the model of `start` itself. At
        least one update was added."""


STRATEGIES: dict[str, Callable[[FixedPointSum, float], Strategy]] = {"fedavg": FedAvg, "fedsgd": FedSGD}


def make_strategy(settings: StrategySettings, rounds: RoundSettings) -> Strategy:
    """The strategy that the settings name. Raises ConfigError for an unknown one."""
    if settings.name not in STRATEGIES:
        near = difflib.get_close_matches(settings.name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(STRATEGIES))}"
        raise ConfigError(f"strategy.name = {settings.name!r} is unknown: {hint}")
    weight_cap = 2 * rounds.most_asked * rounds.max_examples  # twice: folded late updates add to a round's own
    return STRATEGIES[settings.name](FixedPointSum(rounds.max_examples, weight_cap), settings.server_lr)
