"""Trying again: bounded where somebody waits for the answer, patient where only the network can help."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

from broker.errors import PublishFailed
from broker.transport import Transport

FIRST_PAUSE_S = 0.1


@dataclass(slots=True)
class Backoff:
    """Pauses between attempts: doubling up to `longest_s`, each shortened by up to half so that clients spread."""

    longest_s: float
    random: Random = field(default_factory=Random)
    failures: int = 0

    def next_s(self) -> float:
        """Seconds to pause before the next attempt."""
        pause_s: float = min(self.longest_s, FIRST_PAUSE_S * 2 ** min(self.failures, 30))
        self.failures += 1
        return pause_s * self.random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """An attempt succeeded: the next failure is the first again."""
        self.failures = 0


async def publish(
    transport: Transport, exchange: str, key: str, body: bytes, *, timeout_s: float = 10.0, attempts: int = 4
) -> None:
    """Publishes until it is confirmed, `attempts` times at the most: it may arrive more than once.

    Raises the last PublishFailed; ConnectionLost, Unroutable, AccessRefused and MessageTooLarge at once.
    """
    for failures in range(attempts - 1):
        try:
            return await transport.publish(exchange, key, body, timeout_s=timeout_s)
        except PublishFailed:
            await asyncio.sleep(Backoff(longest_s=1.0, failures=failures).next_s())
    return await transport.publish(exchange, key, body, timeout_s=timeout_s)
