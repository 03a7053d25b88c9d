"""What RabbitMQ says when it refuses something, in our words: what happened where, and the remedy.

Its reasons are sentences for people, so this looks for their parts. What is not known here is passed on as it is.
"""

from __future__ import annotations

import re

TOO_LARGE = re.compile(r"message size (\d+) is larger than (?:configured )?max size (\d+)")
HELD_TOO_LONG = re.compile(r"delivery acknowledgement .* timed out\. Timeout value used: (\d+) ms")
HOMELESS = re.compile(r"home node '(.*)' of durable queue '(.*)' in vhost '(.*)' is down or inaccessible")
LOST_OR_BUSY = (
    "did RabbitMQ lose that queue when it was killed (then `rabbitmqctl delete_queue` mends it), or is it busy?"
)
NOT_OPENED = "Expected one of ['Connection.OpenOk']"  # all that aiormq tells of what RabbitMQ says then


def too_large(said: str, body_bytes: int) -> str:
    """Why a body of that size was refused; empty if it was not for its size."""
    found = TOO_LARGE.search(said)
    if not found or body_bytes <= int(found[2]):
        return ""  # one that was published beside it is too large
    return (
        f"its {body_bytes} bytes are more than the {found[2]} that this RabbitMQ takes: raise max_message_size in "
        "rabbitmq.conf, or lower broker.chunk_bytes or broker.inline_bytes"
    )


def channel_closed(said: str) -> str:
    """Why a consumer's channel was closed."""
    if found := HELD_TOO_LONG.search(said):
        return (
            f"a delivery was held unacked for longer than the {int(found[1]) / 1000:g} s that RabbitMQ allows, and "
            "was taken back: raise consumer_timeout in rabbitmq.conf, or lower broker.refresh_s"
        )
    return f"its channel was closed ({said}): consume or read again"


def blocked(reason: str) -> str:
    """That publishers are blocked, and what to do."""
    return f"the broker blocks publishers: {reason}. Make room there, and it goes on by itself"


def not_confirmed(where: str, timeout_s: float, reason: str) -> str:
    """Why there was no confirm: `reason` is that of blocked publishers."""
    why = blocked(reason) if reason else LOST_OR_BUSY
    return f"{where} was not confirmed within {timeout_s:g} s: {why}"


def not_connected(said: str, user: str, vhost: str) -> str:
    """Why there is no connection."""
    if said.startswith(NOT_OPENED):
        return (
            f"does not open virtual host {vhost!r} for user {user!r}: there is no such virtual host, or that user "
            "may not use it, or too many connections of that user or virtual host are open (see `rabbitmqctl "
            "list_user_limits` and `list_vhost_limits`)"
        )
    return f"cannot be reached or refused the connection ({said}): is RabbitMQ running there?"


def homeless(said: str) -> str:
    """Why a queue or stream that RabbitMQ lists can be neither used nor deleted; empty if that is not so."""
    found = HOMELESS.search(said)
    if not found:
        return ""
    node, name, vhost = found.groups()
    resource = f'rabbit_misc:r(<<"{vhost}">>, queue, <<"{name}">>)'
    return (
        f"RabbitMQ lists {name!r}, but its home {node} is down, or was killed before it had written down what it "
        f"holds. Start {node}. If it runs, what was in {name!r} is lost: make it forget that name with\n"
        f"  rabbitmqctl eval 'rabbit_amqqueue:internal_delete({resource}, <<\"fluffle\">>).'\n"
        "and it will be declared again"
    )
