"""Delays, availability and traces: their moments against closed forms, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ConfigError
from fluffle.config import from_values, load_config
from fluffle.delays import Windows, duration_s, generator, parse_delay, parse_windows
from fluffle.presence import habits_of

NAMES = ["p01", "p02", "p03"]
MANY = 20_000


def drawn(text: str) -> np.ndarray:
    delay = parse_delay("simulation.delay", text, NAMES)
    random = generator(3, "delay", "p01")
    return np.array([delay.seconds("p01", count, random) for count in range(MANY)])


@pytest.mark.parametrize(
    ("text", "mean", "variance"),
    [
        ("constant:2.5", 2.5, 0.0),
        ("half-normal:1.5", 1.5 * math.sqrt(2 / math.pi), 1.5**2 * (1 - 2 / math.pi)),
        ("log-normal:3,0.5", 3 * math.exp(0.125), 9 * (math.exp(0.25) - 1) * math.exp(0.25)),
    ],
)
def test_moments_are_those_of_the_distribution(text: str, mean: float, variance: float) -> None:
    """Within five standard errors of the mean; the fourth moment makes the variance's wider."""
    found = drawn(text)
    assert found.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / MANY) + 1e-12)
    assert found.var() == pytest.approx(variance, rel=0.1)
    assert np.median(found) == pytest.approx(parse_delay("d", text, NAMES).median_s, rel=0.03)
    assert (found > 0).all()


def test_draws_depend_on_seed_participant_and_task_alone() -> None:
    def draw(*key: object) -> float:
        return generator(*key).random()  # type: ignore[arg-type]

    keys = [(1, "delay", "p01", 1, 0), (2, "delay", "p01", 1, 0), (1, "dropout", "p01", 1, 0)]
    keys += [(1, "delay", "p02", 1, 0), (1, "delay", "p01", 2, 0), (1, "delay", "p01", 1, 1)]
    first = [draw(*key) for key in keys]
    assert len(set(first)) == len(keys)
    assert [draw(*key) for key in reversed(keys)] == first[::-1]


def test_neighbouring_participants_and_tasks_are_independent() -> None:
    draws = np.array([[generator(0, "delay", f"p{p}", t, 0).normal() for t in range(40)] for p in range(40)])
    for one, other in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(
    "text", ["", "constant", "constant:0", "constant:1,2", "half-normal:-1", "half-normal:nan"]
)
def test_what_is_no_delay_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match=r"simulation.delay = .*write constant:SECONDS, half-normal:SCALE"):
        parse_delay("simulation.delay", text, NAMES)


def test_a_trace_of_anybody_is_drawn_from(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    file.write_text("delay_s\n1\n2\n4.5\n")
    found = drawn(f"trace:{file}")
    assert set(found) == {1, 2, 4.5}
    assert found.mean() == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_trace_with_names_is_taken_in_turn(form: str, tmp_path: Path) -> None:
    rows = [("p01", 1), ("p02", 5), ("p01", 2), ("p03", 7)]
    file = tmp_path / f"own.{form}"
    if form == "csv":
        file.write_text("participant,delay_s\n" + "".join(f"{name},{seconds}\n" for name, seconds in rows))
    else:
        file.write_text("".join(f'{{"participant": "{n}", "delay_s": {seconds}}}\n' for n, seconds in rows))
    delay = parse_delay("simulation.delay", f"trace:{file}", NAMES)
    random = np.random.default_rng(0)
    assert [delay.seconds("p01", count, random) for count in range(5)] == [1, 2, 1, 2, 1]
    assert [delay.seconds("p02", count, random) for count in range(2)] == [5, 5]
    assert delay.median_s == 3.5


BAD_TRACES = [
    ("delay_s\n1\nx\n", r"t, line 3: delay_s is 'x': write seconds"),
    ("delay_s\n1\n-1\n", r"t, line 3: delay_s is '-1'"),
    ("delay_s\n0\n", r"t, line 2: delay_s is 0: write seconds above 0"),
    ("delay_s\n1\ninf\n", r"t, line 3: delay_s is 'inf'"),
    ("delay_s\n1\n2,3\n", r"t, line 3: has the columns .*: every line must have delay_s or participant, delay_s"),
    ("seconds\n1\n", r"t, line 2: has the columns seconds: every line must have"),
    ("participant,delay_s\np01,1\np09,2\n", r"t, line 3: participant is 'p09'.*there are p01 to p03"),
    ("participant,delay_s\np01,1\np02,1\n", r"has no line of p03: give everybody one"),
    ("", r"has 0 lines of data"),
    ("delay_s\n", r"has 0 lines of data"),
    ('{"delay_s": 1}\n{"delay_s": tru\n', r"t, line 2: is no JSON"),
    ('{"delay_s": 1}\n[1]\n', r"t, line 2: is '\[1\]': write one JSON object"),
    ('{"delay_s": true}\n', r"t, line 1: delay_s is True"),
    ('{"delay_s": 1}\n{"delay_s": 1, "participant": "p01"}\n', r"t, line 2: has the columns"),
]


@pytest.mark.parametrize(("text", "why"), BAD_TRACES)
def test_a_bad_trace_is_refused_by_its_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=why):
        parse_delay("simulation.delay", f"trace:{tmp_path / 't'}", NAMES)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_delay("simulation.delay", f"trace:{tmp_path / 'none'}", NAMES)


@given(
    now=st.floats(0, 1e7),
    period_s=st.floats(1, 1e5),
    share=st.floats(0.01, 0.99),
    phase=st.floats(0, 1),
)
def test_windows_come_round_and_the_next_is_the_nearest(
    now: float, period_s: float, share: float, phase: float
) -> None:
    windows = Windows(share * period_s, period_s, phase * period_s)
    found = windows.next(now)
    assert found is not None
    begin, end = found
    assert now <= begin < end <= now + 2 * period_s
    assert end - begin <= share * period_s * (1 + 1e-6) + 1e-6
    assert begin - now <= (1 - share) * period_s + 1e-6
    if begin > now:
        assert end - begin == pytest.approx(share * period_s, rel=1e-4), (
            "a window that is waited for is a whole one"
        )
    after = windows.next(end + 1e-6 * period_s)
    assert after is not None
    assert after[0] == pytest.approx(end + (1 - share) * period_s, rel=1e-5, abs=1e-4 * period_s)


def test_phases_are_spread_over_the_period() -> None:
    windows = parse_windows("8h/24h", [f"p{i}" for i in range(400)], seed=5)
    there = np.mean([[w.next(t)[0] == t for w in windows.values()] for t in (0.0, 4e4, 3e5)])  # type: ignore[index]
    assert there == pytest.approx(1 / 3, abs=0.07)
    assert windows == parse_windows("8h/24h", list(windows), seed=5)
    assert windows != parse_windows("8h/24h", list(windows), seed=6)


def test_always_is_one_window_without_end() -> None:
    for text in ("", "24h/1d"):
        assert parse_windows(text, NAMES, 0)["p01"].next(77.0) == (77.0, math.inf)


def test_windows_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("participant,from_s,until_s\np01,0,10\np01,20,30\np02,5,6\n")
    windows = parse_windows(f"trace:{tmp_path / 't'}", NAMES, 0)
    assert windows["p01"].next(4.0) == (4.0, 10.0)
    assert windows["p01"].next(10.0) == (20.0, 30.0)
    assert windows["p01"].next(30.0) is windows["p03"].next(0.0) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("p01,3,2\n", r"t, line 2: until_s is 2: write one after from_s = 3"),
        ("p01,0,5\np01,4,9\n", r"t, line 3: from_s is 4, and p01 is there until 5: sort the lines"),
        ("p01,x,5\n", r"t, line 2: from_s is 'x'"),
        ("p01,1\n", r"t, line 2: until_s is ''"),
    ],
)
def test_bad_windows_are_refused_by_their_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("participant,from_s,until_s\n" + text)
    with pytest.raises(ConfigError, match=why):
        parse_windows(f"trace:{tmp_path / 't'}", NAMES, 0)


@pytest.mark.parametrize("text", ["8h", "8h/", "0/24h", "25h/24h", "8x/24h", "1h/2h/3h"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"simulation.available = .*write ON/PERIOD"):
        parse_windows(text, NAMES, 0)


def test_durations() -> None:
    found = [duration_s(text) for text in ("90", "90s", "1.5m", "8h", "7d")]
    assert found == [90, 90, 90, 28800, 604800]
    assert math.isnan(duration_s("soon"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"simulation.virtual_time": False, "simulation.delay": "constant:1"},
            "simulation.delay is for virtual time",
        ),
        ({"simulation.virtual_time": False, "simulation.dropout": 0.1}, "simulation.dropout is for virtual time"),
        ({"broker.url": "amqp://localhost"}, "virtual time needs the embedded broker"),
        ({"train.max_seconds": 1.0}, "train.max_seconds cannot end a training in virtual time"),
        ({"simulation.mbit_s": 1.0, "codec.up": "none,fp16"}, "name one codec.up"),
        ({"simulation.mbit_s": 1.0, "codec.down": "fp16"}, "leave codec.down at none"),
        ({"simulation.back_after": "soon"}, "simulation.back_after = 'soon'"),
    ],
)
def test_what_cannot_work_in_virtual_time_is_refused(settings: dict[str, object], why: str) -> None:
    values = {"task": "digits", "simulation.virtual_time": True, **settings}
    with pytest.raises(ConfigError, match=why):
        habits_of(load_config(from_values(values)), NAMES)  # type: ignore[arg-type]
