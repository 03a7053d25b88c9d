"""The choice of a codec is a function of what was measured, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.codecs import LADDER, packing
from workers.choice import LEAST_BYTES, UNKNOWN_LINK, Measured, choose, seconds_of

MODEL = 40_000_000


def chosen(seen: Measured, allowed: Sequence[str] = LADDER, model_bytes: int = MODEL) -> str:
    return choose(allowed, model_bytes, seen).name


@pytest.mark.parametrize(
    ("link", "trained_s", "name"),
    [
        (1e9, 0.0, "none"), (41e6, 0.0, "none"), (20e6, 20.0, "none"), (20e6, 0.0, "int8+zstd"),
        (30e6, 20.0, "none"), (13e6, 20.0, "bf16+zstd"), (7e6, 20.0, "int8+zstd"), (1e6, 60.0, "qsgd:7+zstd"),
        (0.3e6, 20.0, "topk:0.01+zstd"), (1e3, 0.0, "topk:0.01+zstd"),
    ],
)  # fmt: skip
def test_the_most_faithful_that_is_sent_in_time(link: float, trained_s: float, name: str) -> None:
    assert chosen(Measured(link, trained_s)) == name


def test_small_models_travel_as_they_are_until_a_link_is_known_to_be_slow() -> None:
    assert chosen(Measured(), model_bytes=800_000) == "none"
    assert chosen(Measured(), model_bytes=8_000_000) != "none"


def test_who_knows_none_of_them_sends_arrays_as_they_are() -> None:
    assert chosen(Measured(), ["gzip:9", "xor"]) == "none"
    assert chosen(Measured(), []) == "none"
    assert chosen(Measured(), ["gzip:9", "int8"], model_bytes=1000) == "int8"


def test_one_name_is_no_choice() -> None:
    assert chosen(Measured(link=1.0), ["fp16"]) == "fp16"


def test_a_slow_encoder_is_not_worth_it() -> None:
    slow = Measured(link=20e6, encoders={name: 1e6 for name in LADDER if name != "none"})
    assert chosen(slow) == "none"


def test_what_was_measured_moves_half_way_to_the_newest() -> None:
    seen = Measured(link=1e6).after_upload(10_000_000, 1.0)
    assert seen.link == 5.5e6
    assert seen.after_upload(10_000_000, 1.0).link == 7.75e6


def test_short_uploads_tell_nothing_but_hope() -> None:
    """They are as long as the way, not as it is wide. Without hope, whoever once sent little would for ever."""
    seen = Measured(link=100e3)
    for _ in range(40):
        seen = seen.after_upload(LEAST_BYTES - 1, 5.0)
    assert seen.link > 100 * UNKNOWN_LINK
    assert chosen(Measured(link=100e3)) == "topk:0.01+zstd"
    assert chosen(seen) == "none"


def test_work_is_remembered_by_codec() -> None:
    seen = Measured().after_work("int8", 1000, 3.0, 0.5).after_work("fp16", 1000, 4.0, 0.25)
    assert seen.trained_s == 4.0
    assert seen.encoders == {"int8": 2000, "fp16": 4000}


@given(link=st.floats(1, 1e10), faster=st.floats(1, 100), trained_s=st.floats(0, 1e5), size=st.integers(0, 10**11))
def test_a_faster_link_is_never_less_faithful(link: float, faster: float, trained_s: float, size: int) -> None:
    """And whatever was measured, there is a choice."""
    slow, fast = (chosen(Measured(speed, trained_s), model_bytes=size) for speed in (link, link * faster))
    on_time = max(1.0, 0.1 * trained_s)
    if seconds_of(packing(slow), size, Measured(link, trained_s)) <= on_time:
        assert LADDER.index(fast) <= LADDER.index(slow)
