"""Everything that a stream holds now."""

from __future__ import annotations

import secrets

from broker.errors import StateError
from broker.messages import Barrier
from broker.retry import publish
from broker.transport import Delivery, Transport
from broker.wire import encode

PATIENCE_S = 60.0


async def read_all(connection: Transport, stream: str) -> list[Delivery]:
    """From its first message to its last. Raises StateError if that does not come to an end."""
    barrier = encode(Barrier(nonce=secrets.token_hex(8)))
    inbox = await connection.read(stream, offset="first")
    await publish(connection, "", stream, barrier, timeout_s=PATIENCE_S)
    found: list[Delivery] = []
    while (delivery := await inbox.get(PATIENCE_S)) is not None:
        if delivery.body == barrier:
            await inbox.close()
            return found
        found.append(delivery)
    raise StateError(f"{stream} could not be read to its end within {PATIENCE_S:g} s")
