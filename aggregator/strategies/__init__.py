"""How updates are combined. A strategy sees arrays and weights, never transports, clocks or participants."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Literal, Protocol

from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies.adaptive import Adaptive, NextV, adagrad, adam, yogi
from aggregator.strategies.diloco import DiLoCo
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.fedavgm import FedAvgM
from aggregator.strategies.fednova import FedNova
from aggregator.strategies.fedsgd import FedSGD
from aggregator.strategies.optimiser import Rule, ServerOptimiser
from aggregator.sums import FixedPointSum
from broker.errors import ConfigError
from broker.tensors import Arrays, Named


class Strategy(Protocol):
    """One round: `start`, any number of `add`, `finish`. `wants` says what participants send.

    `state` is what outlives the round: after `finish` it belongs to the new model and is committed with it. Without
    any it is empty, always.
    """

    wants: Literal["delta", "gradient"]
    state: Arrays

    def start(self, model: Arrays, state: Arrays) -> None:
        """Begins a round that departs from this global model and the state that belongs to it, empty at version 0.

        If all of `state` is writable, `finish` may overwrite it and leave the same dict as `self.state`. Raises
        StateError if model or state cannot be gone on from.
        """

    def add(self, arrays: Named, weight: int, effective_steps: float = 0.0) -> None:
        """Takes one update, all or nothing; `effective_steps` as its sender says, 0 if it does not. Its arrays may
        be decoded anew whenever they are asked for.

        Raises BadMessage if it cannot be summed, or decoded.
        """

    def finish(self, out: Arrays | None = None) -> Arrays:
        """The new global model, written into `out`, if that is given: it may be the model of `start` itself. At
        least one update was added."""


Make = Callable[[FixedPointSum, StrategySettings], Strategy]


def _averaging(make: Callable[[FixedPointSum, float, Collection[str]], Strategy]) -> Make:
    return lambda total, chosen: make(total, chosen.server_lr or 1.0, chosen.buffer_patterns)


def _optimising(rule: Callable[[StrategySettings], Rule]) -> Make:
    return lambda total, chosen: ServerOptimiser(total, rule(chosen), chosen.buffer_patterns)


def _adaptive(next_v: NextV, server_lr: float) -> Make:
    return _optimising(lambda s: Adaptive(next_v, s.server_lr or server_lr, s.beta_1, s.beta_2, s.tau))


def _fednova(total: FixedPointSum, chosen: StrategySettings) -> Strategy:
    return FedNova(total, chosen.server_lr or 1.0, chosen.steps_max, chosen.buffer_patterns)


STRATEGIES: dict[str, Make] = {
    "fedavg": _averaging(FedAvg),
    "fedsgd": _averaging(FedSGD),
    "fedavgm": _optimising(lambda s: FedAvgM(s.server_lr or 1.0, s.momentum)),
    "fedadagrad": _adaptive(adagrad, 0.1),
    "fedadam": _adaptive(adam, 0.03),
    "fedyogi": _adaptive(yogi, 0.03),
    "fednova": _fednova,
    "diloco": _optimising(lambda s: DiLoCo(s.server_lr or 0.7, s.momentum)),
}
AT_PARTICIPANTS = {"fedprox": "strategy.name = 'fedavg' with train.mu = 0.01 (or another mu)"}


def make_strategy(settings: StrategySettings, rounds: RoundSettings) -> Strategy:
    """The strategy that the settings name. Raises ConfigError for an unknown one."""
    if settings.name in AT_PARTICIPANTS:
        raise ConfigError(
            f"strategy.name = {settings.name!r} is how participants train: set {AT_PARTICIPANTS[settings.name]}"
        )
    if settings.name not in STRATEGIES:
        near = difflib.get_close_matches(settings.name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(STRATEGIES))}"
        raise ConfigError(f"strategy.name = {settings.name!r} is unknown: {hint}")
    weight_cap = 2 * rounds.most_asked * rounds.max_examples  # twice: folded late updates add to a round's own
    return STRATEGIES[settings.name](FixedPointSum(rounds.max_examples, weight_cap), settings)
