"""Frames of a connection, however their bytes are cut, tell whether publishers are blocked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from broker.blocking import BlockWatch


def frame(body: bytes, kind: int = 1, channel: int = 0) -> bytes:
    return bytes((kind, 0, channel)) + len(body).to_bytes(4, "big") + body + b"\xce"


def blocked(reason: bytes) -> bytes:
    return frame(bytes((0, 10, 0, 60, len(reason))) + reason)


UNBLOCKED = frame(bytes((0, 10, 0, 61)))
START = frame(bytes((0, 10, 0, 10)) + b"p" * 700)
HEARTBEAT = frame(b"", kind=8)
FORGED = frame(blocked(b"what somebody sends"), kind=3, channel=1)  # a message's body
CONFIRM = frame(bytes((0, 60, 0, 80)) + b"\0" * 9, channel=1)
TALK = START + HEARTBEAT + FORGED + CONFIRM


def test_it_hears_why_and_that_it_is_over() -> None:
    watch = BlockWatch("p01 publish")
    with capture_logs() as logs:
        watch.feed(TALK)
        assert (watch.reason, watch.unblocked.is_set()) == ("", True)
        watch.feed(TALK + blocked(b"low on memory") + TALK)
        assert (watch.reason, watch.unblocked.is_set()) == ("low on memory", False)
        watch.feed(UNBLOCKED + TALK)
        assert (watch.reason, watch.unblocked.is_set()) == ("", True)
    assert [(log["event"], log["connection"], log.get("reason")) for log in logs] == [
        ("publishers_blocked", "p01 publish", "low on memory"),
        ("publishers_unblocked", "p01 publish", None),
    ]


@pytest.mark.parametrize("reason", [b"", b"x" * 255, b"\xff"])
def test_any_reason_blocks(reason: bytes) -> None:
    watch = BlockWatch("p01 publish")
    watch.feed(blocked(reason))
    assert watch.reason
    assert not watch.unblocked.is_set()


@given(st.lists(st.integers(1, 40), min_size=1))
def test_it_does_not_matter_how_the_bytes_are_cut(pieces: list[int]) -> None:
    data = TALK + blocked(b"low on disk") + TALK
    watch, at = BlockWatch("p01 publish"), 0
    while at < len(data):
        for piece in pieces:
            watch.feed(data[at : at + piece])
            at += piece
    assert watch.reason == "low on disk"
    watch.feed(UNBLOCKED)
    assert watch.reason == ""
