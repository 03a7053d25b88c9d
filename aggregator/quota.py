"""How much a participant may say: a flood by one costs the others nothing but the room in the log."""

from __future__ import annotations

from dataclasses import dataclass, field

BURST_S = 10.0  # what was not said for so long may be said at once
BYTES_A_MESSAGE = 64 << 10  # a larger message counts as several


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float  # Unix seconds of the aggregator's clock
    ignored: int = 0


@dataclass(slots=True)
class Quotas:
    """A token bucket for every participant: `per_s` messages a second, ten seconds' worth at once.

    Answers that count cost nothing (`refund`): who does what it was asked is never over its quota, however fast
    rounds are. Kept in memory alone: a message that is read again after a take-over is not measured, for it came at
    another time. There are as many buckets as users on the broker, so their number is bounded there.
    """

    per_s: float
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    def admit(self, participant: str, size_bytes: int, now: float) -> bool:
        """Whether one more message of that size is within the quota; then it is taken from it."""
        bucket = self._buckets.setdefault(participant, _Bucket(self._most, now))
        bucket.left = min(self._most, bucket.left + self.per_s * max(0.0, now - bucket.at))
        bucket.at = now
        if bucket.left <= 0:
            bucket.ignored += 1
            return False
        bucket.left -= _cost(size_bytes)
        return True

    def refund(self, participant: str, size_bytes: int) -> None:
        """What was taken for a message that was asked for."""
        if bucket := self._buckets.get(participant):
            bucket.left = min(self._most, bucket.left + _cost(size_bytes))

    def ignored(self, participant: str) -> int:
        """How many of its messages were not admitted."""
        bucket = self._buckets.get(participant)
        return bucket.ignored if bucket else 0

    @property
    def _most(self) -> float:
        return self.per_s * BURST_S


def _cost(size_bytes: int) -> float:
    return max(1.0, size_bytes / BYTES_A_MESSAGE)
