"""SCAFFOLD (Karimireddy et al., 2020, "SCAFFOLD: stochastic controlled averaging for federated learning",
Algorithm 1 with Option II): the aggregator's half. The participants' is `workers/control.py`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregator.settings import StrategySettings
from aggregator.strategies.buffers import parameters
from aggregator.strategies.contribution import Contribution
from aggregator.sums import FixedPointSum
from broker.errors import BadMessage, StateError
from broker.messages import Wants
from broker.tensors import MAX_NAME, Arrays, Named, check_like
from broker.travelling import controls_in, named_controls, zero_controls


class Scaffold:
    """x <- x + server_lr mean_S(Delta y_i);  c <- c + (1/N) sum_S Delta c_i, N = `participants`, S who answered.

    The control variate c is the state: `control/<name>` for each floating-point tensor, float32 or float64, zero
    before the first round; that of a buffer stays zero. Everybody counts alike, as in the paper: c is the plain
    mean of the c_i, and a mean of Delta y that is weighted otherwise would not be what c corrects. Buffers and
    integers are averaged, whatever server_lr is.

    A stale Delta y is damped, its Delta c is not: the participant's c_i has changed by all of it. Delta c has a
    scale of its own in its sum, which follows from c and not from the model.
    """

    wants: Wants = "delta+control"
    uses_disk = False

    def __init__(self, participants: int, total: FixedPointSum, chosen: StrategySettings) -> None:
        self.state: Arrays = {}
        self._participants, self._sum = participants, total
        self._control_sum = FixedPointSum(total.weight_max, total.weight_cap)
        self._server_lr, self._buffers = chosen.server_lr or 1.0, chosen.buffer_patterns
        self._model: Arrays = {}
        self._control: Mapping[str, np.ndarray] = {}

    def start(self, model: Arrays, state: Arrays) -> None:
        self._model, self.state = model, state
        zero = zero_controls(model)
        self._control = controls_in(state) if state else zero
        if state:
            _check_state(state, named_controls(zero))
        if long := [name for name in named_controls(zero) if len(name) > MAX_NAME]:
            raise StateError(
                f"tensor {long[0]!r}: the model needs a shorter name, for its control variate has none"
            )
        self._sum.start(model)
        self._control_sum.start(dict(self._control))

    def add(self, arrays: Named, by: Contribution) -> None:
        if by.control.keys() != self._control.keys():
            raise BadMessage("the update has no control variates: its learning task must tell the sum of its steps")
        self._control_sum.check(by.control, 1)
        self._sum.add(arrays, 1, by.damping)
        self._control_sum.add(by.control, 1)

    def finish(self, out: Arrays | None = None) -> Arrays:
        rates = dict.fromkeys(parameters(self._model, self._buffers), self._server_lr)
        moved = self._sum.step(self._model, 1.0, out, rates)
        share = self._control_sum.weight / self._participants  # |S| / N
        stays = self.state and all(array.flags.writeable for array in self.state.values())
        new = self._control_sum.step(dict(self._control), share, controls_in(self.state) if stays else None)
        self.state = self.state if stays else named_controls(new)
        return moved


def _check_state(state: Arrays, like: Arrays) -> None:
    try:
        check_like(state, like)
    except BadMessage as bad:
        raise StateError(
            f"the strategy's state in the record is another one's ({bad.reason}): go on with the strategy.name and "
            "personal.local that the run had, or begin again with --fresh"
        ) from None
