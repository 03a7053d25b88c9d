"""How one participant fine-tunes: the settings `train.*` that `Recipe` does not have. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from broker.errors import ConfigError
from workers.recipe import Recipe, recipe
from workers.task import Scalar

Precision = Literal["float32", "bfloat16"]
LEFT_OUT = ("augment", "mixup")  # are for images, and for inputs that are numbers


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is particular to large models. Raises ConfigError for a value that cannot work.

    `micro_batch`: most examples in one pass; the gradients of the passes are added up to that of `batch_size`
    examples, so it changes memory, and bits, but not what is learned. 0: one pass. `clip`: the norm of all
    gradients together is at most this; 0: not clipped.

    `checkpointing` computes activations again in the backward pass instead of keeping them. `precision` bfloat16
    runs the passes under autocast; the parameters and what travels stay float32.
    """

    micro_batch: int = 0
    clip: float = 0.0
    checkpointing: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("micro_batch", "clip"):
            _demand(name, getattr(self, name), "0 or more", fits=0 <= getattr(self, name) < math.inf)
        _demand(
            "precision",
            self.precision,
            " or ".join(get_args(Precision)),
            fits=self.precision in get_args(Precision),
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """All settings of one piece of training."""

    recipe: Recipe
    tuning: Tuning


def choose(settings: Mapping[str, Scalar]) -> Chosen:
    """The settings of both kinds. Raises ConfigError for an unknown name or a value that cannot work."""
    own = {field.name: field.default for field in fields(Tuning)}
    plain = recipe({name: value for name, value in settings.items() if name not in own})
    for name in LEFT_OUT:
        if name in plain.remedies:
            raise ConfigError(f"setting train.{name} does not go with text: leave it out")
    values: dict[str, Any] = {
        name: _value(name, value, type(own[name])) for name, value in settings.items() if name in own
    }
    return Chosen(plain, Tuning(**values))


def _value(name: str, value: Scalar, kind: type) -> Scalar:
    if kind is float and type(value) is int:
        return float(value)
    if kind is bool and value in (0, 1, "true", "false"):  # a run's settings are numbers and words
        return value in (1, "true")
    if type(value) is not kind:
        raise ConfigError(f"setting train.{name} = {value!r} is no {kind.__name__}")
    return value


def _demand(name: str, value: object, wanted: str, *, fits: bool) -> None:
    if not fits:
        raise ConfigError(f"setting train.{name} = {value} must be {wanted}")
