"""What a person sees while a run goes on: a live table on a terminal, one log line per event elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Protocol, Self

import structlog
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from aggregator.history import RoundReport
from fluffle.results import headline, shown
from fluffle.text import size_text

WAITING = "waiting for participants"
NOTICES = 3
LINES_BELOW = 8  # what must stay free of the terminal's height for the rest of the picture
MOST_METRICS = 4  # columns that fit beside the others
COUNTS = ("accepted", "late", "rejected", "duplicate")
LOGGED = ("run_id", "round", "attempt", "version", "cohort", *COUNTS, "duration_s", "bytes_up", "bytes_down")

log = structlog.get_logger(__name__)


class Display(Protocol):
    """What a run tells about itself. A context manager; calls return at once.

    A `live` one owns the terminal: less should be logged beside it.
    """

    live: bool

    def on_report(self, report: RoundReport) -> None:
        """A round was closed, or a federated evaluation."""

    def on_notice(self, event: str, **fields: object) -> None:
        """Anything else worth knowing, as a past-tense word and fields."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def notice(display: Display, event: str, fields: Mapping[str, object]) -> None:
    """What the aggregator calls `on_notice`, as a display has it."""
    display.on_notice(event, **fields)


def make_display(title: str, rounds: int, *, lines: bool = False) -> Display:
    """The live table if stderr is a terminal, unless `lines` of the log are asked for."""
    console = Console(stderr=True)
    return LogDisplay() if lines or not console.is_terminal else LiveDisplay(title, rounds, console)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[object], None]]:
    """A bar on a terminal; yields what to call with anything after each of `total` steps."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True)
    )
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda _: bar.advance(task)


class LogDisplay:
    """Every event as one line of the log."""

    live = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def on_report(self, report: RoundReport) -> None:
        values = asdict(report)
        event = "round_closed" if report.work == "train" else "version_evaluated"
        log.info(event, **{name: values[name] for name in LOGGED}, **shown(report.metrics))

    def on_notice(self, event: str, **fields: object) -> None:
        log.info(event, **fields)


class LiveDisplay:
    """A table of the newest rounds, what happened beside them, and a progress bar."""

    live = True

    def __init__(self, title: str, rounds: int, console: Console) -> None:
        self.title = title
        self._console = console
        self._reports: dict[int, RoundReport] = {}
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._notices: dict[str, str] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._bar: TaskID = self._progress.add_task(WAITING, total=rounds)
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def on_report(self, report: RoundReport) -> None:
        self._metrics[report.round] = {**self._metrics.get(report.round, {}), **shown(report.metrics)}
        if report.work == "train":
            self._reports[report.round] = report
        self._progress.update(self._bar, completed=report.round, description="training")

    def on_notice(self, event: str, **fields: object) -> None:
        words = " ".join(f"{name}={value}" for name, value in fields.items())
        self._notices.pop(event, None)  # the newest of its kind, at the end
        self._notices[event] = f"{event.replace('_', ' ')}  {words}"

    def _picture(self) -> Group:
        notices = Text("\n".join(list(self._notices.values())[-NOTICES:]), style="dim")
        return Group(*([self._table()] if self._reports else []), notices, self._progress)

    def _table(self) -> Table:
        shown = list(self._reports.values())[-max(3, self._console.height - LINES_BELOW) :]
        names = self._metric_names()
        table = Table(title=self.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for column in ("round", "attempt", *COUNTS, *names, "seconds", "up", "down"):
            table.add_column(column, justify="right", style="green" if column in names[:1] else None)
        for report in shown:
            table.add_row(*self._cells(report, names))
        return table

    def _metric_names(self) -> list[str]:
        known = {name: 0.0 for metrics in self._metrics.values() for name in metrics}
        first = headline(known)
        ranked = sorted(known, key=lambda name: (name != first, not name.endswith("_worst_10")))
        return ranked[:MOST_METRICS]

    def _cells(self, report: RoundReport, names: list[str]) -> list[str]:
        metrics = self._metrics[report.round]
        return [
            str(report.round),
            str(report.attempt),
            *(str(getattr(report, name)) for name in COUNTS),
            *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names),
            f"{report.duration_s:.2f}",
            size_text(report.bytes_up),
            size_text(report.bytes_down),
        ]
