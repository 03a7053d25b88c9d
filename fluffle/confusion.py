"""A picture of a confusion matrix."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from fluffle.pictures import new_figure
from fluffle.results import Confusion
from fluffle.text import MOST_SHOWN


def draw_confusion(confusion: Confusion, title: str) -> Figure:
    """Shades are shares of each true class; numbers are examples."""
    matrix = np.asarray(confusion)
    size = len(matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(10.0, 2.5 + 0.45 * size)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    if size <= MOST_SHOWN:
        axes.set(xticks=range(size), yticks=range(size))
        for (true, predicted), count in np.ndenumerate(matrix):
            shade = "white" if share[true, predicted] > 0.5 else "black"
            axes.text(predicted, true, str(count), ha="center", va="center", color=shade, size=8)
    return figure
