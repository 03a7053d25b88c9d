"""How one participant trains: the run's settings `train.*`, checked. Needs no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from broker.errors import ConfigError
from workers.augment import Augment
from workers.imbalance import check_sampling, check_weights
from workers.task import Scalar

SGD, ADAMW = "sgd", "adamw"
CONSTANT, LINEAR, COSINE = SCHEDULES = ("constant", "linear", "cosine")
REMEDIES = ("class_weights", "sampling", "focal_gamma", "augment", "mixup")
LARGEST = 1e6  # what float32 can still multiply by


@dataclass(frozen=True, slots=True)
class Recipe:
    """Stochastic gradient descent, or AdamW. Raises ConfigError for a value that cannot work.

    `batch_size` 0 is the full batch. `l2` is alpha in the penalty alpha / 2 * ||w||^2. `momentum` starts anew each
    round. `mu` pulls the parameters back to those of the round's start, x, with mu / 2 * ||w - x||^2 (FedProx, Li
    et al., 2020). `optimiser` "adamw" takes AdamW's steps, with `beta_1`, `beta_2`, `eps` and `weight_decay`, and
    goes on from round to round (`optimisers.py`). `max_steps` and `max_seconds` end local training early, after at
    least one step; 0 is no limit. `save_seconds`: how often progress is saved, for a worker that is killed in the
    middle; 0: never.

    A step's size is `lr` times `scale(t)`, where t counts rounds: it is 1.5 in the middle of round 2. So all
    participants have the same at the same part of a round, whatever their number of steps. It rises from 0 over
    `warmup_rounds`, and then stays, or falls to 0 at `schedule_rounds`: in a straight line, or as half a cosine.

    `REMEDIES` are off by default: against classes of unequal size (`imbalance.py`) and too few examples.
    """

    lr: float = 0.1
    batch_size: int = 32
    local_epochs: int = 1
    l2: float = 0.0
    momentum: float = 0.0
    max_steps: int = 0
    mu: float = 0.0
    max_seconds: float = 0.0
    optimiser: str = SGD
    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    class_weights: str = ""
    sampling: str = ""
    focal_gamma: float = 0.0
    augment: str = ""
    mixup: float = 0.0
    save_seconds: float = 60.0
    warmup_rounds: float = 0.0
    schedule: str = CONSTANT
    schedule_rounds: float = 0.0

    def __post_init__(self) -> None:
        _demand("lr", self.lr, f"above 0 and at most {LARGEST:g}", fits=0 < self.lr <= LARGEST)
        _demand("batch_size", self.batch_size, "0 (full batch) or more", fits=self.batch_size >= 0)
        _demand("local_epochs", self.local_epochs, "1 or more", fits=self.local_epochs >= 1)
        _demand("l2", self.l2, f"0 to {LARGEST:g}", fits=0 <= self.l2 <= LARGEST)
        _demand("momentum", self.momentum, "in [0, 1)", fits=0 <= self.momentum < 1)
        _demand("max_steps", self.max_steps, "0 (no limit) or more", fits=self.max_steps >= 0)
        _demand(
            "mu",
            self.mu,
            f"0 to 1 / train.lr = {1 / self.lr:g}, or it overshoots",
            fits=0 <= self.mu * self.lr <= 1,
        )
        _demand("optimiser", self.optimiser, f"{SGD} or {ADAMW}", fits=self.optimiser in (SGD, ADAMW))
        _demand("momentum", self.momentum, "0 with adamw", fits=not self.momentum or self.optimiser == SGD)
        for name in ("beta_1", "beta_2"):
            _demand(name, getattr(self, name), "in [0, 1)", fits=0 <= getattr(self, name) < 1)
        _demand("eps", self.eps, "above 0 and at most 1", fits=0 < self.eps <= 1)
        decays = self.weight_decay * self.lr if self.optimiser == ADAMW else 0.0
        _demand("weight_decay", self.weight_decay, "0 to 1 / train.lr", fits=self.weight_decay >= 0 and decays < 1)
        _demand("max_seconds", self.max_seconds, "0 (no limit) or more", fits=0 <= self.max_seconds < math.inf)
        _demand("save_seconds", self.save_seconds, "0 (never) or more", fits=0 <= self.save_seconds < math.inf)
        for name in ("warmup_rounds", "schedule_rounds"):
            _demand(name, getattr(self, name), "0 or more", fits=0 <= getattr(self, name) < math.inf)
        _demand("schedule", self.schedule, " or ".join(SCHEDULES), fits=self.schedule in SCHEDULES)
        if self.schedule != CONSTANT and self.schedule_rounds <= self.warmup_rounds:
            raise ConfigError(
                f"setting train.schedule = {self.schedule} needs train.schedule_rounds above train.warmup_rounds = "
                f"{self.warmup_rounds:g}: set it to the number of rounds"
            )
        _demand("focal_gamma", self.focal_gamma, "0 (off) to 20", fits=0 <= self.focal_gamma <= 20)
        _demand("mixup", self.mixup, "0 (off) to 100", fits=0 <= self.mixup <= 100)
        if self.class_weights:
            check_weights(self.class_weights)
        if self.sampling:
            check_sampling(self.sampling)
        if self.augment:
            Augment.parsed(self.augment)

    @property
    def remedies(self) -> tuple[str, ...]:
        """The names of those that are on."""
        return tuple(name for name in REMEDIES if getattr(self, name))

    @property
    def is_scheduled(self) -> bool:
        """Whether steps differ in size."""
        return self.schedule != CONSTANT or self.warmup_rounds > 0

    def scale(self, rounds: float) -> float:
        """The size of a step after so many rounds, in units of `lr`: in [0, 1]."""
        if rounds < self.warmup_rounds:
            return rounds / self.warmup_rounds
        if self.schedule == CONSTANT:
            return 1.0
        left = (self.schedule_rounds - rounds) / (self.schedule_rounds - self.warmup_rounds)
        left = min(1.0, max(0.0, left))
        return left if self.schedule == LINEAR else (1 - math.cos(math.pi * left)) / 2

    def scales(self, round: int, examples: int) -> list[float]:  # noqa: A002 - the design's word
        """The scale of each of a round's steps with so many examples, in the middle of it, so that none is 0."""
        steps = self.steps(examples)
        return [self.scale(round - 1 + (step + 0.5) / steps) for step in range(steps)]

    def steps(self, examples: int) -> int:
        """The steps of a round with so many examples, if no time runs out and no sampling changes their number."""
        batches = -(-examples // (self.batch_size or examples)) * self.local_epochs
        return min(batches, self.max_steps or batches)

    def effective_steps(self, steps: int, scales: Sequence[float] = ()) -> float:
        """What a constant gradient of 1 moves the parameters by in so many steps, in units of `lr`: `steps`, more
        with momentum, less with `mu`; `scales` are each step's size in units of `lr`, if they differ. It is the
        norm of a_i in FedNova (Wang et al., 2020, section 4). For AdamW, whose steps do not depend on the
        gradient's size, it is not known: 0."""
        if self.optimiser == ADAMW:
            return 0.0
        speed = moved = 0.0
        for scale in scales or (1.0,) * steps:
            speed = self.momentum * speed + 1 - self.mu * self.lr * moved
            moved += scale * speed
        return moved if scales else max(1.0, moved)


def recipe(settings: Mapping[str, Scalar]) -> Recipe:
    """The recipe in these settings. Raises ConfigError for an unknown name or a value of the wrong type."""
    wanted: dict[str, type] = {field.name: type(field.default) for field in fields(Recipe)}
    values: dict[str, int | float | str] = {}
    for name, value in settings.items():
        if name not in wanted:
            raise ConfigError(
                f"setting train.{name} is unknown{_near(name, wanted)}: there are {', '.join(wanted)}"
            )
        values[name] = _value(name, value, wanted[name])
    return Recipe(**values)  # type: ignore[arg-type]  # _value returned what each field wants


def _value(name: str, value: Scalar, kind: type) -> int | float | str:
    if kind is str and isinstance(value, str):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(f"setting train.{name} = {value!r} is not {KINDS[kind]}")


def _near(name: str, known: Mapping[str, type]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean train.{near[0]}?" if near else ""


KINDS: Mapping[type, str] = {int: "a whole number", float: "a number", str: "a word"}


def _demand(name: str, value: float | str, wanted: str, *, fits: bool) -> None:
    if not fits:
        raise ConfigError(f"setting train.{name} = {value} must be {wanted}")
