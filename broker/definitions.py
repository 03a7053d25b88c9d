"""RabbitMQ's definitions: a document that holds all users, rights and durable things of federations.

A broker reads it when it boots (`load_definitions`), or at any time (`rabbitmqctl import_definitions`). What it
does not name stays as it is. Pure: it knows names and arguments and speaks no AMQP, and what the adapter
declares has the same arguments, because declaring a thing with others is refused.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.errors import ConfigError
from broker.topology import AGGREGATOR, Access, Topology
from broker.transport import Binding, Exchange, Queue, Stream

Arguments = dict[str, Any]  # of AMQP: strings, numbers, booleans
Document = dict[str, list[dict[str, Any]]]

SALT_BYTES = 4  # as RabbitMQ has it
# A quorum queue without a limit puts what comes back behind all the others; RabbitMQ 4 gives up after 20 times.
NO_DELIVERY_LIMIT = 1_000_000
# A worker has two connections. After a cut the broker may count the old pair for two heartbeats more.
MOST_CONNECTIONS = 4
MOST_CHANNELS = 32  # of all connections of a worker; it uses about five
REJECTED_KEPT_S = 30 * 24 * 3600
# Declared lengths are the participant's word, a policy is the operator's: no stolen password fills the disk.
INBOX_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A federation and who takes part in it."""

    topology: Topology
    participants: tuple[str, ...]

    def __post_init__(self) -> None:
        for participant in self.participants:
            self.topology.inbox(participant)  # raises ConfigError for a name that cannot be
        if len(set(self.participants)) < len(self.participants):
            raise ConfigError(f"federation {self.topology.federation!r}: name every participant once")

    @property
    def users(self) -> tuple[str, ...]:
        return (AGGREGATOR, *self.participants)


def password_hash(password: str, salt: bytes) -> str:
    """What RabbitMQ keeps of a password: the salt, and the sha256 of both, in base64."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def definitions(enrolments: Sequence[Enrolment], hashes: Mapping[str, str], vhost: str = "/") -> Document:
    """Everything that these federations need, in one virtual host. `hashes` are of every user's password."""
    return merged(
        access_definitions(enrolments, hashes, vhost), *(thing_definitions(one, vhost) for one in enrolments)
    )


def access_definitions(enrolments: Sequence[Enrolment], hashes: Mapping[str, str], vhost: str = "/") -> Document:
    """The users and what they may do. A user has one set of rights in a virtual host: for all its federations."""
    users = list(dict.fromkeys(user for enrolment in enrolments for user in enrolment.users))
    rights = {
        user: [enrolment.topology.access(user) for enrolment in enrolments if user in enrolment.users]
        for user in users
    }
    return {
        "vhosts": [{"name": vhost}],
        "users": [_user(user, hashes[user]) for user in users],
        "permissions": [{"user": user, "vhost": vhost, **_permission(rights[user])} for user in users],
        "topic_permissions": [
            {"user": user, "vhost": vhost, **right}
            for user in users
            for access in rights[user]
            for right in _topic_permissions(access)
        ],
    }


def thing_definitions(enrolment: Enrolment, vhost: str = "/") -> Document:
    """Exchanges, queues, streams and bindings of one federation, and policies that an operator may change."""
    things = [
        *enrolment.topology.aggregator_declarations(),
        *(thing for who in enrolment.participants for thing in enrolment.topology.inbox_declarations(who)),
    ]
    return {
        "exchanges": [_exchange(thing, vhost) for thing in things if isinstance(thing, Exchange)],
        "queues": [_queue(thing, vhost) for thing in things if isinstance(thing, Queue | Stream)],
        "bindings": [_binding(thing, vhost) for thing in things if isinstance(thing, Binding)],
        "policies": list(_policies(enrolment.topology, vhost)),
    }


def merged(*documents: Document) -> Document:
    """One document with everything of these, each thing once."""
    kinds = dict.fromkeys(kind for document in documents for kind in document)
    return {kind: _distinct(thing for document in documents for thing in document.get(kind, ())) for kind in kinds}


def arguments_of(thing: Queue | Stream) -> Arguments:
    """The arguments that a queue or stream is declared with."""
    return queue_arguments(thing) if isinstance(thing, Queue) else stream_arguments(thing)


def queue_arguments(queue: Queue) -> Arguments:
    arguments: Arguments = {"x-queue-type": "quorum" if queue.replicated else "classic"}
    if queue.single_active_consumer:
        arguments["x-single-active-consumer"] = True
    if queue.replicated:
        arguments["x-delivery-limit"] = NO_DELIVERY_LIMIT
    if queue.delivery_limit is not None:
        arguments["x-delivery-limit"] = queue.delivery_limit
    if queue.max_length is not None:
        arguments |= {"x-max-length": queue.max_length, "x-overflow": "drop-head"}
    if queue.expires_s is not None:
        arguments["x-expires"] = round(1000 * queue.expires_s)
    return arguments


def stream_arguments(stream: Stream) -> Arguments:
    return {
        "x-queue-type": "stream",
        "x-max-length-bytes": stream.max_bytes,
        "x-stream-max-segment-size-bytes": stream.segment_bytes,
    }


def whole(*patterns: str) -> str:
    """RabbitMQ searches; `Access` means whole names."""
    return f"^({'|'.join(patterns)})$"


def _user(name: str, hashed: str) -> dict[str, Any]:
    limits = {"max-connections": MOST_CONNECTIONS, "max-channels": MOST_CHANNELS}
    return {
        "name": name,
        "password_hash": hashed,
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": "",
        "limits": {} if name == AGGREGATOR else limits,
    }


def _permission(rights: Sequence[Access]) -> dict[str, str]:
    return {
        "configure": whole(*(access.configure for access in rights)),
        "write": whole(*(access.write for access in rights)),
        "read": whole(*(access.read for access in rights)),
    }


def _topic_permissions(access: Access) -> Iterator[dict[str, str]]:
    for exchange, keys in access.publish.items():
        yield {"exchange": exchange, "write": whole(keys), "read": "^$"}
    for exchange, keys in access.bind.items():
        yield {"exchange": exchange, "write": "^$", "read": whole(keys)}


def _exchange(exchange: Exchange, vhost: str) -> dict[str, Any]:
    return {
        "name": exchange.name, "vhost": vhost, "type": "topic", "durable": True, "auto_delete": False,
        "internal": False, "arguments": {},
    }  # fmt: skip


def _queue(queue: Queue | Stream, vhost: str) -> dict[str, Any]:
    return {
        "name": queue.name, "vhost": vhost, "durable": True, "auto_delete": False,
        "arguments": arguments_of(queue),
    }  # fmt: skip


def _binding(binding: Binding, vhost: str) -> dict[str, Any]:
    return {
        "source": binding.exchange, "vhost": vhost, "destination": binding.destination,
        "destination_type": "queue", "routing_key": binding.pattern, "arguments": {},
    }  # fmt: skip


def _policies(topology: Topology, vhost: str) -> Iterator[dict[str, Any]]:
    """No argument that the code relies on is here. Only one policy applies to a queue: the highest priority."""
    inboxes = topology.inbox("p").removesuffix("p")
    policies: list[tuple[str, str, Arguments]] = [
        (topology.rejected, re.escape(topology.rejected), {"message-ttl": 1000 * REJECTED_KEPT_S}),
        (f"{inboxes}all", f"{re.escape(inboxes)}.*", {"max-length-bytes": INBOX_BYTES}),
    ]
    for name, pattern, settings in policies:
        yield {
            "vhost": vhost, "name": name, "pattern": whole(pattern), "apply-to": "queues", "priority": 0,
            "definition": settings,
        }  # fmt: skip


def _distinct(things: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Federations share users and the virtual host."""
    return list({repr(thing): thing for thing in things}.values())
