"""A picture of a run: its metric, and its loss, against rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aggregator.history import RoundReport
from fluffle.pictures import new_figure, save_picture
from fluffle.results import by_round, headline

METRIC_COLOUR = "#1f5fa8"
LOSS_COLOUR = "#b0570a"
REFERENCE_COLOUR = "#666666"


def draw_curve(
    reports: Sequence[RoundReport], title: str, *, metric: str = "", references: Mapping[str, float] | None = None
) -> Figure:
    """A figure of `metric` (or the run's headline) with the loss on a second axis.

    `references` are drawn as labelled horizontal lines, such as the pooled model's accuracy.
    """
    rounds = by_round(reports)
    metric = headline({name: value for report in rounds for name, value in report.metrics.items()}, metric)
    figure, axes = new_figure(8, 4.5)
    axes.set(title=title, xlabel="round", ylabel=metric)
    axes.grid(visible=True, alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plot(axes, rounds, metric, METRIC_COLOUR)
    for place, (label, value) in enumerate((references or {}).items()):
        axes.axhline(value, color=REFERENCE_COLOUR, linestyle=("--", ":", "-.")[place % 3], label=label)
    if references:
        axes.legend(loc="best", frameon=False)
    if metric != "loss" and any("loss" in report.metrics for report in rounds):
        second = axes.twinx()
        second.set_ylabel("loss", color=LOSS_COLOUR)
        _plot(second, rounds, "loss", LOSS_COLOUR)
    return figure


def save_curve(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG. Raises StateError if it cannot be written."""
    save_picture(figure, path, "curve")


def _plot(axes: Axes, rounds: Sequence[RoundReport], metric: str, colour: str) -> None:
    points = [(report.round, report.metrics[metric]) for report in rounds if metric in report.metrics]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=metric)
