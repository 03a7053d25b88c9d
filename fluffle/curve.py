"""Pictures: a run's metric and loss against rounds, and several runs beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aggregator.history import RoundReport
from fluffle.comparison import Line
from fluffle.pictures import new_figure, save_picture
from fluffle.results import by_round, headline

METRIC_COLOUR = "#1f5fa8"
LOSS_COLOUR = "#b0570a"
REFERENCE_COLOUR = "#666666"
ACROSS = 3  # panels side by side, at the most
STYLES = ("-", "--", ":", "-.")  # one for every ten lines: there are ten colours


def draw_curve(
    reports: Sequence[RoundReport], title: str, *, metric: str = "", references: Mapping[str, float] | None = None
) -> Figure:
    """A figure of `metric` (or the run's headline) with the loss on a second axis.

    `references` are drawn as labelled horizontal lines, such as the pooled model's accuracy.
    """
    rounds = by_round(reports)
    metric = headline({name: value for report in rounds for name, value in report.metrics.items()}, metric)
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
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


def draw_lines(panels: Mapping[str, Sequence[Line]], title: str, metric: str, against: str = "rounds") -> Figure:
    """A panel for each title, with a curve for each line and the band between its least and most.

    Lines of the same name have the same colour in all panels. `flat` ones are drawn across.
    """
    across = min(len(panels), ACROSS)
    down = math.ceil(len(panels) / across)
    figure = new_figure(max(6.0, 4.2 * across), 3.6 * down)
    figure.suptitle(title)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    names = list(dict.fromkeys(line.name for lines in panels.values() for line in lines))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (heading, lines) in zip(grid.flat, panels.items(), strict=False):
        axes.set(title=heading, xlabel=against, ylabel=metric)
        axes.grid(visible=True, alpha=0.3)
        for line in lines:
            _draw(axes, line, names.index(line.name), against)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(names)), frameon=False
    )
    return figure


def _draw(axes: Axes, line: Line, place: int, against: str) -> None:
    style: dict[str, Any] = {"color": f"C{place % 10}", "linestyle": STYLES[place // 10 % len(STYLES)]}
    if line.flat:
        axes.axhline(line.points[-1].value, label=line.name, **style)
        axes.axhspan(line.low[-1], line.high[-1], alpha=0.08, color=style["color"])
        return
    x = [getattr(point, against) for point in line.points]
    marker = "o" if len(x) == 1 else ""
    axes.plot(x, [point.value for point in line.points], label=line.name, marker=marker, **style)
    axes.fill_between(x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)


def save_curve(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG. Raises StateError if it cannot be written."""
    save_picture(figure, path, "curve")


def _plot(axes: Axes, rounds: Sequence[RoundReport], metric: str, colour: str) -> None:
    points = [(report.round, report.metrics[metric]) for report in rounds if metric in report.metrics]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=metric)
