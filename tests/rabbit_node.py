"""A private RabbitMQ for the tests: on loopback, in a directory of its own, gone when they are.

Federations, users and rights are loaded when it boots, because a call of rabbitmqctl takes seconds. RabbitMQ
wants the exact exchange in a topic permission, so there is a fixed number of federations, and every test takes
its own. `python -m tests.rabbit_node` prints the definitions: a broker that loaded them and holds nothing else
can serve the tests too, as FLUFFLE_AMQP_URL=amqp://host:port/vhost.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from yarl import URL

from broker.definitions import (
    Document,
    Enrolment,
    access_definitions,
    merged,
    password_hash,
    thing_definitions,
)
from broker.rabbitmq import RabbitBroker, RabbitSettings
from broker.topology import AGGREGATOR, Topology

PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # not the wrappers in /usr/sbin, which change the user
SERVER = PROGRAMS / "rabbitmq-server"
READY_S = 120.0
FEDERATIONS = [f"t-{number:03}" for number in range(220)]
SET_UP = "set-up"  # this one is there when the node has booted
FOREIGN = "foreign"  # p-1 takes no part in this one
OPERATOR = "operator"  # may do everything
PARTICIPANTS = ["p-1", "p-2", "p01", "p02", "p03", "p04", "p05"]
HOSTNAME = "localhost"


def installed() -> bool:
    return SERVER.exists()


def password(user: str) -> str:
    return f"secret of {user}"


@dataclass
class Rabbit:
    """A running broker with those definitions. `node` is None if it is not ours to stop."""

    url: URL
    node: Node | None = None
    _numbers: count[int] = field(default_factory=count)

    def broker(self, settings: RabbitSettings | None = None, port: int | None = None) -> RabbitBroker:
        """Connections for any user; `port` is that of a proxy on this machine."""
        url = self.url if port is None else self.url.with_host("127.0.0.1").with_port(port)
        return RabbitBroker(str(url), password, settings)

    def topology(self) -> Topology:
        """That of a federation which no test had yet."""
        return Topology(FEDERATIONS[next(self._numbers)])


@dataclass
class Node:
    """The processes of a private broker: RabbitMQ itself, and the epmd that it asks for ports."""

    directory: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def create(cls, directory: Path) -> Node:
        node = cls(directory, free_port())
        directory.joinpath("definitions.json").write_text(json.dumps(node_definitions()))
        directory.joinpath("enabled_plugins").write_text("[].")
        directory.joinpath("env.conf").touch()
        directory.joinpath("rabbitmq.conf").write_text(
            "definitions.import_backend = local_filesystem\n"
            f"definitions.local.path = {directory}/definitions.json\n"
            "definitions.skip_if_unchanged = true\n"
        )
        dist, epmd = free_port(), free_port()
        node.environment = os.environ | {
            "HOME": str(directory),  # of the cookie
            "RABBITMQ_NODENAME": f"fluffle{node.port}@{HOSTNAME}",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(node.port),
            "RABBITMQ_DIST_PORT": str(dist),
            "RABBITMQ_MNESIA_BASE": f"{directory}/mnesia",
            "RABBITMQ_LOG_BASE": f"{directory}/log",
            "RABBITMQ_PID_FILE": f"{directory}/pid",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{directory}/generated",
            "RABBITMQ_CONFIG_FILE": f"{directory}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{directory}/env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/enabled_plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd),
        }
        node._spawn(["epmd", "-address", "127.0.0.1", "-port", str(epmd)])
        return node

    def start(self) -> None:
        """Returns once it answers."""
        server = self._spawn([str(SERVER)])
        until = time.monotonic() + READY_S
        while not answers(self.port):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"RabbitMQ did not start:\n{self.said()[-4000:]}")
            time.sleep(0.1)

    def said(self) -> str:
        return self.directory.joinpath("output").read_text(errors="replace")

    def settle(self) -> None:
        """Writes down which quorum queues and streams there are, as RabbitMQ 3.10 does some seconds later.

        A kill -9 before that loses what it held: test_rabbitmq_loss.py shows how.
        """
        self.evaluate("[ok = dets:sync(Table) || Table <- dets:all()].")

    @contextmanager
    def changed(self, **settings: int) -> Iterator[None]:
        """Other values of its settings for a while, for channels that are opened meanwhile."""
        before = {name: self.evaluate(f"{{ok, V}} = application:get_env(rabbit, {name}), V.") for name in settings}
        self._set(settings)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """With an alarm, so that it blocks publishers. Setting it takes seconds."""
        before = self.evaluate("vm_memory_monitor:get_vm_memory_high_watermark().")
        self.control("set_vm_memory_high_watermark", "0.00001")
        try:
            yield
        finally:
            self.control("set_vm_memory_high_watermark", before)

    def _set(self, settings: Mapping[str, object]) -> None:
        self.evaluate(",".join(f"ok = application:set_env(rabbit, {n}, {v})" for n, v in settings.items()) + ".")

    def evaluate(self, erlang: str) -> str:
        return self.control("eval", erlang)

    def control(self, *command: str) -> str:
        """What rabbitmqctl says. It takes seconds."""
        line = [str(PROGRAMS / "rabbitmqctl"), "--quiet", *command]
        done = subprocess.run(
            line, env=self.environment, cwd=self.directory, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def kill(self) -> None:
        """kill -9: no farewell to anybody, nothing flushed."""
        self._end(self.running.pop())

    def end(self) -> None:
        while self.running:
            self._end(self.running.pop())
        shutil.rmtree(self.directory, ignore_errors=True)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.directory.joinpath("output").open("ab") as output:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """Ends the whole session of that process: the launcher is a shell, RabbitMQ its child."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@asynccontextmanager
async def in_thread(block: Callable[[], AbstractContextManager[None]]) -> AsyncIterator[None]:
    """A block whose entry and exit take seconds."""
    entered = block()
    await asyncio.to_thread(entered.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(entered.__exit__, None, None, None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def answers(port: int) -> bool:
    """Whether an AMQP broker talks on that port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"AMQP\0\0\x09\x01")
            return bool(connection.recv(1))
    except OSError:
        return False


def node_definitions() -> Document:
    """Users with their rights in every federation, and everything of the one that is set up whole."""
    federations = [Enrolment(Topology(name), tuple(PARTICIPANTS)) for name in (*FEDERATIONS, SET_UP)]
    foreign = Enrolment(Topology(FOREIGN), ("p-2",))
    users = (AGGREGATOR, *PARTICIPANTS)
    hashes = {user: password_hash(password(user), b"salt") for user in (*users, OPERATOR)}
    return merged(
        access_definitions([*federations, foreign], hashes), thing_definitions(federations[-1]), operator(hashes)
    )


def operator(hashes: dict[str, str]) -> Document:
    """Somebody with more rights than anybody should have."""
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    user = {"name": OPERATOR, "password_hash": hashes[OPERATOR], "tags": "administrator,impersonator"}
    hashing = {"hashing_algorithm": "rabbit_password_hashing_sha256"}
    return {"users": [user | hashing], "permissions": [{"user": OPERATOR, "vhost": "/", **everything}]}


if __name__ == "__main__":
    print(json.dumps(node_definitions(), indent=2))
