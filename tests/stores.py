"""Claim-check stores in which something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from broker.objects import Objects
from broker.store import Store

When = Literal["before", "after"]


@dataclass(frozen=True)
class Touch:
    """One use of a store: before it has an effect, and after."""

    name: Literal["write", "read", "names", "delete"]
    path: str
    when: When


Strike = Callable[[Touch], None]


@dataclass
class Watched:
    """Tells `strike` of everything that is done, and does it unless `strike` raises."""

    objects: Objects
    strike: Strike
    touches: list[Touch] = field(default_factory=list)
    keeps: bool = True

    def write(self, path: str, data: memoryview) -> None:
        self._tell(Touch("write", path, "before"))
        self.objects.write(path, data)
        self._tell(Touch("write", path, "after"))

    def read(self, path: str, into: memoryview) -> int:
        self._tell(Touch("read", path, "before"))
        size = self.objects.read(path, into)
        self._tell(Touch("read", path, "after"))
        return size

    def names(self, folder: str) -> list[str]:
        self._tell(Touch("names", folder, "before"))
        names = self.objects.names(folder)
        self._tell(Touch("names", folder, "after"))
        return names

    def delete(self, folder: str) -> None:
        self._tell(Touch("delete", folder, "before"))
        self.objects.delete(folder)
        self._tell(Touch("delete", folder, "after"))

    def _tell(self, touch: Touch) -> None:
        self.touches.append(touch)
        self.strike(touch)

    def store(self) -> Store:
        return Store(self, "watched")

    def written(self) -> list[str]:
        return [touch.path for touch in self.touches if (touch.name, touch.when) == ("write", "after")]


def nothing(touch: Touch) -> None:
    """All goes well."""


class OnceAt:
    """Calls `act` at the n-th use of the store that `wanted` picks, and never again."""

    def __init__(
        self, nth: int, act: Callable[[], None], wanted: Callable[[Touch], bool] = lambda touch: True
    ) -> None:
        self._left, self._act, self._wanted = nth, act, wanted
        self._lock = threading.Lock()
        self.struck: Touch | None = None

    def __call__(self, touch: Touch) -> None:
        with self._lock:
            if self.struck or not self._wanted(touch):
                return
            self._left -= 1
            if self._left >= 0:
                return
            self.struck = touch
        self._act()
