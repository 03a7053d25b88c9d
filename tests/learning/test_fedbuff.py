"""FedBuff (Nguyen et al., 2022, Algorithm 1) against the paper, and each mistake that others made, caught.

Arrivals are given one after the other, so that a run can be followed by hand. The round, the judge and the strategy
are the real ones; what stands between them here is the daemon's `_update` and `_fold` without messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

import aggregator.judge as judging
from aggregator import plan
from aggregator.judge import Judgement
from aggregator.round import Round
from aggregator.settings import RunSettings
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.sums import FixedPointSum
from broker.errors import BadMessage
from broker.head import HeadRecord
from broker.messages import UpdateReady, Where
from broker.tensors import Named
from tests.federation import names, settings

K, STALENESS_MAX = 3, 2
BODY = Where(where="inline", size_bytes=3, sha256="c" * 64)


class Arrival(NamedTuple):
    """An update: who sends it, the version that it started from, its change, its examples."""

    participant: str
    version: int
    change: float
    examples: int = 100


# Three fresh; two stale and one fresh; all stale; one too old, then one with many examples among others.
ARRIVALS = [
    Arrival("p01", 0, 1.0), Arrival("p02", 0, -0.5), Arrival("p03", 0, 2.0),
    Arrival("p04", 0, 4.0), Arrival("p01", 1, 1.0), Arrival("p05", 0, -1.0),
    Arrival("p06", 0, 3.0), Arrival("p02", 1, 2.0), Arrival("p03", 1, 1.5),
    Arrival("p07", 0, 9.0), Arrival("p04", 3, 1.0, 100_000), Arrival("p01", 2, 2.0), Arrival("p05", 3, 0.5),
]  # fmt: skip


def by_paper(eta: float) -> list[float]:
    """x after each version: buffer += s(tau) Delta, and when it holds K of them x += eta buffer / K."""
    x, buffer, k, versions = 0.0, 0.0, 0, []
    for arrival in ARRIVALS:
        tau = len(versions) - arrival.version
        if tau > STALENESS_MAX:
            continue
        buffer, k = buffer + arrival.change / math.sqrt(1 + tau), k + 1
        if k == K:
            x, buffer, k = x + eta * buffer / K, 0.0, 0
            versions.append(x)
    return versions


def change(trained: float, start: float, current: float) -> float:
    """What a participant sends: what it trained, minus the version that it started from."""
    return trained - start


class Run:
    """The product's own parts, from one arrival to the next."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings, self.strategy = settings, make_strategy(settings.strategy, settings.round)
        self.x, self.firsts = [0.0], [0]
        self.head, self.round = self._opened(HeadRecord(run_id="run-1", model=model_at(0)))

    def _opened(self, record: HeadRecord) -> tuple[HeadRecord, Round]:
        head = plan.opened(record, "train", names(8), self.settings, 0.0)
        assert head.open
        self.firsts[len(self.x) - 1 :] = [head.open.task]
        self.strategy.start({"w": np.full(2, self.x[-1])}, {})
        return head, plan.open_round(head.open, self.settings.round)

    def take(self, arrival: Arrival) -> None:
        start = self.x[arrival.version]
        update = UpdateReady(
            participant=arrival.participant, run_id="run-1", epoch=0, task=self.firsts[arrival.version], body=BODY,
            base_sha256=model_at(arrival.version).sha256, num_examples=arrival.examples,
        )  # fmt: skip
        judged = judging.judge(update, self.head, {}, self.settings.round)
        if judged.verdict == "counted":
            weight = judging.weight_of(update.num_examples, self.settings.round)
            by = Contribution(weight, update.participant, 0.0, judging.damping(judged.staleness))
            sent = np.full(2, change(start + arrival.change, start, self.x[-1]))
            self.strategy.add({"w": sent}, by)
            self.round.accept(update.participant, weight, update.task)
        if self.round.is_full:
            self.x.append(float(self.strategy.finish()["w"][0]))
            version = len(self.x) - 1
            record = self.head.with_(version=version, round=version, model=model_at(version), open=None)
            self.head, self.round = self._opened(record)


def model_at(version: int) -> Where:
    return Where(where="inline", size_bytes=3, sha256=f"{version:064x}")


def check_versions() -> None:
    for eta in (1.0, 0.3):
        rounds = {"policy": "buffered", "buffer": K, "staleness_max": STALENESS_MAX}
        run = Run(settings(8, 9, round=rounds, strategy={"server_lr": eta}))
        for arrival in ARRIVALS:
            run.take(arrival)
        assert run.x[1:] == pytest.approx(by_paper(eta), abs=1e-9)


def check_turns() -> None:
    """A fast one never makes more than half of a version while others are at work on it."""
    run = settings(8, 9, round={"policy": "buffered", "buffer": 6})
    head = plan.opened(HeadRecord(), "train", names(8), run, 0.0)
    assert head.open
    current = plan.open_round(head.open, run.round)
    made = 0
    while "p01" in current.missing and made < 6:
        current.accept("p01", 1, head.open.task + current.turn("p01"))
        current.invited(names(8), 42)
        made += 1
    assert made == 3


@pytest.mark.parametrize("check", [check_versions, check_turns])
def test_it_is_the_paper_s(check: Callable[[], None]) -> None:
    check()


def _normalised(real: Callable[..., None]) -> Callable[..., None]:
    """Divides by the sum of what they count, not by K: with all stale, damping cancels."""

    def add(self: FixedPointSum, arrays: Named, weight: int, damping: float = 1.0, divisors: Any = None) -> None:
        real(self, arrays, weight, damping, divisors)
        self.weight += weight * damping - weight  # type: ignore[assignment]

    return add


BROKEN: Mapping[str, tuple[Callable[[], None], str, Any]] = {
    "a fresh update is damped: the version is raised first": (
        check_versions, "aggregator.judge.damping", lambda tau: 1 / math.sqrt(2 + tau),
    ),
    "1 / (1 + sqrt(tau))": (check_versions, "aggregator.judge.damping", lambda tau: 1 / (1 + math.sqrt(tau))),
    "not damped at all": (check_versions, "aggregator.judge.damping", lambda tau: 1.0),
    "against the current version": (
        check_versions, f"{__name__}.change", lambda trained, start, current: trained - current,
    ),
    "divided by the sum of dampings": (
        check_versions, "aggregator.sums.FixedPointSum.add", _normalised(FixedPointSum.add),
    ),
    "no bound on staleness": (
        check_versions, "aggregator.judge._buffered",
        lambda update, opened, staleness, settings: Judgement("counted", staleness=staleness),
    ),
    "examples count unasked": (check_versions, "aggregator.judge.weight_of", lambda examples, settings: examples),
    "one version early": (check_versions, "aggregator.buffered.Buffer.target", K - 1),
    "a fast one fills the buffer": (check_turns, "aggregator.buffered.Buffer._turns_allowed", 1000),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BROKEN)
def test_the_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, place, broken = BROKEN[mistake]
    monkeypatch.setattr(place, broken)
    with pytest.raises((AssertionError, BadMessage)):
        check()
