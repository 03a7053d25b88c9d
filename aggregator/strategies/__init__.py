"""How updates are combined. A strategy sees arrays, weights and participants' names, no transports or clocks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies.bulyan import Bulyan
from aggregator.strategies.clipping import Clipped
from aggregator.strategies.collected import Collected, Rule
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.fedsgd import FedSGD
from aggregator.strategies.geometric_median import GeometricMedian
from aggregator.strategies.krum import Krum
from aggregator.strategies.median import Median
from aggregator.strategies.trimmed_mean import TrimmedMean
from aggregator.sums import FixedPointSum
from broker.errors import ConfigError
from broker.tensors import Arrays


class Strategy(Protocol):
    """One round: `start`, any number of `add`, `finish`. `wants` says what participants send; what `uses_disk` is
    not for the event loop."""

    wants: Literal["delta", "gradient"]
    uses_disk: bool

    def start(self, model: Arrays) -> None:
        """Begins a round that departs from this global model."""

    def add(self, arrays: Arrays, weight: int, participant: str) -> None:
        """Takes one update, all or nothing. Raises BadMessage if its values cannot be summed."""

    def finish(self, out: Arrays | None = None) -> Arrays:
        """The new global model, written into `out`, if that is given: it may be the model of `start` itself. At
        least one update was added."""


STRATEGIES: dict[str, Callable[[FixedPointSum, float], Strategy]] = {"fedavg": FedAvg, "fedsgd": FedSGD}

RULES: dict[str, Callable[[StrategySettings], Rule]] = {
    "median": lambda asked: Median(asked.byzantine),
    "trimmed-mean": lambda asked: TrimmedMean(asked.byzantine),
    "krum": lambda asked: Krum(asked.byzantine),
    "multi-krum": lambda asked: Krum(asked.byzantine, asked.keep),
    "bulyan": lambda asked: Bulyan(asked.byzantine),
    "geometric-median": lambda asked: GeometricMedian(asked.byzantine),
}


def make_strategy(settings: StrategySettings, rounds: RoundSettings, scratch: Path | None = None) -> Strategy:
    """The strategy that the settings name. `scratch`: where it may put files without a name; None: where the system
    puts temporary ones. Raises ConfigError for an unknown one, or rounds that are too small for what it bears."""
    strategy = _strategy(settings, rounds, scratch)
    return Clipped(strategy, settings.clip_norm) if settings.clip_norm else strategy


def _strategy(settings: StrategySettings, rounds: RoundSettings, scratch: Path | None) -> Strategy:
    if settings.name in RULES:
        rule = RULES[settings.name](settings)
        _check_size(rule.least, settings, rounds)
        return Collected(rule, settings.server_lr, scratch)
    if settings.name in STRATEGIES:
        weight_cap = 2 * rounds.most_asked * rounds.max_examples  # twice: folded late updates add to a round's own
        return STRATEGIES[settings.name](FixedPointSum(rounds.max_examples, weight_cap), settings.server_lr)
    raise ConfigError(
        f"strategy.name = {settings.name!r} is unknown: {_near(settings.name, [*STRATEGIES, *RULES])}"
    )


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


def _check_size(least: int, settings: StrategySettings, rounds: RoundSettings) -> None:
    """A round that closes has at least its quorum of updates, so the quorum is where a small cohort is refused."""
    if rounds.quorum >= least:
        return
    kept = f" and keeps strategy.keep = {settings.keep}" if settings.name == "multi-krum" and settings.keep else ""
    needs = (
        f"strategy.name = {settings.name!r} with strategy.byzantine = {settings.byzantine}{kept} needs at least "
        f"{least} updates in every round"
    )
    if rounds.participants < least:
        raise ConfigError(
            f"{needs}, and round.participants is {rounds.participants}: add participants, or lower "
            f"strategy.byzantine{' or strategy.keep' if kept else ''}"
        )
    raise ConfigError(
        f"{needs}, and round.quorum is {rounds.quorum}: set round.quorum (--quorum) to {least} or more, with "
        "round.target and round.cohort not below it"
    )
