"""Participants that attack, for studies of robust strategies: what they send is not what they learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import ConfigError
from broker.messages import TrainRound
from workers.task import Arrays, Evaluation, LearningTask, TrainConfig, TrainResult

ATTACK_DRAWS = 2  # tells an attack's random numbers from those of training and codecs

LABEL_FLIP = "label-flip"

Change = NDArray[Any]
Forge = Callable[[Change, float, np.random.Generator], Change]


def _sign_flip(change: Change, scale: float, _: np.random.Generator) -> Change:
    """The opposite of what was learned, `scale` times as long."""
    return -scale * change


def _gaussian(change: Change, sigma: float, rng: np.random.Generator) -> Change:
    """Normal noise of deviation `sigma` in place of what was learned (Blanchard et al., 2017, section 5)."""
    return rng.normal(0.0, sigma, change.shape)


def _little(change: Change, z: float, _: np.random.Generator) -> Change:
    """A shift by `z` standard deviations, the same way at every attacker, that hides among what honest ones send.

    After Baruch et al., 2019 (A Little Is Enough), who take mean and deviation of each value over participants.
    One worker does not know the others, so here they are the tensor's own.
    """
    return change - z * float(change.std())


SPELLINGS = "label-flip, sign-flip:SCALE, gaussian:SIGMA or little:Z"
ATTACKS: Mapping[str, Forge] = {"sign-flip": _sign_flip, "gaussian": _gaussian, "little": _little}


@dataclass(frozen=True, slots=True)
class Attack:
    """What is done to floating-point tensors, and how much of it; integers stay as they were learned."""

    forge: Forge
    strength: float

    @classmethod
    def named(cls, text: str) -> Attack:
        """The attack that `sign-flip:10` names. Raises ConfigError."""
        name, _, strength = text.partition(":")
        try:
            found = cls(ATTACKS[name], float(strength))
        except (KeyError, ValueError):
            found = None
        if found is None or not 0 < found.strength < float("inf"):
            raise ConfigError(f"attack {text!r} is unknown: write {SPELLINGS}")
        return found


class Attacker:
    """A learning task whose training is honest and whose result is forged. The same seed forges the same."""

    def __init__(self, task: LearningTask, attack: Attack) -> None:
        self._task, self._attack = task, attack
        self.name, self.num_examples = task.name, task.num_examples

    def initial(self) -> Arrays:
        return self._task.initial()

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        result = self._task.train(arrays, config)
        rng = np.random.default_rng([config.seed, ATTACK_DRAWS])
        forged = {name: self._forged(name, result.arrays, arrays, config, rng) for name in sorted(result.arrays)}
        return replace(result, arrays=forged)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return self._task.evaluate(arrays)

    def _forged(
        self, name: str, learned: Arrays, base: Arrays, config: TrainConfig, rng: np.random.Generator
    ) -> NDArray[Any]:
        values = learned[name]
        if values.dtype.kind != "f" or not values.size:
            return values
        start = base[name].astype(np.float64) if config.wants != "gradient" else 0.0
        forged = start + self._attack.forge(values - start, self._attack.strength, rng)
        return np.asarray(forged, values.dtype)


def mislabelled(task: LearningTask) -> LearningTask:
    """The same task on labels y -> classes - 1 - y, trained honestly (Fang et al., 2020, section 4.2).

    Raises ConfigError if it is no TaskDefinition's with classes.
    """
    flip = getattr(task, "with_flipped_labels", None)
    if flip is None:
        raise ConfigError(
            f"attack {LABEL_FLIP}: task {task.name!r} is no TaskDefinition's, whose labels can be flipped"
        )
    flipped: LearningTask = flip()
    return flipped


def check_attack(attack: str) -> None:
    """Raises ConfigError if there is no such attack."""
    if attack and attack != LABEL_FLIP:
        Attack.named(attack)


def attacking(task_for: Callable[[TrainRound], LearningTask], attack: str) -> Callable[[TrainRound], LearningTask]:
    """The same tasks, with forged results; as they are if no attack is named. Raises ConfigError."""
    if not attack:
        return task_for
    if attack == LABEL_FLIP:
        return lambda told: mislabelled(task_for(told))
    chosen = Attack.named(attack)
    return lambda told: Attacker(task_for(told), chosen)
