"""How much a participant may say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aggregator.quota import BURST_S, BYTES_A_MESSAGE, Quotas

PER_S = 2.0
BURST = int(PER_S * BURST_S)


def admitted(quotas: Quotas, count: int, now: float, size_bytes: int = 100, who: str = "p01") -> int:
    return sum(quotas.admit(who, size_bytes, now) for _ in range(count))


def test_a_burst_is_admitted_and_then_as_much_as_time_passes() -> None:
    quotas = Quotas(PER_S)
    assert admitted(quotas, 100, now=0.0) == BURST
    assert admitted(quotas, 100, now=3.0) == 3 * PER_S
    assert quotas.ignored("p01") == 200 - BURST - 3 * PER_S


def test_one_participants_flood_is_not_anothers() -> None:
    quotas = Quotas(PER_S)
    admitted(quotas, 1000, now=0.0)
    assert admitted(quotas, BURST, now=0.0, who="p02") == BURST
    assert (quotas.ignored("p02"), quotas.ignored("nobody")) == (0, 0)


def test_large_messages_count_as_several() -> None:
    assert admitted(Quotas(PER_S), 100, now=0.0, size_bytes=4 * BYTES_A_MESSAGE) == BURST / 4


def test_what_was_asked_for_costs_nothing() -> None:
    quotas = Quotas(PER_S)
    for _ in range(1000):
        assert quotas.admit("p01", 5 * BYTES_A_MESSAGE, 0.0)
        quotas.refund("p01", 5 * BYTES_A_MESSAGE)
    assert admitted(quotas, 1000, now=0.0) == BURST


@given(st.lists(st.floats(-1e9, 1e9), max_size=50))
def test_no_clock_gives_more_than_a_burst_at_once(times: list[float]) -> None:
    """The clock of a machine may be set back."""
    quotas = Quotas(PER_S)
    for now in times:
        assert admitted(quotas, 2 * BURST, now) <= BURST
