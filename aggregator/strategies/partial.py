"""Some tensors stay with the participants: the others are combined, and those stay as they began."""

from __future__ import annotations

from collections.abc import Collection

from aggregator.strategies import Strategy
from aggregator.strategies.contribution import Contribution
from broker.errors import ConfigError
from broker.tensors import Arrays, Named, copy
from broker.travelling import is_local, shared


class Partial:
    """Any strategy over the tensors that travel. Those of `local` keep their initial values in the global model."""

    def __init__(self, strategy: Strategy, local: Collection[str]) -> None:
        self._strategy, self._local = strategy, local
        self.wants, self.uses_disk = strategy.wants, strategy.uses_disk
        self._stays: Arrays = {}

    @property
    def state(self) -> Arrays:
        return self._strategy.state

    def start(self, model: Arrays, state: Arrays) -> None:
        """Raises ConfigError if nothing would travel, or nothing would stay."""
        travels = shared(model, self._local)
        self._stays = {name: values for name, values in model.items() if is_local(name, self._local)}
        if not travels or not self._stays:
            what = "every tensor" if self._stays else "no tensor"
            raise ConfigError(
                f"personal.local = {','.join(self._local)!r} names {what} of the model, whose tensors are "
                f"{', '.join(sorted(model)[:10])}: name some of them"
            )
        self._strategy.start(travels, state)

    def add(self, arrays: Named, by: Contribution) -> None:
        self._strategy.add(arrays, by)

    def finish(self, out: Arrays | None = None) -> Arrays:
        travels = {name: values for name, values in out.items() if name not in self._stays} if out else None
        moved = self._strategy.finish(travels)
        if not out:
            return {**moved, **self._stays}
        for name, values in self._stays.items():
            copy(values, out[name])
        return out
