"""What all pictures share. matplotlib takes its time: import this late."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from broker.errors import StateError


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that no window system shows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_picture(figure: Figure, path: Path, what: str = "picture") -> None:
    """Writes the figure as PNG. Raises StateError if it cannot be written."""
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise StateError(f"{path}: the {what} cannot be written: {error.strerror or error}") from None
