"""Aggregators and workers as real processes, in a federation that no test had yet."""

from __future__ import annotations

from pathlib import Path

from fluffle.chaos.processes import Deployment
from tests.rabbit_node import Rabbit, password


class Containing(str):
    """Stands for every text that it is a part of: `wait_for("not_connected", reason=Containing("not set up"))`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__contains__(other, self)

    __hash__ = str.__hash__


def deployment(rabbit: Rabbit, directory: Path) -> Deployment:
    """Whatever is started in it ends with its block."""
    return Deployment(rabbit.url, password, rabbit.topology(), directory)
