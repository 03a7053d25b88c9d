"""Streaming DiLoCo (Douillard et al., 2025, "Streaming DiLoCo with overlapping communication"), without the
overlap: each round carries one fragment of the model."""

from __future__ import annotations

from aggregator.strategies.contribution import Contribution
from aggregator.strategies.optimiser import ServerOptimiser
from broker.tensors import Arrays, Named, copy
from broker.travelling import due


class Streaming:
    """An optimiser's step for the tensors that are due in round `number`; the others, and their moments, stay.

    With H local steps between two synchronisations of a tensor, a round is H / `fragments` of them.
    """

    def __init__(self, optimiser: ServerOptimiser, fragments: int, number: int) -> None:
        self._optimiser, self._fragments, self._number = optimiser, fragments, number
        self.wants, self.uses_disk = optimiser.wants, optimiser.uses_disk
        self._model: Arrays = {}
        self._due: Arrays = {}
        self._whole: Arrays = {}
        self._part: Arrays = {}

    @property
    def state(self) -> Arrays:
        """The moments of all tensors: those of a fragment that was not due yet are the first ones."""
        moved = self._optimiser.state
        return self._whole if moved is self._part else {**self._whole, **moved}

    def start(self, model: Arrays, state: Arrays) -> None:
        """Raises ConfigError if the model cannot be cut into so many fragments."""
        self._model, self._due = model, due(model, self._fragments, self._number)
        self._whole = state or self._optimiser.first_state(model)
        self._part = {name: v for name, v in self._whole.items() if name.partition("/")[2] in self._due}
        self._optimiser.start(self._due, self._part)

    def add(self, arrays: Named, by: Contribution) -> None:
        self._optimiser.add(arrays, by)

    def finish(self, out: Arrays | None = None) -> Arrays:
        """The new global model: what is not due is what it was."""
        moved = self._optimiser.finish({name: out[name] for name in self._due} if out else None)
        if not out:
            return {**self._model, **moved}
        for name in self._model.keys() - self._due.keys():
            copy(self._model[name], out[name])
        return out
