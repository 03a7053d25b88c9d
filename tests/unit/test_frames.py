"""Frames of AMQP by hand, against pamqp, which the client library uses; in whatever pieces they arrive."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, header
from pamqp import frame as pamqp_frame
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from broker.frames import HEARTBEAT, Frames, Letter, Message, ack_frame, publish_frames, reject_frame

OURS, OTHER = 3, 4
HEADERS = {
    "x-stream-offset": 1 << 40, "x-delivery-count": 2, "text": "words", "yes": True, "list": [1, "two", [3]],
    "table": {"x-stream-offset": 7}, "real": 0.5, "none": None, "bytes": bytearray(b"\x00\x01"), "small": -3,
}  # fmt: skip


@dataclass
class Listener:
    messages: list[Message] = field(default_factory=list)
    told: list[object] = field(default_factory=list)

    def on_message(self, message: Message) -> None:
        self.messages.append(message)

    def on_return(self, message_id: str) -> None:
        self.told.append(("returned", message_id))

    def on_confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        self.told.append((tag, multiple, taken))

    def on_close(self) -> None:
        self.told.append("closed")


def content(first: object, body: bytes, channel: int = OURS, largest: int = 10) -> bytes:
    """A method with the message that follows it, as a broker sends it."""
    properties = commands.Basic.Properties(
        content_type="a/b", headers=HEADERS, delivery_mode=2, priority=1, correlation_id="c", reply_to="r",
        expiration="60", message_id="id-1", user_id="p01", app_id="app",
    )  # fmt: skip
    frames: list[object] = [first, header.ContentHeader(0, len(body), properties)]
    frames += [ContentBody(body[start : start + largest]) for start in range(0, len(body), largest)]
    return b"".join(pamqp_frame.marshal(one, channel) for one in frames)  # type: ignore[arg-type]


def delivery(body: bytes, channel: int = OURS, tag: int = 1) -> bytes:
    return content(commands.Basic.Deliver("consumer-1", tag, True, "exchange", "p01.update"), body, channel)


def fed(frames: Frames, stream: bytes, cuts: list[int]) -> bytes:
    """What others see of a stream that arrives cut at these places."""
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    rest, start = b"", 0
    for end in ends:
        rest += b"".join(frames.feed(stream[start:end]))
        start = end
    return rest


@given(
    bodies=st.lists(st.binary(max_size=40), max_size=4),
    cuts=st.lists(st.integers(0, 1500), max_size=30),
)
def test_deliveries_come_whole_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    frames, listener = Frames(), Listener()
    frames.channels[OURS] = listener
    beat = pamqp_frame.marshal(Heartbeat(), 0)
    others = [beat, delivery(b"not ours", OTHER), pamqp_frame.marshal(commands.Channel.OpenOk(), OURS)]
    stream = b"".join(delivery(body, tag=tag) + others[tag % 3] for tag, body in enumerate(bodies))
    assert fed(frames, stream, cuts) == b"".join(others[tag % 3] for tag in range(len(bodies)))
    assert [message.body for message in listener.messages] == bodies
    for tag, message in enumerate(listener.messages):
        assert (message.consumer, message.tag, message.redelivered) == ("consumer-1", tag, True)
        assert (message.key, message.sender, message.id) == ("p01.update", "p01", "id-1")
        assert message.numbers["x-stream-offset"] == 1 << 40
        assert (message.numbers["x-delivery-count"], message.numbers["small"]) == (2, -3)


@given(cuts=st.lists(st.integers(0, 400), max_size=20))
def test_confirms_and_what_was_returned_are_told(cuts: list[int]) -> None:
    frames, listener = Frames(), Listener()
    frames.channels[OURS] = listener
    answers = [
        commands.Basic.Ack(5, True), commands.Basic.Nack(6, False, True), commands.Basic.Ack(7, False),
    ]  # fmt: skip
    closing = pamqp_frame.marshal(commands.Channel.Close(406, "no", 60, 40), OURS)
    stream = content(commands.Basic.Return(312, "NO_ROUTE", "e", "k"), b"which came back")
    stream += b"".join(pamqp_frame.marshal(answer, OURS) for answer in answers) + closing
    assert fed(frames, stream, cuts) == closing, "others must answer that"
    assert listener.told == [("returned", "id-1"), (5, True, True), (6, False, False), (7, False, True), "closed"]
    assert not listener.messages


def test_what_nobody_listens_to_is_left_alone() -> None:
    stream = delivery(b"a body") + HEARTBEAT + delivery(b"")
    assert fed(Frames(), stream, [3, 9, 50]) == stream


def test_a_channel_may_go_while_its_message_arrives() -> None:
    frames, listener = Frames(), Listener()
    frames.channels[OURS] = listener
    stream = delivery(b"0123456789" * 3)
    for cut in range(1, len(stream)):
        frames = Frames()
        frames.channels[OURS] = listener
        frames.feed(stream[:cut])
        del frames.channels[OURS]
        frames.feed(stream[cut:])
    assert not listener.messages


@pytest.mark.parametrize("size", [0, 1, 92, 93, 500])
def test_what_is_published_is_what_the_library_would_write(size: int) -> None:
    body = bytes(range(256))[:size] + bytes(max(0, size - 256))
    stream = publish_frames(OURS, Letter("fl.default.up", "p01.update", body, "id-9", "p01"), 100)
    found, whole = [], b""
    while stream:
        used, channel, part = pamqp_frame.unmarshal(stream)
        assert (channel, used <= 100) == (OURS, True)
        stream = stream[used:]
        found.append(part)
    publish, head, *parts = found
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("fl.default.up", "p01.update", True)
    assert isinstance(head, header.ContentHeader)
    said = head.properties
    assert (head.body_size, said.delivery_mode, said.message_id, said.user_id) == (size, 2, "id-9", "p01")
    for part in parts:
        assert isinstance(part, ContentBody)
        whole += part.value
    assert whole == body


def test_acks_and_rejections_are_what_the_library_would_write() -> None:
    assert ack_frame(OURS, 9) == pamqp_frame.marshal(commands.Basic.Ack(9, False), OURS)
    assert ack_frame(OURS, 9, multiple=True) == pamqp_frame.marshal(commands.Basic.Ack(9, True), OURS)
    for requeue in (False, True):
        frame = pamqp_frame.marshal(commands.Basic.Reject(9, requeue), OURS)
        assert reject_frame(OURS, 9, requeue=requeue) == frame
