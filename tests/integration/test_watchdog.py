"""A process whose event loop hangs ends itself and says where; one that works, in other threads too, does not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from broker.memory import MemoryBroker
from broker.topology import Topology
from fluffle import participate, serve, watchdog
from fluffle.config import ProcessSection, from_values, load_config
from fluffle.display import LogDisplay
from fluffle.participate import Until
from tests.federation import Federation, names, settings

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio, sys, threading, time
from fluffle.logs import configure_logs
from fluffle.watchdog import watched

def hang_here(seconds):
    time.sleep(seconds)

def spin(until):
    while time.monotonic() < until:
        sum(range(1000))

async def main():
    with watched({limit_s}):
        print("watched", flush=True)
        await {body}
    print("over", flush=True)

configure_logs("info", "json")
asyncio.run(main())
"""
HANGS = "asyncio.sleep(hang_here(30) or 0)"
TRAINS = "asyncio.to_thread(spin, time.monotonic() + 3)"
WAITS = "asyncio.sleep(3)"


def started(body: str, limit_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(limit_s=limit_s, body=body)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_loop_that_hangs_ends_the_process_and_says_where() -> None:
    with started(HANGS, 1.0) as process:
        out, err = process.communicate(timeout=25)
    assert (process.returncode, out) == (70, "watched\n")
    event = json.loads(err)
    assert (event["event"], event["level"], event["exit_code"]) == ("event_loop_stuck", "critical", 70)
    assert "in hang_here" in event["stack"]


def test_last_words_that_nobody_reads_do_not_keep_it_alive() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while True:  # a full pipe, as of a log shipper that hangs
        try:
            os.write(writing, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writing, True)
    program = PROGRAM.format(limit_s=1.0, body=HANGS)
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=writing
    ) as it:
        assert it.wait(25) == 70
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("body", "limit_s"), [(TRAINS, 1.0), (WAITS, 1.0), ("asyncio.sleep(hang_here(3) or 0)", 0)]
)
def test_a_loop_that_works_is_left_alone(body: str, limit_s: float) -> None:
    with started(body, limit_s) as process:
        out, err = process.communicate(timeout=25)
    assert (process.returncode, out, err) == (0, "watched\nover\n", "")


def test_who_was_frozen_for_longer_is_not_stuck() -> None:
    with started("asyncio.sleep(hang_here(1.5) or 0.5)", 2.0) as process:  # frozen while the loop is asked
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
        time.sleep(0.7)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=25)
    assert (process.returncode, out, err) == (0, "over\n", "")


async def test_its_thread_ends_with_the_block() -> None:
    with watchdog.watched(0.1):
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        await asyncio.sleep(0.3)
        assert thread.is_alive()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


# -- both commands wire it ------------------------------------------------------------------------------------


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `watched` is given; it watches all the same."""
    seen: list[float] = []

    def watched(limit_s: float) -> AbstractContextManager[None]:
        seen.append(limit_s)
        return watchdog.watched(limit_s)

    monkeypatch.setattr(serve, "watched", watched)
    monkeypatch.setattr(participate, "watched", watched)
    return seen


async def test_both_commands_are_watched(limits: list[float], tmp_path: Path) -> None:
    layer = {"task": "digits", "process.watchdog_s": 7.5, "http.listen": "", "run.dir": str(tmp_path)}
    config = load_config(from_values(layer))
    federation = Federation(MemoryBroker(Topology("default").access), tmp_path, names(1))
    worker = asyncio.create_task(participate.participate(config, [federation.worker("p01")], Until(over=True)))
    record = await serve.serve(config, federation.job(settings(1, rounds=1)), federation.broker, LogDisplay())
    await worker
    assert record.finished
    assert limits == [7.5, 7.5]


def test_it_is_on_unless_it_is_switched_off() -> None:
    assert ProcessSection().watchdog_s == 120.0
    assert ProcessSection(watchdog_s=0.0).watchdog_s == 0.0
