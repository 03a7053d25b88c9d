"""Who is there, and who is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from broker.messages import Phase


class Registry:
    """Participants heard of within `liveness_s`. Times are Unix seconds of the aggregator's clock.

    A new leader presumes that the members of the head record live, and gives them that long to be heard.
    """

    def __init__(self, members: Iterable[str], now: float, liveness_s: float) -> None:
        self._heard = dict.fromkeys(members, now)
        self._phases: dict[str, Phase] = {}
        self._liveness_s = liveness_s

    def hear(self, participant: str, now: float) -> bool:
        """Notes a sign of life; true if the participant was not live before."""
        was_live = self._is_live(self._heard.pop(participant, None), now)
        self._heard[participant] = now  # the last of all: whoever comes first was not heard for longest
        return not was_live

    def note_phase(self, participant: str, phase: Phase) -> None:
        """Remembers what a participant last said that it does."""
        self._phases[participant] = phase

    def leave(self, participant: str) -> None:
        self._heard.pop(participant, None)
        self._phases.pop(participant, None)

    def count(self, now: float) -> int:
        """How many are live. Those who are not any more are forgotten here."""
        silent = itertools.takewhile(lambda known: not self._is_live(known[1], now), self._heard.items())
        for participant, _ in tuple(silent):
            self.leave(participant)
        return len(self._heard)

    def live(self, now: float) -> list[str]:
        """Everybody live, by name."""
        return sorted(p for p, heard in self._heard.items() if self._is_live(heard, now))

    def last_heard(self) -> dict[str, float]:
        """When each participant was last heard of."""
        return dict(self._heard)

    def phase(self, participant: str) -> Phase | None:
        """What it last said that it does; None if it has not said anything yet."""
        return self._phases.get(participant)

    def _is_live(self, heard: float | None, now: float) -> bool:
        return heard is not None and now - heard < self._liveness_s


def sample(live: Sequence[str], size: int, seed: int, round: int) -> tuple[str, ...]:  # noqa: A002 - the design's word
    """`size` of the live participants (all for size 0), drawn without replacement from (seed, round) alone."""
    if not 0 < size < len(live):
        return tuple(sorted(live))
    chosen = np.random.default_rng([seed, round]).choice(len(live), size, replace=False)
    return tuple(sorted(live[i] for i in chosen))
