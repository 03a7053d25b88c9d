"""A private RabbitMQ for the tests: on loopback, in a directory of its own, gone when they are.

Federations, users and rights are loaded when it boots, because a call of rabbitmqctl takes seconds. RabbitMQ
wants the exact exchange in a topic permission, so there is a fixed number of federations, and every test takes
its own. `python -m tests.rabbit_node` prints the definitions: a broker that loaded them and holds nothing else
can serve the tests too, as FLUFFLE_AMQP_URL=amqp://host:port/vhost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from yarl import URL

from broker.rabbitmq import RabbitBroker, RabbitSettings
from broker.topology import AGGREGATOR, Access, Topology

PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # not the wrappers in /usr/sbin, which change the user
SERVER = PROGRAMS / "rabbitmq-server"
READY_S = 120.0
FEDERATIONS = [f"t-{number:03}" for number in range(150)]
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
        directory.joinpath("definitions.json").write_text(json.dumps(definitions()))
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
        """Writes down which quorum queues and streams there are, as RabbitMQ 3.10 does only every three minutes.

        One that was declared later than that is lost to a kill -9, whatever it held: publishes to it are never
        confirmed, and declaring it again says for ever that its home node is down.
        """
        sync = "[ok = dets:sync(Table) || Table <- dets:all()]."
        command = [str(PROGRAMS / "rabbitmqctl"), "eval", sync]
        subprocess.run(command, env=self.environment, cwd=self.directory, check=True, capture_output=True)

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


def definitions() -> dict[str, object]:
    """Every user may in every federation what `Topology.access` says."""
    users = [AGGREGATOR, *PARTICIPANTS]
    topologies = [Topology(federation) for federation in FEDERATIONS]
    return {
        "vhosts": [{"name": "/"}],
        "users": [
            {
                "name": user,
                "password_hash": hashed(password(user)),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for user in users
        ],
        "permissions": [{"user": user, "vhost": "/", **rights(user)} for user in users],
        "topic_permissions": [
            {"user": user, "vhost": "/", **right}
            for topology in topologies
            for user in PARTICIPANTS
            for right in topic_rights(topology.access(user))
        ],
    }


def rights(user: str) -> dict[str, str]:
    access = Topology("any").access(user)
    patterns = {"configure": access.configure, "write": access.write, "read": access.read}
    return {deed: whole(pattern.replace(r"fl\.any\.", r"fl\.t-[0-9]{3}\.")) for deed, pattern in patterns.items()}


def topic_rights(access: Access) -> list[dict[str, str]]:
    return [
        *({"exchange": e, "write": whole(keys), "read": "^$"} for e, keys in access.publish.items()),
        *({"exchange": e, "write": "^$", "read": whole(keys)} for e, keys in access.bind.items()),
    ]


def whole(pattern: str) -> str:
    """RabbitMQ searches; `Access` means whole names."""
    return f"^({pattern})$"


def hashed(secret: str) -> str:
    salt = b"salt"
    return base64.b64encode(salt + hashlib.sha256(salt + secret.encode()).digest()).decode()


if __name__ == "__main__":
    print(json.dumps(definitions(), indent=2))
