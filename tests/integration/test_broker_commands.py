"""`fluffle broker`: what an operator does, against a real RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from yarl import URL

from broker.errors import TransportError
from broker.fitness import Bench, Finding, examine
from broker.topology import AGGREGATOR, Topology
from broker.transport import Queue
from fluffle.chaos.node import Node, installed
from fluffle.cli import cli
from tests.rabbit_node import OPERATOR, PARTICIPANTS, Rabbit, node_definitions, password

pytestmark = pytest.mark.xdist_group("rabbitmq")

TEMPORARY = ("quorum", "stream", "routed", "large", "names", "none")


@pytest.fixture
def topology(rabbit: Rabbit) -> Topology:
    return rabbit.topology()


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    file = tmp_path / "secrets.toml"
    users = (AGGREGATOR, *PARTICIPANTS, OPERATOR)
    file.write_text("".join(f'{user} = "{password(user)}"\n' for user in users))
    file.chmod(0o600)
    return file


def fluffle(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], env=environment, prog_name="fluffle")


def check(url: object, topology: Topology, *more: object) -> tuple[Result, dict[str, dict[str, str]]]:
    """The outcome, and the report's lines by the name of the check."""
    outcome = fluffle("broker", "check", "--broker", url, "--federation", topology.federation, "--json", "-", *more)
    report = json.loads(outcome.stdout) if outcome.stdout else {"checks": []}
    assert not outcome.stdout or report["fit"] == (outcome.exit_code == 0)
    return outcome, {line["check"]: line for line in report["checks"]}


def test_a_federation_is_set_up_and_then_fit(rabbit: Rabbit, topology: Topology, secrets: Path) -> None:
    access = ("--secrets", secrets)
    outcome, before = check(rabbit.url, topology, *access)
    assert outcome.exit_code == 0
    assert before["federation"]["level"] == "warning"
    assert topology.head in before["federation"]["finding"]
    assert "fluffle broker setup" in before["federation"]["remedy"]
    outcome, before = check(rabbit.url, topology, *access, "--as", "p01")
    assert outcome.exit_code == 0
    assert [name for name, line in before.items() if line["level"] != "ok"] == [
        "federation", "inbox", "publishing", "names",
    ]  # fmt: skip

    setup = ("broker", "setup", "--broker", rabbit.url, *access, "--federation", topology.federation)
    for more in ((), (), ("--participants", "p01,p02"), ("--count", 2)):
        outcome = fluffle(*setup, *more)
        assert (outcome.exit_code, outcome.output) == (
            0, f"federation {topology.federation!r} is set up{' with 2 inboxes' if more else ''}\n",
        ), outcome.output  # fmt: skip

    for user in (AGGREGATOR, "p01"):
        outcome, after = check(rabbit.url, topology, *access, "--as", user)
        assert outcome.exit_code == 0
        assert {line["level"] for line in after.values()} == {"ok"}, outcome.stderr
        assert after["connection"]["finding"] == f"connected as {user}"
    asyncio.run(everything_is_there(rabbit, topology))


async def everything_is_there(rabbit: Rabbit, topology: Topology) -> None:
    """A participant can be told, although no aggregator ever ran."""
    aggregator = await rabbit.broker().connect(AGGREGATOR, purpose="test")
    await aggregator.publish(topology.down, "p02", b"told")
    inbox = await aggregator.consume(topology.inbox("p02"))
    assert await inbox.get(10)
    await aggregator.close()


@pytest.mark.parametrize("user", [AGGREGATOR, "p01"])
async def test_a_check_leaves_nothing_behind(rabbit: Rabbit, topology: Topology, user: str) -> None:
    aggregator = await rabbit.broker().connect(AGGREGATOR, purpose="test")
    await aggregator.declare(*topology.aggregator_declarations())
    updates = await aggregator.read(topology.updates, offset="first")
    bench = await bench_of(rabbit, topology, user)
    findings = await examine(bench)
    assert [finding.level for finding in findings] == ["ok"] * len(findings)
    for what in TEMPORARY:
        with pytest.raises(TransportError, match="NOT_FOUND"):
            await bench.probe.find_queue(bench.name(what))
    with pytest.raises(TransportError, match="NOT_FOUND"):
        await bench.probe.find_exchange(bench.name("exchange"))
    with pytest.raises(TransportError, match="NOT_FOUND"):
        await bench.probe.find_queue(topology.inbox("p01"))
    assert await updates.get(0.2) is None
    await bench.transport.close()
    await bench.probe.close()
    await aggregator.close()


async def bench_of(rabbit: Rabbit, topology: Topology, user: str) -> Bench:
    broker = rabbit.broker()
    return Bench(await broker.connect(user, purpose="check"), await broker.probe(user), topology, "token")


async def test_things_that_were_declared_differently_are_found(rabbit: Rabbit, topology: Topology) -> None:
    bench = await bench_of(rabbit, topology, AGGREGATOR)
    await bench.transport.declare(*topology.aggregator_declarations())
    await bench.transport.delete(topology.rejected)
    await bench.transport.declare(Queue(topology.rejected, max_length=3))
    found = by_name(await examine(bench))
    assert found["federation"].level == "failed"
    assert topology.rejected in found["federation"].finding
    await bench.transport.close()
    await bench.probe.close()


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_user_with_too_many_rights_is_found(rabbit: Rabbit, topology: Topology, secrets: Path) -> None:
    """An administrator who may also speak as others, where a participant belongs."""
    outcome, found = check(rabbit.url, topology, "--secrets", secrets, "--as", OPERATOR)
    assert outcome.exit_code == 1
    assert found["rights"]["level"] == "failed"
    for deed in ("publish to any queue", "declare what it likes"):
        assert deed in found["rights"]["finding"]
    fluffle("broker", "setup", "--broker", rabbit.url, "--secrets", secrets, "--federation", topology.federation)
    outcome, found = check(rabbit.url, topology, "--secrets", secrets, "--as", OPERATOR)
    for deed in ("speak for others", "tell others what to do", "read what others send"):
        assert deed in found["rights"]["finding"]
    assert found["names"]["level"] == "failed"
    assert "impersonator" in found["names"]["remedy"]


async def test_a_participant_is_checked_while_its_worker_runs(rabbit: Rabbit, topology: Topology) -> None:
    """It has so many connections and no more."""
    aggregator = await rabbit.broker().connect(AGGREGATOR, purpose="test")
    await aggregator.declare(*topology.aggregator_declarations())
    worker = [await rabbit.broker().connect("p04", purpose="work") for _ in range(2)]
    await worker[0].declare(*topology.inbox_declarations("p04"))
    inbox = await worker[0].consume(topology.inbox("p04"), prefetch=1)
    bench = await bench_of(rabbit, topology, "p04")
    assert {finding.level for finding in await examine(bench)} == {"ok"}
    await aggregator.publish(topology.down, "p04", b"still there")
    assert await inbox.get(10)
    for transport in (aggregator, *worker, bench.transport):
        await transport.close()
    await bench.probe.close()


def test_a_wrong_password_fails_and_is_not_shown(rabbit: Rabbit, topology: Topology) -> None:
    url = rabbit.url.with_user(AGGREGATOR).with_password("wrong-one")
    outcome, found = check(url, topology)
    assert outcome.exit_code == 1
    assert "password" in found["connection"]["finding"]
    assert "wrong-one" not in outcome.output
    outcome = fluffle("broker", "setup", "--broker", url)
    assert outcome.exit_code == 1
    assert "wrong-one" not in outcome.output


def test_nobody_there_and_an_address_without_a_password(tmp_path: Path, topology: Topology) -> None:
    outcome, found = check("amqp://aggregator:x@127.0.0.1:1", topology)
    assert outcome.exit_code == 1
    assert "is RabbitMQ running" in found["connection"]["finding"]
    for url in ("amqp://127.0.0.1", "amqp://p01@127.0.0.1"):
        outcome = fluffle("broker", "check", "--broker", url)
        assert outcome.exit_code == 2
        assert "--secrets FILE" in outcome.output
    for url in ("memory", "http://127.0.0.1", "amqp://"):
        outcome = fluffle("broker", "setup", "--broker", url)
        assert outcome.exit_code == 2
        assert "amqp[s]://" in outcome.output


def test_passwords_come_from_address_or_file(rabbit: Rabbit, topology: Topology, secrets: Path) -> None:
    """A name in the address decides who connects; a strange character in a password does no harm."""
    named = rabbit.url.with_user("p01")
    _, found = check(named, topology, "--secrets", secrets)
    assert found["connection"]["finding"] == "connected as p01"
    _, found = check(named.with_password(password("p01")), topology)
    assert found["connection"]["finding"] == "connected as p01"
    outcome, found = check(named, topology, "--secrets", secrets, "--as", "p02")
    assert outcome.exit_code == 1
    assert "p02" in found["connection"]["finding"]
    outcome, found = check(rabbit.url, topology, "--secrets", secrets, "--as", "p99")
    assert outcome.exit_code == 1
    assert "has no password of 'p99'" in found["connection"]["finding"]


@pytest.mark.slow
def test_a_new_broker_from_definitions_to_fit_and_a_lost_home_is_named(tmp_path: Path) -> None:
    """All the way that an operator goes: definitions, boot, check. Then kill -9 before RabbitMQ wrote them down."""
    if not installed():
        pytest.skip("RabbitMQ is not installed")
    document, secrets = tmp_path / "definitions.json", tmp_path / "secrets.toml"
    outcome = fluffle("broker", "definitions", "--count", 2, "--secrets", secrets, "--out", document)
    assert outcome.exit_code == 0, outcome.output
    node = Node.create(Path(tempfile.mkdtemp(prefix="fluffle-rabbit-")), node_definitions())
    node.directory.joinpath("definitions.json").write_bytes(document.read_bytes())
    url, topology = URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/"), Topology("default")
    try:
        node.start()
        for user in (AGGREGATOR, "p01", "p02"):
            outcome, found = check(url, topology, "--secrets", secrets, "--as", user)
            assert {line["level"] for line in found.values()} == {"ok"}, outcome.stderr
        node.kill()
        node.start()
        outcome, found = check(url, topology, "--secrets", secrets)
        if found["federation"]["level"] == "failed":  # as mostly, but what a kill -9 leaves is up to chance
            assert "NOT_FOUND - home node" in found["federation"]["finding"]
            follow(found["federation"]["remedy"], node, topology.updates, topology.head)
        outcome = fluffle("broker", "setup", "--broker", url, "--secrets", secrets)
        assert outcome.exit_code == 0, outcome.output
        outcome, found = check(url, topology, "--secrets", secrets)
        assert {line["level"] for line in found.values()} == {"ok"}, outcome.stderr
    finally:
        node.end()


def follow(remedy: str, node: Node, *names: str) -> None:
    evaluated = re.search(r"rabbitmqctl eval '(.*)'`", remedy)
    assert "rabbitmqctl delete_queue NAME" in remedy
    assert evaluated
    for name in names:
        expression = evaluated[1].replace("VHOST", "/").replace("NAME", name)
        try:
            node.control("delete_queue", name)
        except subprocess.CalledProcessError:
            node.evaluate(expression)


class TestDefinitions:
    def test_the_three_ways_to_name_participants_are_one(self, tmp_path: Path) -> None:
        listed = tmp_path / "names.txt"
        listed.write_text("# hospitals\np01\n\n  p02  \n")
        documents = []
        for way in (("--participants", "p01, p02"), ("--participants-file", listed), ("--count", 2)):
            outcome = fluffle("broker", "definitions", *way, "--secrets", tmp_path / "secrets.toml")
            assert outcome.exit_code == 0, outcome.output
            document = json.loads(outcome.stdout)
            for user in document["users"]:
                assert user.pop("password_hash")
            documents.append(document)
        assert documents[0] == documents[1] == documents[2]

    def test_it_says_how_to_load_it_and_shows_no_password(self, tmp_path: Path) -> None:
        out, secrets = tmp_path / "definitions.json", tmp_path / "secrets.toml"
        outcome = fluffle(
            "broker", "definitions", "--count", 1, "--secrets", secrets, "--out", out, "--vhost", "fed"
        )
        assert outcome.stdout == ""
        assert f"rabbitmqctl import_definitions {out}" in outcome.stderr
        assert f"load_definitions = {out}" in outcome.stderr
        assert json.loads(out.read_text())["vhosts"] == [{"name": "fed"}]
        for made in tomllib.loads(secrets.read_text()).values():
            assert made not in outcome.output + out.read_text()

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ((), "name the participants"),
            (("--count", 2, "--participants", "p01"), "name the participants"),
            (("--participants", ","), "names nobody"),
            (("--participants", "P01"), "'P01' is not a valid name"),
            (("--participants", "aggregator"), "'aggregator' is not a valid name"),
            (("--participants", "p01,p01"), "once"),
            (("--count", 1, "--federation", "A b"), "'A b' is not a valid name"),
            (("--count", 1, "--out", "nowhere/at/all"), "--out nowhere/at/all"),
        ],
    )
    def test_misuse_is_told_in_one_line(self, tmp_path: Path, arguments: tuple[object, ...], reason: str) -> None:
        outcome = fluffle("broker", "definitions", "--secrets", tmp_path / "secrets.toml", *arguments)
        assert outcome.exit_code == 2
        assert reason in outcome.stderr
        assert outcome.stderr.count("\n") == 1
