"""What the bodies of models and updates travel on."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.settings import RunSettings
from broker.store import Store
from broker.topology import Topology
from broker.transport import Transport


@dataclass(frozen=True, slots=True)
class Ways:
    """A leader's two connections to the broker, and the claim-check store, if there is one."""

    reader: Transport
    writer: Transport
    topology: Topology
    settings: RunSettings
    store: Store | None = None
