"""What running processes, their broker and their files hold at this moment, as the kernel and the broker tell."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiormq
from aiormq.exceptions import AMQPError
from yarl import URL

from fluffle.chaos.node import Node

KIB_PER_MIB = 1024
MIB = 1 << 20
SECTOR_BYTES = 512
ANSWERS_S = 10.0
STREAM_FOLDER = re.compile(r"^__(.+)_\d+$")  # virtual host `/`, the name with `_` for `.`, when it was declared
INSIDE = (  # of RabbitMQ's virtual machine
    "io_lib:format('~b ~b ~b ~b', [length(rabbit_networking:local_connections()), "
    "length(rabbit_channel:list_local()), erlang:system_info(process_count), erlang:memory(total) div 1048576])."
)
INSIDE_NAMES = ("connections", "channels", "erlang_processes", "erlang_mb")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process holds. Memory is in MiB; `anonymous` is what no file stands behind."""

    pid: int
    rss_mb: float
    pss_mb: float
    anonymous_mb: float
    fds: int
    threads: int


def usage(pid: int | None) -> Usage | None:
    """None if there is no such process, or it is about to end."""
    process = Path("/proc", str(pid))
    try:
        memory, status = fields(process / "smaps_rollup"), fields(process / "status")
        fds = len(os.listdir(process / "fd"))
        kib = [int(memory[name].split()[0]) for name in ("Rss", "Pss", "Anonymous")]
    except (OSError, KeyError):
        return None
    rss, pss, anonymous = (round(value / KIB_PER_MIB, 2) for value in kib)
    return Usage(pid or 0, rss, pss, anonymous, fds, int(status["Threads"])) if fds else None


def fields(path: Path) -> dict[str, str]:
    """The lines `name: value` of a file of the kernel. Raises OSError."""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {name: value.strip() for name, _, value in lines}


def beam(node: Node) -> int | None:
    """The process of RabbitMQ itself, which a shell has started; None while there is none."""
    session = str(node.running[-1].pid) if node.running else ""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it ended meanwhile
            told = fields(status)
            if told.get("NSsid", "").split()[:1] == [session] and told["Name"].startswith("beam"):
                return int(status.parent.name)
    return None


def inside(node: Node) -> dict[str, int]:
    """Connections, channels, Erlang processes and MiB, as RabbitMQ says in some seconds; empty if it is down."""
    try:
        told = node.evaluate(INSIDE)
    except subprocess.CalledProcessError:
        return {}
    return dict(zip(INSIDE_NAMES, map(int, re.findall(r"\d+", told)), strict=True))


def messages(address: URL, queues: Sequence[str]) -> dict[str, int]:
    """How many messages each of these queues and streams has ready; without those that do not answer."""
    return asyncio.run(_messages(str(address.update_query(heartbeat="0")), queues))


async def _messages(address: str, queues: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    with suppress(AMQPError, OSError, TimeoutError):
        async with asyncio.timeout(ANSWERS_S):
            connection = await aiormq.connect(address)
            try:
                for queue in queues:
                    with suppress(AMQPError):  # it closes the channel, so each question has one
                        channel = await connection.channel(publisher_confirms=False)
                        found[queue] = (await channel.queue_declare(queue, passive=True)).message_count or 0
            finally:
                await connection.close()
    return found


def disk_mb(*paths: Path) -> float:
    """MiB of all files in these directories, as the disk has them."""
    return round(sum(_allocated(file) for path in paths for file in _files(path)) / MIB, 3)


def streams_mb(node: Node) -> dict[str, float]:
    """The disk usage of each stream of a broker, by its name with `_` for `.`."""
    folders = [path for path in node.directory.glob("mnesia/*/stream/*") if path.is_dir()]
    named = [(found[1], path) for path in folders if (found := STREAM_FOLDER.match(path.name))]
    return {name: disk_mb(path) for name, path in sorted(named)}


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def _allocated(path: Path) -> int:
    try:
        return SECTOR_BYTES * path.lstat().st_blocks
    except OSError:  # deleted meanwhile
        return 0
