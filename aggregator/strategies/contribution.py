"""What is known of an update beside its arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.tensors import Arrays


@dataclass(frozen=True, slots=True)
class Contribution:
    """How much one update counts. `weight`: its examples, or 1 where all count alike. `effective_steps` as its
    sender says, 0 if it does not. `damping`: s(tau) of a stale update, at most 1: its arrays are scaled by it. Its
    weight in the divisor is not, or damping would cancel where all are stale (FedBuff, Nguyen et al., 2022).

    `control`: the change of its control variate (SCAFFOLD), by tensor. `start_loss`: its loss at the model that it
    started from (q-FedAvg)."""

    weight: int
    participant: str
    effective_steps: float = 0.0
    damping: float = 1.0
    control: Arrays = field(default_factory=dict)
    start_loss: float | None = None
