"""FedNova (Wang et al., 2020, "Tackling the objective inconsistency problem in heterogeneous federated
optimization")."""

from __future__ import annotations

import math
from collections.abc import Collection

from aggregator.strategies.buffers import parameters
from aggregator.strategies.contribution import Contribution
from aggregator.sums import FixedPointSum
from broker.errors import BadMessage
from broker.messages import Wants
from broker.tensors import Arrays, Named


class FedNova:
    """x <- x + server_lr tau_eff sum_i p_i Delta_i / a_i, with tau_eff = sum_i p_i a_i and p_i = n_i / sum_i n_i.

    a_i is participant i's number of effective steps: what a constant gradient of 1 moves its weights by, in units
    of its step size (the 1-norm of the paper's vector a_i). Without it whoever takes more steps pulls more. Buffers
    and integers are averaged with p_i, for they do not grow with steps.

    The update says a_i, and nobody can check it: too small a one gives its sender more weight, too large a one
    makes everybody's step longer. `most_steps` limits that.
    """

    wants: Wants = "delta"
    uses_disk = False

    def __init__(
        self, total: FixedPointSum, server_lr: float, most_steps: float, buffers: Collection[str] = ()
    ) -> None:
        self.state: Arrays = {}
        self._sum, self._server_lr, self._most_steps, self._buffers = total, server_lr, most_steps, buffers
        self._model: Arrays = {}
        self._parameters: frozenset[str] = frozenset()
        self._weighted_steps: list[float] = []  # n_i a_i

    def start(self, model: Arrays, state: Arrays) -> None:  # noqa: ARG002 - it has none
        self._model, self._parameters = model, parameters(model, self._buffers)
        self._weighted_steps.clear()
        self._sum.start(model)

    def add(self, arrays: Named, by: Contribution) -> None:
        steps = by.effective_steps
        if not 1 <= steps <= self._most_steps:
            raise BadMessage(
                f"effective_steps = {steps:g}, but fednova takes 1 to {self._most_steps:g}: the learning "
                "task must tell them (TrainResult.effective_steps); strategy.steps_max is the limit"
            )
        self._sum.add(arrays, by.weight, by.damping, dict.fromkeys(self._parameters, steps))
        self._weighted_steps.append(by.weight * steps)

    def finish(self, out: Arrays | None = None) -> Arrays:
        tau_eff = math.fsum(self._weighted_steps) / self._sum.weight  # exact, so in any order the same
        rates = dict.fromkeys(self._parameters, self._server_lr * tau_eff)
        return self._sum.step(self._model, 1.0, out, rates)
