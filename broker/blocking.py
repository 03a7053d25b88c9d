"""Hearing that RabbitMQ blocks publishers, because it is short of memory or disk.

RabbitMQ says so in a frame of its own (`connection.blocked`), which aiormq handles without telling anybody. So this
follows the frames of a connection as their bytes arrive. It looks at the head of each frame, and at the body of
short ones on channel 0 only.
"""

from __future__ import annotations

import asyncio
import struct

import structlog

log = structlog.get_logger(__name__)

HEAD = struct.Struct(">BHL")  # type, channel and size; the body and one closing octet follow
METHOD, CONNECTION = 1, 0  # a type of frame; the channel that speaks of the connection
BLOCKED, UNBLOCKED = bytes((0, 10, 0, 60)), bytes((0, 10, 0, 61))  # class and method, before the arguments
LONGEST_BYTES = 4 + 1 + 255  # of BLOCKED, whose argument is a short string


class BlockWatch:
    """Why the broker blocks the publishers of one connection, if it does. `feed` it with all that arrives."""

    def __init__(self, name: str) -> None:
        self.reason = ""
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self._name = name
        self._begun = b""  # a frame whose end is still missing
        self._skip = 0  # bytes of a frame that nobody wants

    def feed(self, data: bytes) -> None:
        data, at, self._begun = self._begun + data, self._skip, b""
        while at + HEAD.size <= len(data):
            kind, channel, size = HEAD.unpack_from(data, at)
            body, end = at + HEAD.size, at + HEAD.size + size
            if kind == METHOD and channel == CONNECTION and size <= LONGEST_BYTES:
                if end > len(data):
                    break
                self._hear(data[body:end])
            at = end + 1
        self._skip = max(0, at - len(data))
        self._begun = data[at:]

    def _hear(self, method: bytes) -> None:
        if method.startswith(BLOCKED):
            self.reason = method[5:].decode(errors="replace") or "for no reason that it tells"
            self.unblocked.clear()
            log.warning("publishers_blocked", connection=self._name, reason=self.reason)
        elif method.startswith(UNBLOCKED):
            self.reason = ""
            self.unblocked.set()
            log.warning("publishers_unblocked", connection=self._name)
