"""deploy/rabbitmq.conf: RabbitMQ boots with this very file, and its values take effect."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import DEPLOY
from yarl import URL

from aggregator.settings import BrokerSettings
from broker.topology import AGGREGATOR
from broker.wire import MAX_FRAME_BYTES
from fluffle.chaos.node import PROGRAMS, Node, installed
from tests.rabbit_node import Rabbit, node_definitions

FILE = DEPLOY / "rabbitmq.conf"
LINE = re.compile(r"^([a-z_.0-9]+) = (.+)$", re.MULTILINE)
SET = dict(LINE.findall(FILE.read_text("utf-8")))
OFFERED = dict(re.findall(r"^# ([a-z_.0-9]+) = (.+)$", FILE.read_text("utf-8"), re.MULTILINE))
SCHEMAS = sorted(PROGRAMS.parent.glob("lib/*/plugins/*/priv/schema/*.schema"))


def no_rabbitmq() -> None:
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
        "RabbitMQ is not installed: `make rabbitmq` gets it"
    )


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A private RabbitMQ with the file; only the path of the definitions is another one."""
    if not installed():
        no_rabbitmq()
    directory = Path(tempfile.mkdtemp(prefix="fluffle-rabbit-"))
    node = Node.create(directory, node_definitions())
    text = FILE.read_text("utf-8")
    path = SET["definitions.local.path"]
    assert text.count(path) == 1
    conf = text.replace(path, f"{directory}/definitions.json")
    directory.joinpath("rabbitmq.conf").write_text(conf)
    try:
        node.start()
        yield node
    finally:
        node.end()


def test_its_values_take_effect(node: Node) -> None:
    told = subprocess.run(
        [PROGRAMS / "rabbitmqctl", "environment"], env=node.environment, cwd=node.directory, capture_output=True,
        text=True, check=True, timeout=100,
    )  # fmt: skip
    environment = "".join(told.stdout.split())
    for value in (
        f"{{consumer_timeout,{SET['consumer_timeout']}}}",
        f"{{max_message_size,{SET['max_message_size']}}}",
        f"{{heartbeat,{SET['heartbeat']}}}",
        f"{{vm_memory_high_watermark,{SET['vm_memory_high_watermark.relative']}}}",
        f'{{disk_free_limit,"{SET["disk_free_limit.absolute"]}"}}',
        f"{{wal_max_size_bytes,{SET['raft.wal_max_size_bytes']}}}",
        f"{{wal_max_entries,{SET['raft.wal_max_entries']}}}",
        f'"{node.directory}/definitions.json"',
        "{skip_if_unchanged,true}",
    ):
        assert value in environment, value


async def test_its_definitions_are_loaded(node: Node) -> None:
    """Users and rights are there: the aggregator gets in."""
    rabbit = Rabbit(URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/"), node)
    transport = await rabbit.broker().connect(AGGREGATOR, purpose="conf")
    await transport.close()


def test_its_limits_fit_what_fluffle_does() -> None:
    assert int(SET["max_message_size"]) >= 16 << 20 > MAX_FRAME_BYTES
    timeout_s = int(SET["consumer_timeout"]) / 1000
    assert timeout_s >= 300, "RabbitMQ allows nothing shorter"
    assert timeout_s > 3 * BrokerSettings().refresh_s, "a leader must not lose its record for one slow refresh"


def test_every_value_is_explained() -> None:
    for block in FILE.read_text("utf-8").split("\n\n"):
        assert block.startswith("#"), block


def test_what_is_commented_out_exists_too() -> None:
    if not SCHEMAS:
        no_rabbitmq()
    mappings = re.findall(r'{mapping, *"([^"]+)"', "".join(file.read_text("utf-8") for file in SCHEMAS))
    patterns = [re.sub(r"\\\$\w+", r"[\\w-]+", re.escape(mapping)) for mapping in mappings]
    assert {"management.tcp.port", "prometheus.tcp.port", "listeners.ssl.default"} <= OFFERED.keys()
    for key in [*SET, *OFFERED]:
        assert any(re.fullmatch(pattern, key) for pattern in patterns), key
