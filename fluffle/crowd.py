"""Participants of a simulation as processes of their own: one `fluffle worker` each, on a real broker."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from broker.errors import ConfigError, TaskError
from fluffle.config import Config

FAREWELL_S = 30.0  # for workers to settle their last update once the run is over
TAIL_BYTES = 2000  # of a failed worker's log


def check_credentials(config: Config) -> None:
    """Raises ConfigError unless every participant can have a connection of its own."""
    if not config.broker.secrets or "@" in config.broker.url:
        raise ConfigError(
            "a simulation over RabbitMQ plays aggregator and every participant, each under its own name: give a "
            "URL without user (amqp://HOST) and their passwords as --secrets FILE (`fluffle broker definitions`)"
        )


@asynccontextmanager
async def crowd(config: Config, attacks: Mapping[str, str]) -> AsyncIterator[None]:
    """Workers of these participants run while the block does, and until the run is over; each is told its attack,
    unless that is empty. Raises TaskError if one of them fails."""
    directory = config.run_dir / "workers" / str(os.getpid())
    await asyncio.to_thread(directory.mkdir, parents=True)
    async with asyncio.TaskGroup() as group:
        watches = [group.create_task(_watch(config, name, attack, directory)) for name, attack in attacks.items()]
        yield
        _, late = await asyncio.wait(watches, timeout=FAREWELL_S)
        for watch in late:
            watch.cancel()


async def _watch(config: Config, participant: str, attack: str, directory: Path) -> None:
    log = directory / f"{participant}.log"
    process = await _start(config, participant, attack, log)
    try:
        code = await process.wait()
    finally:
        if process.stdin:
            process.stdin.close()  # then it stops by itself, as it would if this process were killed
            await process.wait()
    if code:
        said = await asyncio.to_thread(_tail, log)
        raise TaskError(
            f"the worker of {participant} ended with exit code {code}; its log {log} ends with:\n{said}"
        )


async def _start(config: Config, participant: str, attack: str, log: Path) -> Process:
    journal = log.with_suffix(".journal")
    flags = ["--config", str(config.run_dir / "run.toml"), "--participant", participant, "--data", "share"]
    flags += ["--set", f"site.attack={attack}"] if attack else []
    output = await asyncio.to_thread(log.open, "ab")
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fluffle", "worker", *flags, "--journal", str(journal), "--once", "--child",
            stdin=PIPE, stdout=DEVNULL, stderr=output,
        )  # fmt: skip
    finally:
        output.close()


def _tail(path: Path) -> str:
    return path.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
