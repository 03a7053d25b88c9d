"""The AMQP frames that carry messages, read and written by hand: what is on the hot path, and nothing else.

A client library turns every frame into objects, hands them from task to task, and copies a body five times on its
way in and five times on its way out. Here a body is copied once each way. Everything else (connecting, declaring,
consuming, errors, heartbeats) is the library's, and whatever it must see, it sees.

The format is AMQP 0-9-1: https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, section 4.2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

HEAD = struct.Struct(">BHL")  # type, channel and size of a frame; its payload and one closing octet follow
END = b"\xce"
METHOD, HEADER, BODY = 1, 2, 3
HEARTBEAT = HEAD.pack(8, 0, 0) + END

ACK, CLOSE = (60, 80), (20, 40)  # class and method: of a channel, by the broker
PERSISTENT = 2
DELIVERY_MODE, MESSAGE_ID, USER_ID = 1 << 12, 1 << 7, 1 << 4  # flags of properties
SHORT, TABLE = -1, -2
PROPERTIES = (
    SHORT,
    SHORT,
    TABLE,
    1,
    1,
    SHORT,
    SHORT,
    SHORT,
    SHORT,
    8,
    SHORT,
    SHORT,
    SHORT,
    SHORT,
)  # kind or octets
HEADERS_AT, MESSAGE_ID_AT, USER_ID_AT = 2, 8, 11  # among them
NUMBERS = {c: struct.Struct(f) for c, f in (
    (b"b", ">b"), (b"B", ">B"), (b"s", ">h"), (b"u", ">H"), (b"I", ">l"), (b"i", ">L"), (b"l", ">q"), (b"T", ">Q"),
)}  # fmt: skip
OCTETS = {
    b"t": 1,
    b"U": 2,
    b"L": 8,
    b"f": 4,
    b"d": 8,
    b"D": 5,
    b"V": 0,
}  # of other values; the rest begin with a length


@dataclass(slots=True)
class Message:
    """A message as it came. `tag` is for acks; `numbers` are those among its headers."""

    consumer: str
    tag: int
    redelivered: bool
    key: str
    body: bytes = b""
    sender: str = ""
    id: str = ""
    numbers: dict[str, int] = field(default_factory=dict)


class Channel(Protocol):
    """Who is told what comes on one channel."""

    def on_message(self, message: Message) -> None:
        """A delivery."""

    def on_return(self, message_id: str) -> None:
        """A message that nothing takes; its confirm follows."""

    def on_confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        """The broker has taken responsibility for what was published, or has not."""

    def on_close(self) -> None:
        """The broker closes the channel: from now on nothing may be written to it."""


@dataclass(slots=True)
class _Content:
    """A message whose header or body is still to come."""

    message: Message
    returned: bool
    missing: int = 0
    parts: list[memoryview] = field(default_factory=list)


class Frames:
    """Takes deliveries, returned messages and confirms of its `channels` out of what arrives.

    `feed` gives back what others must see.
    """

    def __init__(self) -> None:
        self.channels: dict[int, Channel] = {}
        self._contents: dict[int, _Content] = {}
        self._head = b""  # of the frame that is arriving
        self._kind = self._number = 0
        self._left = 0  # octets of it that are still to come, with the closing one
        self._ours = False
        self._pieces: list[memoryview] = []

    def feed(self, data: bytes) -> list[bytes | memoryview]:
        rest: list[bytes | memoryview] = []
        view, at = memoryview(data), 0
        while at < len(view):
            if self._left:
                piece = view[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                self._take(piece, rest)
            else:
                at = self._begin(view, at, rest)
        return rest

    def _begin(self, view: memoryview, at: int, rest: list[bytes | memoryview]) -> int:
        """Reads as much of a frame's head as there is; returns where its payload begins."""
        head = self._head + bytes(view[at : at + HEAD.size - len(self._head)])
        at += len(head) - len(self._head)
        self._head = head
        if len(head) == HEAD.size:
            self._kind, self._number, size = HEAD.unpack(head)
            self._left = size + 1
            self._ours = self._number in self.channels and (
                self._kind == METHOD or (self._kind in (HEADER, BODY) and self._number in self._contents)
            )
            if not self._ours:
                rest.append(head)
                self._head = b""
        return at

    def _take(self, piece: memoryview, rest: list[bytes | memoryview]) -> None:
        """Takes a piece of the payload; the frame is whole when nothing is left."""
        if not self._ours:
            rest.append(piece)
        elif self._kind == BODY:
            self._add(self._contents[self._number], piece if self._left else piece[:-1])
        else:
            self._pieces.append(piece)
        if self._ours and not self._left:
            head, self._head = self._head, b""
            if self._kind != BODY:
                payload, self._pieces = b"".join(self._pieces), []
                if not self._understand(payload):
                    rest += (head, payload)

    def _add(self, content: _Content, part: memoryview) -> None:
        content.parts.append(part)
        content.missing -= len(part)
        if not content.missing and not self._left:
            self._complete(content)

    def _understand(self, payload: bytes) -> bool:
        """Acts on a method or header; false if others must see it."""
        channel = self.channels.get(self._number)
        if channel is None:  # it was closed while the frame arrived
            return self._kind == HEADER
        if self._kind == HEADER:
            content = self._contents[self._number]
            content.missing = _read_header(payload, content.message)
            if not content.missing:
                self._complete(content)
            return True
        method, at = struct.unpack_from(">HH", payload), 4
        match method:
            case (60, 60):
                consumer, at = _short(payload, at)
                tag, redelivered = struct.unpack_from(">Q?", payload, at)
                _, at = _short(payload, at + 9)
                key, _ = _short(payload, at)
                self._contents[self._number] = _Content(Message(consumer, tag, redelivered, key), returned=False)
            case (60, 50):
                self._contents[self._number] = _Content(Message("", 0, False, ""), returned=True)  # noqa: FBT003
            case (60, 80) | (60, 120):
                tag, bits = struct.unpack_from(">QB", payload, at)
                channel.on_confirm(tag, multiple=bool(bits & 1), taken=method == ACK)
            case _:
                if method == CLOSE:
                    channel.on_close()
                return False
        return True

    def _complete(self, content: _Content) -> None:
        del self._contents[self._number]
        message, channel = content.message, self.channels.get(self._number)
        message.body = b"".join(content.parts)
        if channel is not None and content.returned:
            channel.on_return(message.id)
        elif channel is not None:
            channel.on_message(message)


def _read_header(payload: bytes, message: Message) -> int:
    """Notes what the properties say; returns the size of the body."""
    _, _, size, flags = struct.unpack_from(">HHQH", payload)
    at = 14
    for place, kind in enumerate(PROPERTIES):
        if not flags & (1 << (15 - place)):
            continue
        if kind == SHORT:
            text, at = _short(payload, at)
            if place == MESSAGE_ID_AT:
                message.id = text
            elif place == USER_ID_AT:
                message.sender = text
        elif kind == TABLE:
            (length,) = struct.unpack_from(">L", payload, at)
            message.numbers = dict(_numbers(payload, at + 4, at + 4 + length))
            at += 4 + length
        else:
            at += kind
    return int(size)


def _short(payload: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + payload[at]
    return payload[at + 1 : end].decode(errors="replace"), end


def _numbers(payload: bytes, at: int, end: int) -> Iterator[tuple[str, int]]:
    """The whole numbers in a table, by name. What else is in it is passed over."""
    while at < end:
        name, at = _short(payload, at)
        kind, at = payload[at : at + 1], at + 1
        if number := NUMBERS.get(kind):
            yield name, number.unpack_from(payload, at)[0]
            at += number.size
        elif kind in OCTETS:
            at += OCTETS[kind]
        else:
            (length,) = struct.unpack_from(">L", payload, at)
            at += 4 + length


# -- what is written ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Letter:
    """A persistent message that must be taken by some queue."""

    exchange: str
    key: str
    body: bytes
    id: str
    user: str


def publish_frames(number: int, letter: Letter, frame_max: int) -> bytes:
    """A message as the frames of one channel, none above `frame_max` octets (0: no limit)."""
    method = (
        struct.pack(">HHH", 60, 40, 0) + _as_short(letter.exchange) + _as_short(letter.key) + b"\x01"
    )  # mandatory
    flags = DELIVERY_MODE | MESSAGE_ID | USER_ID
    header = struct.pack(">HHQHB", 60, 0, len(letter.body), flags, PERSISTENT)
    header += _as_short(letter.id) + _as_short(letter.user)
    frames: list[bytes | memoryview] = [*_framed(METHOD, number, method), *_framed(HEADER, number, header)]
    view, most = memoryview(letter.body), (frame_max or len(letter.body) + 8) - 8
    for start in range(0, len(view), most):
        frames += _framed(BODY, number, view[start : start + most])
    return b"".join(frames)


def ack_frame(number: int, tag: int, *, multiple: bool = False) -> bytes:
    """Settles a delivery, or with `multiple` all up to this one; tag 0: all there are."""
    return b"".join(_framed(METHOD, number, struct.pack(">HHQ?", 60, 80, tag, multiple)))


def reject_frame(number: int, tag: int, *, requeue: bool) -> bytes:
    return b"".join(_framed(METHOD, number, struct.pack(">HHQ?", 60, 90, tag, requeue)))


def _framed(kind: int, number: int, payload: bytes | memoryview) -> tuple[bytes, bytes | memoryview, bytes]:
    return HEAD.pack(kind, number, len(payload)), payload, END


def _as_short(text: str) -> bytes:
    """Raises ValueError for one that AMQP has no room for."""
    octets = text.encode()
    return bytes((len(octets),)) + octets
