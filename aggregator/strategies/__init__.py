"""How updates are combined. A strategy sees arrays, weights and participants' names, no transports or clocks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

from aggregator.room import available_bytes, where_there_is_room
from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies.adaptive import Adaptive, NextV, adagrad, adam, yogi
from aggregator.strategies.bulyan import Bulyan
from aggregator.strategies.clipping import Clipped
from aggregator.strategies.collected import Collected, RobustRule
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.diloco import DiLoCo
from aggregator.strategies.fedasync import FedAsync
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.fedavgm import FedAvgM
from aggregator.strategies.fednova import FedNova
from aggregator.strategies.fedsgd import FedSGD
from aggregator.strategies.fltrust import FLTrust
from aggregator.strategies.geometric_median import GeometricMedian
from aggregator.strategies.krum import Krum
from aggregator.strategies.lora_stack import LoraStack
from aggregator.strategies.median import Median
from aggregator.strategies.optimiser import Rule, ServerOptimiser
from aggregator.strategies.qfedavg import QFedAvg
from aggregator.strategies.scaffold import Scaffold
from aggregator.strategies.trimmed_mean import TrimmedMean
from aggregator.sums import FixedPointSum
from broker.errors import ConfigError
from broker.messages import Settings, Wants
from broker.tensors import Arrays, Named


class Strategy(Protocol):
    """One round: `start`, any number of `add`, `finish`. `wants` says what participants send; what `uses_disk` is
    not for the event loop."""

    wants: Wants
    uses_disk: bool

    @property
    def state(self) -> Arrays:
        """What outlives the round: after `finish` it belongs to the new model and is committed with it. Without any
        it is empty, always."""

    def start(self, model: Arrays, state: Arrays) -> None:
        """Begins a round that departs from this global model and the state that belongs to it, empty at version 0.

        If all of `state` is writable, `finish` may overwrite it and leave the same dict as `self.state`. Raises
        StateError if model or state cannot be gone on from.
        """

    def add(self, arrays: Named, by: Contribution) -> None:
        """Takes one update, all or nothing. Its arrays may be decoded anew whenever they are asked for.

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
    "fedasync": lambda total, chosen: FedAsync(total, chosen.server_lr or 0.6),
    "fednova": _fednova,
    "diloco": _optimising(lambda s: DiLoCo(s.server_lr or 0.7, s.momentum)),
}
SPECIAL = ("scaffold", "q-fedavg", "fltrust", "lora-stack")
NEED_PLAIN_STEPS: dict[str, dict[str, float | str]] = {
    "scaffold": {"optimiser": "sgd", "momentum": 0.0, "mu": 0.0},
    "fednova": {"optimiser": "sgd"},
}
ELSEWHERE = {
    "fedprox": "how participants train: set strategy.name = 'fedavg' with train.mu = 0.01 (or another mu)",
    "fedbuff": "when a version is made: set round.policy = 'buffered' and round.buffer, with strategy.name = "
    "'fedavg' (or one with momentum)",
}

ROBUST: dict[str, Callable[[StrategySettings], RobustRule]] = {
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
    if settings.clip_norm and strategy.wants == "delta+control":
        raise ConfigError(
            "strategy.clip_norm with scaffold: a control variate would no longer be the mean gradient of the steps "
            "that count: set strategy.clip_norm to 0, or use another strategy"
        )
    return Clipped(strategy, settings.clip_norm) if settings.clip_norm else strategy


def check_training(name: str, train: Settings, rounds: RoundSettings) -> None:
    """Raises ConfigError if participants train in a way that the strategy's formula, or the policy, does not hold
    for."""
    if rounds.is_buffered and train.get("optimiser", "sgd") != "sgd":
        raise ConfigError(
            f"train.optimiser = {train['optimiser']!r} goes on from its last state once that update was counted, "
            "and with round.policy = 'buffered' nobody waits for that: use sgd"
        )
    if name in NEED_PLAIN_STEPS:
        for setting, plain in NEED_PLAIN_STEPS[name].items():
            if train.get(setting, plain) != plain:
                raise ConfigError(
                    f"strategy.name = {name!r} needs participants that descend by plain gradients, and "
                    f"train.{setting} is {train[setting]!r}: set it to {plain!r}, or use another strategy"
                )


def _one_vote_each(rounds: RoundSettings, scratch: Path | None) -> FixedPointSum:
    return FixedPointSum(1, 2 * rounds.most_asked, where_there_is_room(scratch, available_bytes))


def _weighted(rounds: RoundSettings, scratch: Path | None) -> FixedPointSum:
    most = rounds.most_summed * rounds.weight_max
    return FixedPointSum(rounds.weight_max, most, where_there_is_room(scratch, available_bytes))


def _strategy(settings: StrategySettings, rounds: RoundSettings, scratch: Path | None) -> Strategy:
    if rounds.is_buffered and (settings.name in ROBUST or settings.name in SPECIAL):
        raise ConfigError(
            f"strategy.name = {settings.name!r} takes one update of each participant, and with round.policy = "
            "'buffered' some deliver twice: use synchronous rounds, with round.late = 'fold' if some are slow"
        )
    if settings.name == "scaffold":
        return Scaffold(rounds.participants, _one_vote_each(rounds, scratch), settings)
    if settings.name == "lora-stack":
        return LoraStack(_weighted(rounds, scratch), scratch)
    if settings.name == "q-fedavg":
        return _qfedavg(settings, scratch)
    if settings.name == "fltrust":
        return FLTrust(None, settings.server_lr or 1.0, settings.buffer_patterns, scratch)
    if settings.name in ROBUST:
        rule = ROBUST[settings.name](settings)
        _check_size(rule.least, settings, rounds)
        return Collected(rule, settings.server_lr or 1.0, settings.buffer_patterns, scratch)
    if settings.name in STRATEGIES:
        return STRATEGIES[settings.name](_weighted(rounds, scratch), settings)
    if settings.name in ELSEWHERE:
        raise ConfigError(f"strategy.name = {settings.name!r} is {ELSEWHERE[settings.name]}")
    raise ConfigError(
        f"strategy.name = {settings.name!r} is unknown: {_near(settings.name, [*STRATEGIES, *SPECIAL, *ROBUST])}"
    )


def _qfedavg(settings: StrategySettings, scratch: Path | None) -> Strategy:
    if not settings.lipschitz:
        raise ConfigError(
            "strategy.name = 'q-fedavg' needs the participants' step size: set train.lr, or strategy.lipschitz to "
            "1 / that"
        )
    return QFedAvg(settings, settings.buffer_patterns, scratch)


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
