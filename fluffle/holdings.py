"""Who holds what when a task's data is shared out on this machine: as plain data, as a table and as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fluffle.config import Config
from fluffle.pictures import new_figure
from fluffle.text import MOST_SHOWN, columns
from workers.data import Dataset
from workers.partition import Shares

Counts = NDArray[np.int64]


def holdings(config: Config, shares: Shares) -> dict[str, Any]:
    """What each participant holds. `by_class` counts its training examples, in the order of `classes`.

    `distance` is the total variation between its classes and everybody's, half the sum of the differences of
    shares: 0 for the same mixture, near 1 for classes that nobody else has. `effective_classes` is the exponential
    of the entropy of its classes: k for k classes in equal shares. Measured targets have neither.
    """
    classes = np.unique(shares.train.y) if np.issubdtype(shares.train.y.dtype, np.integer) else np.empty(0)
    everybody = _counted(shares.train.y, classes)

    def held(name: str, train: Dataset, held_out: Dataset) -> dict[str, Any]:
        own = _mixture(_counted(train.y, classes), everybody) if len(classes) else {}
        return {"participant": name, "examples": len(train), "held_out": len(held_out), **own}

    participants = [held(shard.name, shard.train, shard.held_out) for shard in shares.shards]
    means = {
        f"mean_{name}": float(np.mean([one[name] for one in participants]))
        for name in ("distance", "effective_classes")
        if len(classes)
    }
    return {
        "task": config.task,
        "partition": config.data.partition,
        "imbalance": config.data.imbalance,
        "seed": config.run.seed,
        "classes": classes.tolist(),
        "everybody": held("everybody", shares.train, shares.held_out),
        "participants": participants,
        **means,
    }


def _counted(labels: NDArray[Any], classes: NDArray[Any]) -> Counts:
    return np.array([(labels == label).sum() for label in classes], dtype=np.int64)


def _mixture(own: Counts, everybody: Counts) -> dict[str, Any]:
    p, q = own / own.sum(), everybody / everybody.sum()
    held = p[p > 0]
    return {
        "by_class": own.tolist(),
        "distance": float(np.abs(p - q).sum() / 2),
        "effective_classes": float(np.exp(-(held * np.log(held)).sum())),
    }


def holdings_text(found: dict[str, Any]) -> str:
    """The table, without single classes where there are many, and how skewed it is."""
    classes = found["classes"]
    shown = classes if len(classes) <= MOST_SHOWN else []
    head = ("PARTICIPANT", "EXAMPLES", "HELD OUT", *shown, *(("DISTANCE", "EFFECTIVE CLASSES") if classes else ()))
    table = columns(
        [head, *(_row(one, single=bool(shown)) for one in (*found["participants"], found["everybody"]))]
    )
    sizes = [one["examples"] for one in found["participants"]]
    words = f"{len(sizes)} participants, {found['partition']}: {min(sizes)} to {max(sizes)} examples"
    if not classes:
        return f"{table}\n{words}; the targets are measured numbers\n"
    own, all_of_them = found["mean_effective_classes"], found["everybody"]["effective_classes"]
    return (
        f"{table}\n{words}; on average {found['mean_distance']:.3f} from everybody's classes, and {own:.2f} of "
        f"everybody's {all_of_them:.2f} classes in effect\n"
    )


def _row(one: dict[str, Any], *, single: bool) -> tuple[object, ...]:
    counted = (*(one["by_class"] if single else ()),)
    skew = (f"{one['distance']:.3f}", f"{one['effective_classes']:.2f}") if "distance" in one else ()
    return (one["participant"], one["examples"], one["held_out"], *counted, *skew)


def draw_holdings(found: dict[str, Any]) -> Figure:
    """A bar for each participant, the first on top: its training examples, by class where there are classes."""
    participants, classes = found["participants"], found["classes"]
    figure = new_figure(8, min(40.0, 1.8 + 0.3 * len(participants)))
    axes = figure.subplots()
    names = [one["participant"] for one in participants]
    left = np.zeros(len(names))
    map_of = colormaps["tab10" if len(classes) <= 10 else "viridis"]
    for number, label in enumerate(classes or ["examples"]):
        width = np.array([one["by_class"][number] if classes else one["examples"] for one in participants])
        colour = map_of(number if len(classes) <= 10 else number / len(classes))
        axes.barh(names, width, left=left, color=colour, label=str(label))
        left += width
    axes.invert_yaxis()
    axes.set(title=f"{found['task']}, {found['partition']}", xlabel="training examples")
    if 0 < len(classes) <= MOST_SHOWN:
        figure.legend(loc="outside right upper", title="class", frameon=False)
    return figure
