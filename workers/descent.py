"""Where one participant's gradient descent is: all that its next steps depend on, as named arrays and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from workers.devices import CPU, draws, set_draws
from workers.lesson import Lesson
from workers.optimisers import Optimiser
from workers.task import Arrays, TrainConfig

MODEL, OPTIMISER = "model/", "optimiser/"
_NONE = np.empty(0, np.uint8)
WORTH = 20  # of the time that saving takes, at least so much is trained before it is saved again

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Moved:
    """What the steps move: `read` gives it as named arrays, perhaps views, and `load` puts them back."""

    read: Callable[[], Arrays]
    load: Callable[[Arrays], None]


@dataclass(slots=True)
class Descent:
    """`losses`: each step's mean loss and number of examples, or tokens. `spent_s`: how long it trained before it
    was interrupted. What `moved` does not read is not part of it."""

    moved: Moved
    steps: Optimiser
    lesson: Lesson | None = None
    device: torch.device = CPU
    losses: list[tuple[float, int]] = field(default_factory=list)
    spent_s: float = 0.0

    def to_arrays(self, of: NDArray[np.uint8], spent_s: float) -> Arrays:
        """Some are views: the next step changes them. `of`: a digest of what is trained on, and how."""
        found = {MODEL + name: values for name, values in self.moved.read().items()}
        found |= {OPTIMISER + name: values for name, values in self.steps.progress().items()}
        found["losses"] = np.array([loss for loss, _ in self.losses])
        found["examples"] = np.array([count for _, count in self.losses], np.int64)
        found["torch"] = torch.get_rng_state().numpy()
        found["device"] = _NONE if (state := draws(self.device)) is None else state.numpy()
        found["lesson"] = _text(json.dumps(self.lesson.rng.bit_generator.state) if self.lesson else "")
        return {**found, "of": of, "spent_s": np.array(spent_s)}

    def begin(
        self, save_seconds: float, of: Callable[[], NDArray[np.uint8]], config: TrainConfig
    ) -> Callable[[float], None]:
        """Goes on from what was saved, if anything was. Returns what is to be called after every step with the
        seconds so far: it saves now and then. `of`: as for `to_arrays`, and only asked for if it is needed."""
        of = cache(of)
        if config.resume:
            self.go_on_from(config.resume, of())
        seldom = Seldom(save_seconds, config.clock, self.spent_s)
        return lambda spent_s: seldom(spent_s, lambda: config.save(self.to_arrays(of(), spent_s)))

    def go_on_from(self, saved: Arrays, of: NDArray[np.uint8]) -> None:
        """Takes up what `to_arrays` gave, unless it is of other data, settings or a task of another name."""
        if not saved or not np.array_equal(saved.get("of", of[:0]), of):
            if saved:
                log.warning("progress_dropped", reason="it is of other data or training settings")
            return
        self.moved.load(_under(MODEL, saved))
        self.steps.go_on_from(_under(OPTIMISER, saved))
        self.losses = list(zip(saved["losses"].tolist(), saved["examples"].tolist(), strict=True))
        torch.set_rng_state(torch.from_numpy(saved["torch"].copy()))
        if saved["device"].size:
            set_draws(self.device, torch.from_numpy(saved["device"].copy()))
        if self.lesson:
            self.lesson.rng.bit_generator.state = json.loads(saved["lesson"].tobytes())
        self.spent_s = float(saved["spent_s"])


@dataclass(slots=True)
class Seldom:
    """Saves every `every_s` seconds of training (0: never), or less often if that takes long. `saved_s`: how much
    training was saved before."""

    every_s: float
    clock: Callable[[], float]
    saved_s: float = 0.0
    _waits_s: float = 0.0

    def __call__(self, spent_s: float, save: Callable[[], None]) -> None:
        """Is told after every step how many seconds were spent so far."""
        if not self.every_s or spent_s - self.saved_s < max(self.every_s, self._waits_s):
            return
        began = self.clock()
        save()
        took_s = self.clock() - began
        self.saved_s, self._waits_s = spent_s + took_s, WORTH * took_s


def digest_of(words: str, arrays: Iterable[NDArray[np.generic]]) -> NDArray[np.uint8]:
    """A sha256 (32,) of some words and arrays."""
    digest = hashlib.sha256(words.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
    return np.frombuffer(digest.digest(), np.uint8)


def _text(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _under(prefix: str, saved: Mapping[str, NDArray[np.generic]]) -> Arrays:
    return {name.removeprefix(prefix): values for name, values in saved.items() if name.startswith(prefix)}
