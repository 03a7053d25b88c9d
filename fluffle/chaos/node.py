"""A private RabbitMQ: on loopback, in a directory of its own, and gone when it is not needed any more."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from broker.definitions import Document
from broker.errors import StateError

PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # not the wrappers in /usr/sbin, which change the user
SERVER = PROGRAMS / "rabbitmq-server"
READY_S = 120.0
HOSTNAME = "localhost"


def installed() -> bool:
    return SERVER.exists()


@dataclass
class Node:
    """The processes of a private broker: RabbitMQ itself, and the epmd that it asks for ports."""

    directory: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def create(cls, directory: Path, loaded: Document) -> Node:
        """A broker that loads these definitions when it boots. It is not started yet."""
        node = cls(directory, free_port())
        directory.joinpath("definitions.json").write_text(json.dumps(loaded))
        directory.joinpath("enabled_plugins").write_text("[].")
        directory.joinpath("env.conf").touch()
        directory.joinpath("rabbitmq.conf").write_text(
            "definitions.import_backend = local_filesystem\n"
            f"definitions.local.path = {directory}/definitions.json\n"
            "definitions.skip_if_unchanged = true\n"
            "raft.wal_max_entries = 512\n"  # deploy/rabbitmq.conf has more: a run of minutes shall reach it
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
                raise StateError(f"a private RabbitMQ did not start; its output ends with:\n{self.said()[-4000:]}")
            time.sleep(0.1)

    def said(self) -> str:
        return self.directory.joinpath("output").read_text(errors="replace")

    def settle(self) -> None:
        """Writes down which quorum queues and streams there are, as RabbitMQ 3.10 does some seconds later.

        A kill -9 before that loses what it held: tests/integration/test_rabbitmq_loss.py shows how.
        """
        self.evaluate("[ok = dets:sync(Table) || Table <- dets:all()].")

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """The alarm that blocks whoever publishes, for the block."""
        before = self.evaluate("vm_memory_monitor:get_vm_memory_high_watermark().")
        self.evaluate("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1}).")
        try:
            yield
        finally:
            self.evaluate(f"vm_memory_monitor:set_vm_memory_high_watermark({before}).")

    @contextmanager
    def changed(self, **settings: int) -> Iterator[None]:
        """Other values of its settings for a while, for channels that are opened meanwhile."""
        before = {name: self.evaluate(f"{{ok, V}} = application:get_env(rabbit, {name}), V.") for name in settings}
        self._set(settings)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, settings: Mapping[str, object]) -> None:
        self.evaluate(",".join(f"ok = application:set_env(rabbit, {n}, {v})" for n, v in settings.items()) + ".")

    def evaluate(self, erlang: str) -> str:
        return self.control("eval", erlang)

    def control(self, *command: str) -> str:
        """What rabbitmqctl says. It takes seconds."""
        line = [str(PROGRAMS / "rabbitmqctl"), "--quiet", *command]
        done = subprocess.run(  # noqa: S603 - our own words
            line, env=self.environment, cwd=self.directory, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def copy_streams(self, names: Sequence[str]) -> Path:
        """The files of these streams, all of the same moment: it stands still meanwhile. Raises StateError if one
        is not there."""
        copies = Path(tempfile.mkdtemp(prefix="streams-", dir=self.directory))
        os.killpg(self.running[-1].pid, signal.SIGSTOP)
        try:
            for found in map(self._stream_files, names):
                shutil.copytree(found, copies / found.name)
        finally:
            os.killpg(self.running[-1].pid, signal.SIGCONT)
        return copies

    def put_back(self, copies: Path) -> None:
        """While it is down: these streams are what they were, as after a loss of power. Streams are not synced."""
        for copy in copies.iterdir():
            (found,) = self.directory.glob(f"mnesia/*/stream/{copy.name}")
            shutil.rmtree(found)
            copy.rename(found)
        copies.rmdir()

    def _stream_files(self, name: str) -> Path:
        """RabbitMQ names a directory after virtual host, stream and the time when that was declared."""
        found = list(self.directory.glob(f"mnesia/*/stream/__{re.sub(r'[^a-z0-9-]', '_', name)}_[0-9]*"))
        if len(found) != 1:
            raise StateError(f"{self.directory} has {len(found)} directories of stream {name}, not one")
        return found[0]

    def kill(self) -> None:
        """kill -9: no farewell to anybody, nothing flushed."""
        self._end(self.running.pop())

    def end(self) -> None:
        while self.running:
            self._end(self.running.pop())
        shutil.rmtree(self.directory, ignore_errors=True)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.directory.joinpath("output").open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own words
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
