"""The soak's judge on made-up samples: it lets pass what is flat, and fails on each thing that leaks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.flat import BROKER, Limits, Sample, faults_found, lives, pooled, slope
from benchmarks.probe import Usage, usage
from benchmarks.soak import Plan, in_storms, limits, written
from broker.topology import Topology
from fluffle.chaos.plan import HELD_ROUNDS

LIMITS = Limits(warm_up_rounds=60, messages={"head": 4}, disk_mb={"journals": 2.0})
NAMES = ("leader", "standby", "p01", BROKER)
Change = Callable[[int, str, Usage], Usage]


def as_it_was(number: int, name: str, usage: Usage) -> Usage:
    return usage


def samples(change: Change = as_it_was, rounds: int = 600, noise_mb: float = 0.05) -> list[Sample]:
    """One every five rounds, flat but for noise and what `change` does."""
    rng = np.random.default_rng(5)

    def held(number: int, name: str) -> Usage:
        memory = 75.0 + float(rng.normal(scale=noise_mb))
        return change(number, name, Usage(NAMES.index(name) + 100, memory, memory, memory, 10, 6))

    return [
        Sample(n, n / 4, "leader", {name: held(n, name) for name in NAMES}, {"head": 1}, {"journals": 0.4})
        for n in range(5, rounds, 5)
    ]


def test_what_is_flat_passes() -> None:
    assert faults_found(samples(), LIMITS) == []


def leaking_memory(number: int, name: str, usage: Usage) -> Usage:
    return replace(usage, rss_mb=usage.rss_mb + 0.004 * number) if name == "p01" else usage


def leaking_fds(number: int, name: str, usage: Usage) -> Usage:
    return replace(usage, fds=usage.fds + number // 50) if name == "standby" else usage


def leaking_threads(number: int, name: str, usage: Usage) -> Usage:
    return replace(usage, threads=usage.threads + number // 50) if name == BROKER else usage


def leaking_broker(number: int, name: str, usage: Usage) -> Usage:
    return replace(usage, rss_mb=usage.rss_mb + 0.05 * number) if name == BROKER else usage


@pytest.mark.parametrize(
    ("leak", "words"),
    [
        (leaking_memory, ["p01 as worker", "memory grew by", "more than 2"]),
        (leaking_fds, ["standby as standby", "more fds"]),
        (leaking_threads, ["rabbitmq as rabbitmq", "more threads"]),
        (leaking_broker, ["rabbitmq as rabbitmq", "memory grew by 50."]),
    ],
)
def test_what_leaks_fails(leak: Change, words: list[str]) -> None:
    found = "\n".join(faults_found(samples(leak), LIMITS))
    assert all(word in found for word in words), found


def test_a_leak_that_restarts_hide_is_found_in_each_life() -> None:
    """Memory is the same at the beginning and at the end; a line through everything would be flat."""

    def leaking(number: int, name: str, usage: Usage) -> Usage:
        life, age = divmod(number, 300)
        return replace(usage, pid=life, rss_mb=usage.rss_mb + 0.004 * age) if name == "p01" else usage

    found = [words for words in faults_found(samples(leaking), LIMITS) if words.startswith("p01 as")]
    assert len(found) == 2
    assert "from round 300" in found[1]


def test_who_begins_to_lead_begins_a_new_life() -> None:
    """A leader holds more, which is no growth."""

    def heavier(number: int, name: str, usage: Usage) -> Usage:
        return replace(usage, rss_mb=usage.rss_mb + 5.0) if name == leads(number) else usage

    def leads(number: int) -> str:
        return "leader" if number < 300 else "standby"

    taken = [replace(sample, leader=leads(sample.round)) for sample in samples(heavier)]
    assert faults_found(taken, LIMITS) == []
    assert [(life.name, life.role) for life in lives(taken, LIMITS)][:2] == [
        ("leader", "leader"),
        ("leader", "standby"),
    ]


def test_who_never_lived_long_enough_was_not_judged_and_that_is_told() -> None:
    def restless(number: int, name: str, usage: Usage) -> Usage:
        return replace(usage, pid=number // 100) if name == "p01" else usage

    assert faults_found(samples(restless), LIMITS) == ["p01: no life was long enough to be judged"]


def test_growing_while_it_warms_up_is_no_leak() -> None:
    def warming(number: int, name: str, usage: Usage) -> Usage:
        return replace(usage, rss_mb=usage.rss_mb + min(number, LIMITS.warm_up_rounds) / 10)

    assert faults_found(samples(warming), LIMITS) == []


def test_noise_that_could_hide_a_leak_fails() -> None:
    """Nothing grows, but nobody could tell."""
    assert any("all lives together" in words for words in faults_found(samples(noise_mb=8.0), LIMITS))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"messages": {"head": 5}}, "5 messages in head, more than 4"),
        ({"disk_mb": {"journals": 2.5}}, "2.5 MiB of journals, more than 2"),
    ],
)
def test_queues_and_files_have_limits(changed: dict[str, dict[str, float]], words: str) -> None:
    taken = samples()
    taken[50] = replace(taken[50], **changed)  # type: ignore[arg-type]
    assert faults_found(taken, LIMITS) == [words]


def test_channels_that_pile_up_inside_the_broker_fail() -> None:
    taken = [replace(sample, inside={"channels": 20 + sample.round // 20}) for sample in samples()]
    assert any("more channels" in words for words in faults_found(taken, LIMITS))


# -- arithmetic -------------------------------------------------------------------------------------------------


@given(st.floats(-50, 50), st.floats(0, 500))
def test_the_slope_of_a_line_is_that_line(per_1000: float, at_first: float) -> None:
    rounds = list(range(0, 500, 5))
    found = slope(rounds, [at_first + per_1000 * number / 1000 for number in rounds])
    assert found.value == pytest.approx(per_1000, abs=1e-6)
    assert found.error == pytest.approx(0.0, abs=1e-4)


def test_the_error_is_what_slopes_of_noise_scatter_by() -> None:
    """Also where neighbours are alike: a textbook's error would be a third of it."""
    rng, rounds = np.random.default_rng(1), list(range(0, 1000, 5))
    slopes = []
    for _ in range(300):
        steps, noise = rng.normal(size=len(rounds)), np.zeros(len(rounds))
        for place in range(1, len(rounds)):
            noise[place] = 0.8 * noise[place - 1] + steps[place]
        slopes.append(slope(rounds, noise.tolist()))
    scatter = float(np.std([one.value for one in slopes]))
    assert 0.7 < float(np.mean([one.error for one in slopes])) / scatter < 1.2


def test_several_lives_together_are_surer_than_one() -> None:
    one = slope(range(0, 500, 5), np.random.default_rng(2).normal(size=100).tolist())
    together = pooled([one] * 4)
    assert together.value == pytest.approx(one.value)
    assert together.error == pytest.approx(one.error / 2)


# -- the plan, and what is measured -----------------------------------------------------------------------------


def test_faults_come_in_storms_and_long_quiet_follows() -> None:
    plan = Plan()
    rounds = [fault.after_round for fault in plan.strikes]
    assert len(rounds) == plan.faults
    assert rounds == sorted(rounds)
    assert {number // 666 for number in rounds} == {0, 1, 2}
    assert all(number % 666 <= 134 for number in rounds)
    assert min(rounds) >= 1
    assert max(rounds) < plan.rounds - HELD_ROUNDS


@given(st.integers(40, 3000), st.integers(1, 12))
def test_no_fault_is_lost_or_strikes_too_late(rounds: int, phases: int) -> None:
    plan = Plan(rounds=rounds, faults=30, phases=phases)
    moved = in_storms(plan.strikes, rounds, phases)
    assert all(1 <= fault.after_round < rounds - HELD_ROUNDS for fault in moved)


def test_every_queue_stream_and_file_that_is_bounded_has_a_limit() -> None:
    allowed = limits(Topology("soak"), ["p01"])
    assert allowed.messages["fl.soak.inbox.p01"] == 1
    assert {"fl_soak_updates", "fl_soak_model_soak", "fl_soak_outbox_p01", "journals"} <= set(allowed.disk_mb)
    assert allowed.disk_mb["fl_soak_outbox_p01"] < 10 < allowed.disk_mb["fl_soak_updates"]


def test_this_process_is_measured(tmp_path: Path) -> None:
    found = usage(os.getpid())
    assert found
    assert found.rss_mb >= found.anonymous_mb > 1
    with (tmp_path / "held").open("w"):
        more = usage(os.getpid())
    assert more
    assert more.fds == found.fds + 1
    assert usage(None) is None


def test_the_result_is_json_with_a_line_for_each_sample() -> None:
    told = {"passed": True, "lives": [{"a": 1}, {"a": 2}], "waiting_and_files": [], "samples": [[1, 2], [3, 4]]}
    assert json.loads(written(told)) == told
    assert '\n    {"a": 2}\n' in written(told)
