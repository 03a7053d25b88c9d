"""What a person sees of a worker's large transfers: bars on a terminal, now and then a log line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from workers.transfer import TransferStatus, What

EVERY_S = 5.0

Watch = Callable[[str, TransferStatus], None]
Key = tuple[str, What]

log = structlog.get_logger(__name__)


@contextmanager
def watching(*, lines: bool = False) -> Iterator[Watch]:
    """What to tell of each transfer: bars if stderr is a terminal, unless `lines` of the log are asked for."""
    console = Console(stderr=True)
    if lines or not console.is_terminal:
        yield Lines(time.monotonic, log.info)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


@dataclass(slots=True)
class Lines:
    """A log line every five seconds of a transfer that takes so long."""

    clock: Callable[[], float]
    say: Callable[..., object]
    _due: dict[Key, float] = field(default_factory=dict)

    def __call__(self, participant: str, status: TransferStatus) -> None:
        key, now = (participant, status.what), self.clock()
        if now >= self._due.setdefault(key, now + EVERY_S):
            self._due[key] = now + EVERY_S
            self.say("transfer_progress", participant=participant, **status.model_dump(exclude_none=True))
        if status.is_whole:
            del self._due[key]


@dataclass(slots=True)
class Bars:
    """A bar for each transfer, while it lasts. One that was cut off waits for the rest."""

    progress: Progress
    _bars: dict[Key, TaskID] = field(default_factory=dict)

    def __call__(self, participant: str, status: TransferStatus) -> None:
        key = (participant, status.what)
        if key not in self._bars:
            self._bars[key] = self.progress.add_task(f"{participant} {status.what}", total=status.size_bytes)
        self.progress.update(self._bars[key], completed=status.done_bytes, total=status.size_bytes)
        if status.is_whole:
            self.progress.remove_task(self._bars.pop(key))
