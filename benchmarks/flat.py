"""Whether what processes, queues and files hold stays flat: pure, from samples that were taken round by round.

Memory is judged life by life. A *life* is one process in one role, from one start or change of role to the next:
a leader holds more than a standby. Its slope is that of a least-squares line through the resident memory after a
warm-up. Samples that follow each other are alike, so the standard error is widened by the correlation r of
neighbouring residuals: sqrt((1 + r) / (1 - r)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from statistics import fmean, median

from benchmarks.probe import Usage

BROKER = "rabbitmq"
AGGREGATORS = ("leader", "standby")  # the names of processes; who leads is in the sample
MOST_CORRELATED = 0.95
THIRD = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """What everything held when `round` had just been closed. What did not answer is missing.

    `messages` are those ready in a queue or stream; `inside` is what RabbitMQ counts itself, and seldom there.
    """

    round: int
    at_s: float
    leader: str
    processes: Mapping[str, Usage]
    messages: Mapping[str, int] = field(default_factory=dict)
    disk_mb: Mapping[str, float] = field(default_factory=dict)
    inside: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is still flat. Names of queues and files are matched by their endings, the first one that fits."""

    life_rounds: int = 200  # after the warm-up; shorter lives are not judged
    warm_up_rounds: int = 150
    mb_per_1000_rounds: float = 3.0  # in any life; a thread that begins late takes 0.3 MB once
    together_mb_per_1000_rounds: float = 2.0  # in all lives of a role, with two standard errors
    broker_mb_per_1000_rounds: float = 15.0
    broker_together_mb_per_1000_rounds: float = 10.0
    more_fds: int = 3  # in the last third of a life than in its first
    more_threads: int = 3
    more_inside: float = 0.1  # connections, channels, processes of RabbitMQ: a share
    messages: Mapping[str, int] = field(default_factory=dict)
    disk_mb: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slope:
    """Per 1,000 rounds, with the standard error. The true one lies within two of these, most likely."""

    value: float
    error: float

    @property
    def most(self) -> float:
        return self.value + 2 * self.error


@dataclass(frozen=True, slots=True)
class Life:
    """One process in one role, without its warm-up: the rounds and what was held then."""

    name: str
    role: str
    pid: int
    began: int  # the first round that it was seen in
    rounds: tuple[int, ...]
    usages: tuple[Usage, ...]

    @property
    def length(self) -> int:
        """In rounds, without the warm-up."""
        return self.rounds[-1] - self.rounds[0] if self.rounds else 0

    @property
    def rss(self) -> Slope:
        return slope(self.rounds, [usage.rss_mb for usage in self.usages])

    @property
    def pss(self) -> Slope:
        return slope(self.rounds, [usage.pss_mb for usage in self.usages])

    def more(self, what: str) -> int:
        """How many more there are at most in the last third than in the first."""
        return grown([getattr(usage, what) for usage in self.usages])


def grown(values: Sequence[int]) -> int:
    third = max(1, len(values) // THIRD)
    return max(values[-third:]) - max(values[:third])


def slope(rounds: Sequence[int], values: Sequence[float]) -> Slope:
    """The least-squares line through at least three points, in units per 1,000 rounds."""
    x, y = [number / 1000 for number in rounds], list(values)
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    value = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = [b - mean_y - value * (a - mean_x) for a, b in zip(x, y, strict=True)]
    squares = sum(r * r for r in rest)
    error = math.sqrt(squares / (len(x) - 2) / spread)
    alike = sum(a * b for a, b in pairwise(rest)) / squares if squares else 0.0
    r = min(max(alike, 0.0), MOST_CORRELATED)
    return Slope(value, error * math.sqrt((1 + r) / (1 - r)))


def lives(samples: Sequence[Sample], limits: Limits) -> list[Life]:
    """Those that are long enough to be judged, by name and age."""
    names = sorted({name for sample in samples for name in sample.processes})
    found = [life for name in names for life in _lives_of(name, samples, limits.warm_up_rounds)]
    return [life for life in found if life.length >= limits.life_rounds and len(life.rounds) > THIRD]


def _lives_of(name: str, samples: Sequence[Sample], warm_up: int) -> Iterator[Life]:
    seen = [sample for sample in samples if name in sample.processes]
    for (role, pid), group in groupby(seen, lambda sample: (role_of(name, sample), sample.processes[name].pid)):
        whole = list(group)
        began = whole[0].round
        warm = [sample for sample in whole if sample.round >= began + warm_up]
        yield Life(
            name, role, pid, began, tuple(s.round for s in warm), tuple(s.processes[name] for s in warm)
        )  # fmt: skip


def role_of(name: str, sample: Sample) -> str:
    if name in AGGREGATORS:
        return "leader" if name == sample.leader else "standby"
    return BROKER if name == BROKER else "worker"


def pooled(slopes: Sequence[Slope]) -> Slope:
    """What several lives tell together: their mean, weighted by how sure each is."""
    weights = [1 / max(one.error, 1e-3) ** 2 for one in slopes]
    total = sum(weights)
    value = sum(weight * one.value for weight, one in zip(weights, slopes, strict=True)) / total
    return Slope(value, 1 / math.sqrt(total))


def by_role(found: Sequence[Life]) -> dict[str, list[Life]]:
    return {role: [life for life in found if life.role == role] for role in sorted({life.role for life in found})}


def faults_found(samples: Sequence[Sample], limits: Limits) -> list[str]:
    """All that is not flat, in words; empty if everything is."""
    found = lives(samples, limits)
    return [
        *_too_few(samples, found),
        *(words for life in found for words in _life_faults(life, limits)),
        *_pooled_faults(found, limits),
        *_above("messages in", [sample.messages for sample in samples], limits.messages),
        *_above("MiB of", [sample.disk_mb for sample in samples], limits.disk_mb),
        *_inside_faults(samples, limits),
    ]


def _too_few(samples: Sequence[Sample], found: Sequence[Life]) -> Iterator[str]:
    """Who was never judged was not found to be flat."""
    for name in sorted({name for sample in samples for name in sample.processes} - {life.name for life in found}):
        yield f"{name}: no life was long enough to be judged"


def _life_faults(life: Life, limits: Limits) -> Iterator[str]:
    who = f"{life.name} as {life.role} from round {life.began} to {life.rounds[-1]}"
    most = limits.broker_mb_per_1000_rounds if life.role == BROKER else limits.mb_per_1000_rounds
    if life.rss.value > most:
        yield f"{who}: memory grew by {life.rss.value:.2f} MB in 1,000 rounds"
    for what, most in (("fds", limits.more_fds), ("threads", limits.more_threads)):
        if (more := life.more(what)) > most:
            yield f"{who}: {more} more {what}"


def _pooled_faults(found: Sequence[Life], limits: Limits) -> Iterator[str]:
    for role, of_role in by_role(found).items():
        together = pooled([life.rss for life in of_role])
        own, other = limits.broker_together_mb_per_1000_rounds, limits.together_mb_per_1000_rounds
        if together.most > (most := own if role == BROKER else other):
            yield f"{role}, all lives together: up to {together.most:.2f} MB in 1,000 rounds, more than {most:g}"


def _above(what: str, seen: Sequence[Mapping[str, float]], limits: Mapping[str, float]) -> Iterator[str]:
    for name, most in largest(seen).items():
        limit = next((limit for ending, limit in limits.items() if name.endswith(ending)), None)
        if limit is not None and most > limit:
            yield f"{most:g} {what} {name}, more than {limit:g}"


def _inside_faults(samples: Sequence[Sample], limits: Limits) -> Iterator[str]:
    seen = [sample.inside for sample in samples if sample.inside]
    for name in seen[0] if len(seen) > THIRD else ():
        values = [one[name] for one in seen]
        if name != "erlang_mb" and grown(values) > limits.more_inside * max(values):
            yield f"rabbitmq: {grown(values)} more {name}"


def largest(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The most that each name ever had."""
    names = sorted({name for one in seen for name in one})
    return {name: max(one[name] for one in seen if name in one) for name in names}


def last(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What each name had when it was seen last."""
    return {name: value for one in seen for name, value in one.items()}


def summary(found: Sequence[Life]) -> dict[str, dict[str, float]]:
    """Memory by role: how many lives, their slopes in MB per 1,000 rounds, and all of them together."""
    return {role: _summary([life.rss for life in of_role]) for role, of_role in by_role(found).items()}


def _summary(slopes: Sequence[Slope]) -> dict[str, float]:
    values, together = [one.value for one in slopes], pooled(slopes)
    return {
        "lives": len(values), "median": round(median(values), 3), "largest": round(max(values), 3),
        "together": round(together.value, 3), "together_error": round(together.error, 3),
    }  # fmt: skip
