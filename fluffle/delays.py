"""How long simulated participants take, when they vanish, and when they are there: all drawn from the seed.

Nothing here waits or knows an event loop: it gives seconds. What is drawn for a piece of work depends on the seed,
the participant, the task and how often that was begun, never on the order in which participants draw.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.random import Generator

from broker.errors import ConfigError
from fluffle.traces import number, own_rows, read_rows

DRAWS = 4  # tells these random numbers from what else the seed decides
HALF_NORMAL_MEDIAN = 0.6744897501960817  # of |N(0, 1)|: the third quartile of N(0, 1)
DELAYS = "constant:SECONDS, half-normal:SCALE, log-normal:MEDIAN,SIGMA or trace:FILE"
WINDOWS = "ON/PERIOD, as 8h/24h or 300s/1h, or trace:FILE"
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"(\d+\.?\d*|\.\d+)([smhd]?)")


def generator(seed: int, what: str, participant: str, *numbers: int) -> Generator:
    """Random numbers for one purpose of one participant; `numbers`: the task, and how often it was begun."""
    own = int.from_bytes(hashlib.sha256(f"{what}/{participant}".encode()).digest()[:8], "big")
    return np.random.default_rng([seed, DRAWS, own, *numbers])


@dataclass(frozen=True, slots=True)
class Delay:
    """A distribution of seconds. `rows`: from a trace, what each participant takes in turn instead of a draw."""

    draw: Callable[[Generator], float]
    median_s: float
    rows: Mapping[str, Sequence[float]] | None = None

    def seconds(self, participant: str, count: int, random: Generator) -> float:
        """What the participant's piece of work number `count`, from 0 on, takes."""
        if self.rows is None:
            return self.draw(random)
        own = self.rows[participant]
        return own[count % len(own)]


def parse_delay(setting: str, text: str, participants: Sequence[str]) -> Delay:
    """A delay as a setting names it. Raises ConfigError for an unknown one, or a trace that cannot be used."""
    kind, _, argument = text.partition(":")
    if kind == "trace":
        return _traced_delay(Path(argument), participants)
    numbers = [number(part) for part in argument.split(",")]
    if all(0 < value < math.inf for value in numbers):
        match kind, numbers:
            case "constant", [seconds]:
                return Delay(lambda _: seconds, seconds)
            case "half-normal", [scale]:
                return Delay(lambda random: abs(random.normal(0.0, scale)), scale * HALF_NORMAL_MEDIAN)
            case "log-normal", [median_s, sigma]:
                return Delay(lambda random: random.lognormal(math.log(median_s), sigma), median_s)
    raise ConfigError(f"{setting} = {text!r}: write {DELAYS}, with numbers above 0")


def _traced_delay(file: Path, participants: Sequence[str]) -> Delay:
    """With the column `participant`, everybody takes its own seconds in turn; without, they are drawn from all."""
    rows = read_rows(file, ["delay_s"], ["participant", "delay_s"])
    for row in rows:
        if not row.seconds("delay_s"):
            row.refuse("delay_s is 0: write seconds above 0")
    values = [row.seconds("delay_s") for row in rows]
    median_s = float(np.median(values))
    if "participant" not in rows[0].values:
        return Delay(lambda random: values[random.integers(len(values))], median_s)
    own = {name: [row.seconds("delay_s") for row in rows] for name, rows in own_rows(rows, participants).items()}
    if missing := [name for name, seconds in own.items() if not seconds]:
        raise ConfigError(f"trace:{file}: has no line of {missing[0]}: give everybody one, or leave names out")
    return Delay(lambda _: median_s, median_s, own)


@dataclass(frozen=True, slots=True)
class Windows:
    """When a participant is there: `on_s` of every `period_s`, shifted by `phase_s`; or the `listed` windows, in
    order. Without either: always."""

    on_s: float = 0.0
    period_s: float = 0.0
    phase_s: float = 0.0
    listed: tuple[tuple[float, float], ...] | None = None

    def next(self, now: float) -> tuple[float, float] | None:
        """The rest of the window that `now` is in, or the next one; None if there will be none."""
        if self.listed is not None:
            return next(((max(now, begin), end) for begin, end in self.listed if end > now), None)
        if not self.period_s:
            return now, math.inf
        begin = math.floor((now + self.phase_s) / self.period_s) * self.period_s - self.phase_s
        if begin + self.on_s <= now:
            begin += self.period_s
        return max(now, begin), begin + self.on_s


def parse_windows(text: str, participants: Sequence[str], seed: int) -> dict[str, Windows]:
    """When each participant is there, as `simulation.available` says. Raises ConfigError."""
    if not text:
        return dict.fromkeys(participants, Windows())
    if text.startswith("trace:"):
        return _traced_windows(Path(text.removeprefix("trace:")), participants)
    parts = [duration_s(part) for part in text.split("/")]
    if len(parts) != 2 or not 0 < parts[0] <= parts[1]:
        raise ConfigError(f"simulation.available = {text!r}: write {WINDOWS}, with ON above 0 and up to PERIOD")
    on_s, period_s = parts
    if on_s == period_s:
        return dict.fromkeys(participants, Windows())
    phases = {name: generator(seed, "phase", name).uniform(0.0, period_s) for name in participants}
    return {name: Windows(on_s, period_s, phase_s) for name, phase_s in phases.items()}


def duration_s(text: str) -> float:
    """`90`, `90s`, `1.5m`, `8h` or `7d` in seconds; NaN if it is none."""
    found = DURATION.fullmatch(text.strip())
    return float(found[1]) * UNITS[found[2]] if found else math.nan


def _traced_windows(file: Path, participants: Sequence[str]) -> dict[str, Windows]:
    own = own_rows(read_rows(file, ["participant", "from_s", "until_s"]), participants)
    found = {}
    for name, rows in own.items():
        listed = [(row.seconds("from_s"), row.seconds("until_s")) for row in rows]
        for row, (begin, end) in zip(rows, listed, strict=True):
            if end <= begin:
                row.refuse(f"until_s is {end:g}: write one after from_s = {begin:g}")
        for row, ((_, end), (begin, _)) in zip(rows[1:], pairwise(listed), strict=True):
            if begin < end:
                row.refuse(f"from_s is {begin:g}, and {name} is there until {end:g}: sort the lines, or join them")
        found[name] = Windows(listed=tuple(listed))
    return found
