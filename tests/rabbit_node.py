"""What a private RabbitMQ holds for the tests, and how they reach it. `fluffle/chaos/node.py` starts it.

Federations, users and rights are loaded when it boots, because a call of rabbitmqctl takes seconds. RabbitMQ
wants the exact exchange in a topic permission, so there is a fixed number of federations, and every test takes
its own. `python -m tests.rabbit_node` prints the definitions: a broker that loaded them and holds nothing else
can serve the tests too, as FLUFFLE_AMQP_URL=amqp://host:port/vhost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from yarl import URL

from broker.definitions import (
    Document,
    Enrolment,
    access_definitions,
    merged,
    password_hash,
    thing_definitions,
)
from broker.rabbitmq import RabbitBroker, RabbitSettings
from broker.topology import AGGREGATOR, Topology
from fluffle.chaos.node import Node

FEDERATIONS = [f"t-{number:03}" for number in range(220)]
SET_UP = "set-up"  # this one is there when the node has booted
FOREIGN = "foreign"  # p-1 takes no part in this one
OPERATOR = "operator"  # may do everything
PARTICIPANTS = ["p-1", "p-2", *(f"p{i:02d}" for i in range(1, 21))]


def password(user: str) -> str:
    return f"secret of {user}"


@dataclass
class Rabbit:
    """A running broker with those definitions. `node` is None if it is not ours to stop."""

    url: URL
    node: Node | None = None
    _numbers: count[int] = field(default_factory=count)

    def broker(self, settings: RabbitSettings | None = None, port: int | None = None) -> RabbitBroker:
        """Connections for any user; `port` is that of a proxy on this machine."""
        url = self.url if port is None else self.url.with_host("127.0.0.1").with_port(port)
        return RabbitBroker(str(url), password, settings)

    def topology(self) -> Topology:
        """That of a federation which no test had yet."""
        return Topology(FEDERATIONS[next(self._numbers)])


@asynccontextmanager
async def in_thread(block: Callable[[], AbstractContextManager[None]]) -> AsyncIterator[None]:
    """A block whose entry and exit take seconds."""
    entered = block()
    await asyncio.to_thread(entered.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(entered.__exit__, None, None, None)


def node_definitions() -> Document:
    """Users with their rights in every federation, and everything of the one that is set up whole."""
    federations = [Enrolment(Topology(name), tuple(PARTICIPANTS)) for name in (*FEDERATIONS, SET_UP)]
    foreign = Enrolment(Topology(FOREIGN), ("p-2",))
    users = (AGGREGATOR, *PARTICIPANTS)
    hashes = {user: password_hash(password(user), b"salt") for user in (*users, OPERATOR)}
    return merged(
        access_definitions([*federations, foreign], hashes), thing_definitions(federations[-1]), operator(hashes)
    )


def operator(hashes: dict[str, str]) -> Document:
    """Somebody with more rights than anybody should have."""
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    user = {"name": OPERATOR, "password_hash": hashes[OPERATOR], "tags": "administrator,impersonator"}
    hashing = {"hashing_algorithm": "rabbit_password_hashing_sha256"}
    return {"users": [user | hashing], "permissions": [{"user": OPERATOR, "vhost": "/", **everything}]}


if __name__ == "__main__":
    print(json.dumps(node_definitions(), indent=2))
