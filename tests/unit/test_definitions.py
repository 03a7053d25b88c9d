"""The definitions document: rights as whole names, arguments as the adapter declares them, federations together."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.definitions import (
    MOST_CHANNELS,
    MOST_CONNECTIONS,
    Document,
    Enrolment,
    access_definitions,
    definitions,
    merged,
    password_hash,
    thing_definitions,
)
from broker.errors import ConfigError
from broker.topology import AGGREGATOR, Topology

ONE = Enrolment(Topology("one"), ("p01", "p02"))
TWO = Enrolment(Topology("two"), ("p02", "p03"))
HASHES = {user: f"hash of {user}" for user in (AGGREGATOR, "p01", "p02", "p03")}


def of(document: Document, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    return [thing for thing in document[kind] if all(thing[key] == value for key, value in wanted.items())]


def may(document: Document, user: str, deed: str, name: str) -> bool:
    """As RabbitMQ decides it: it searches."""
    (permission,) = of(document, "permissions", user=user)
    return re.search(permission[deed], name) is not None


def test_a_password_hash_is_what_rabbitmq_expects() -> None:
    hashed = base64.b64decode(password_hash("päss", b"salt"))
    assert hashed == b"salt" + hashlib.sha256(b"salt" + "päss".encode()).digest()
    with pytest.raises(ValueError, match="salt"):
        password_hash("x", b"five!")


def test_everything_of_a_federation_is_in_its_document() -> None:
    made = definitions([ONE], HASHES, vhost="fed")
    assert json.loads(json.dumps(made)) == made
    assert made["vhosts"] == [{"name": "fed"}]
    assert [user["name"] for user in made["users"]] == [AGGREGATOR, "p01", "p02"]
    assert {user["tags"] for user in made["users"]} == {""}
    limits = {"max-connections": MOST_CONNECTIONS, "max-channels": MOST_CHANNELS}
    assert [user["limits"] for user in made["users"]] == [{}, limits, limits]
    assert {thing["name"] for thing in made["exchanges"]} == {"fl.one.up", "fl.one.down"}
    assert {thing["name"] for thing in made["queues"]} == {
        "fl.one.head", "fl.one.rejected", "fl.one.updates", "fl.one.inbox.p01", "fl.one.inbox.p02",
    }  # fmt: skip
    (head,) = of(made, "queues", name="fl.one.head")
    assert head["durable"]
    assert head["arguments"] == {
        "x-queue-type": "quorum", "x-single-active-consumer": True, "x-delivery-limit": 1000,
    }  # fmt: skip
    bound = {(b["source"], b["routing_key"], b["destination"]) for b in made["bindings"]}
    assert {("fl.one.up", "*.update", "fl.one.updates"), ("fl.one.down", "p02", "fl.one.inbox.p02")} <= bound
    assert all(thing["vhost"] == "fed" for kind in made if kind not in ("vhosts", "users") for thing in made[kind])


@pytest.mark.parametrize("deed", ["configure", "write", "read"])
def test_rights_are_whole_names(deed: str) -> None:
    made = definitions([ONE], HASHES)
    own = {"configure": "fl.one.inbox.p01", "write": "fl.one.up", "read": "fl.one.model.run"}[deed]
    assert may(made, "p01", deed, own)
    for name in (f"x{own}", own.replace(".", "x"), own.replace("one", "two"), "", "amq.default", "fl.one.head"):
        assert not may(made, "p01", deed, name), name
    for name in (f"{own}x", f"{own}.x"):
        assert may(made, "p01", deed, name) == (deed == "read"), name
    assert may(made, AGGREGATOR, deed, "fl.one.check.token")
    assert not may(made, AGGREGATOR, deed, "fl.onex.check")


NAMES = st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True)


@given(names=st.sets(NAMES.filter(lambda n: n not in ("all", AGGREGATOR)), min_size=2, max_size=4))
def test_nobody_may_touch_what_is_anothers(names: set[str]) -> None:
    enrolment = Enrolment(Topology("f"), tuple(sorted(names)))
    made = definitions([enrolment], dict.fromkeys(enrolment.users, ""))
    for user in enrolment.participants:
        for other in names - {user}:
            for deed in ("configure", "write", "read"):
                for name in (f"fl.f.inbox.{other}", f"fl.f.outbox.{other}", f"fl.f.chunks.{other}"):
                    assert not may(made, user, deed, name)
            for right in of(made, "topic_permissions", user=user):
                assert not re.search(right["write"], f"{other}.update")
                assert not re.search(right["read"], other)


def test_keys_are_the_participants_own() -> None:
    made = definitions([ONE], HASHES)
    (up,) = of(made, "topic_permissions", user="p01", exchange="fl.one.up")
    (down,) = of(made, "topic_permissions", user="p01", exchange="fl.one.down")
    assert [bool(re.search(up["write"], key)) for key in ("p01.update", "p02.update", "p01", "xp01.update")] == [
        True, False, False, False,
    ]  # fmt: skip
    assert [bool(re.search(down["read"], key)) for key in ("p01", "all", "p02", "#", "*", "all.#")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert not re.search(up["read"], "p01.update")
    assert not re.search(down["write"], "p01")
    assert of(made, "topic_permissions", user=AGGREGATOR) == []


def test_federations_in_one_document_share_users_and_nothing_else() -> None:
    made = definitions([ONE, TWO], HASHES)
    assert [user["name"] for user in made["users"]] == [AGGREGATOR, "p01", "p02", "p03"]
    assert len(made["permissions"]) == 4
    assert made["vhosts"] == [{"name": "/"}]
    for user, in_one, in_two in (("p01", True, False), ("p02", True, True), ("p03", False, True)):
        assert may(made, user, "write", "fl.one.up") == in_one
        assert may(made, user, "write", "fl.two.up") == in_two
    assert may(made, AGGREGATOR, "configure", "fl.two.head")
    assert {policy["name"] for policy in made["policies"]} == {
        "fl.one.rejected", "fl.one.inbox.all", "fl.two.rejected", "fl.two.inbox.all",
    }  # fmt: skip


def test_merging_keeps_each_thing_once() -> None:
    both = merged(access_definitions([ONE], HASHES), thing_definitions(ONE))
    assert both == definitions([ONE], HASHES)
    assert merged(both, both) == both


@pytest.mark.parametrize("names", [("all",), ("aggregator",), ("P01",), ("p01", "p01"), ("p.1",)])
def test_names_that_cannot_be(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"participant|once"):
        Enrolment(Topology("f"), names)
