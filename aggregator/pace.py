"""Deadlines learned from arrivals, so that nobody has to guess them. Pure.

`pace` is how many seconds participants took lately, oldest first. Whoever had not answered when its round closed
is in it with the seconds that were waited: if many are too slow, the deadline grows until they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from aggregator.settings import RoundSettings

REMEMBERED = 256  # arrivals: several rounds of a small federation, a part of one of a large one
ENOUGH = 8  # arrivals to learn from
CONSISTENT = 1.4826  # makes the median absolute deviation that of normally distributed values (Hampel 1974)
LEAST_SPARE = 0.5  # of the median: equally fast participants have no spread, but are late now and then


def allowed_s(pace: Sequence[float], settings: RoundSettings) -> float:
    """Seconds for the first attempt of a round: median + k MAD of the pace, within its bounds; or as it is set."""
    if settings.deadline == "fixed" or len(pace) < ENOUGH:
        return settings.deadline_s
    middle = median(pace)
    spread = CONSISTENT * median(abs(seconds - middle) for seconds in pace)
    wanted = middle + max(settings.deadline_spreads * spread, LEAST_SPARE * middle)
    return min(max(wanted, settings.deadline_min_s), settings.deadline_max_s)


def grown(pace: Sequence[float], arrived_s: Iterable[float], missing: int, waited_s: float) -> tuple[float, ...]:
    """The pace after a round in which some arrived after so many seconds and others were waited for in vain."""
    fresh = [*arrived_s, *[waited_s] * missing]
    return tuple(round(seconds, 3) for seconds in [*pace, *fresh][-REMEMBERED:])
