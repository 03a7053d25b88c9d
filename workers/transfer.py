"""How far a large body has come, how fast it comes, and when it will be there: for whoever waits at a slow link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from broker.messages import Count, Part, Where
from broker.payloads import bytes_of

What = Literal["model", "update"]


class TransferStatus(Part):
    """A body on its way: to this worker, or from it. Rate and time left count from the last interruption;
    `left_s` is None until something came."""

    what: What
    done_bytes: Count
    size_bytes: Count
    bytes_per_s: Annotated[float, Field(ge=0)] = 0.0
    left_s: Annotated[float, Field(ge=0)] | None = None

    @property
    def is_whole(self) -> bool:
        return self.done_bytes == self.size_bytes

    def __str__(self) -> str:
        done = f"{self.done_bytes / 1e6:.1f} of {self.size_bytes / 1e6:.1f} MB"
        if self.left_s is None:
            return f"{self.what}, {done}"
        return f"{self.what}, {done} at {self.bytes_per_s / 1e6:.2g} MB/s, {self.left_s:.0f} s left"


@dataclass(slots=True)
class Transfer:
    """One body that began, or goes on, at `began` with `first` of its pieces. `tell` is called with each news."""

    what: What
    where: Where
    clock: Callable[[], float]
    tell: Callable[[TransferStatus], object]
    first: int = 0
    began: float = 0.0
    pieces: int = 0

    @classmethod
    def begin(
        cls,
        what: What,
        where: Where,
        first: int,
        clock: Callable[[], float],
        tell: Callable[[TransferStatus], object],
    ) -> Transfer:
        return cls(what, where, clock, tell, first, clock(), first)

    def arrived(self, pieces: int) -> None:
        """So many are there now."""
        self.pieces = pieces
        self.tell(self.status())

    def status(self) -> TransferStatus:
        done, size = bytes_of(self.where, self.pieces), self.where.size_bytes
        passed_s = self.clock() - self.began
        rate = (done - bytes_of(self.where, self.first)) / passed_s if passed_s > 0 else 0.0
        left_s = (size - done) / rate if rate else None
        return TransferStatus(what=self.what, done_bytes=done, size_bytes=size, bytes_per_s=rate, left_s=left_s)
