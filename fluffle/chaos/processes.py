"""Aggregators and workers as real processes: started, killed, frozen, and known by what they log.

    with Deployment(url, password, topology, directory) as federation:
        leader = federation.aggregator(run)
        workers = federation.workers("p01", "p02")
        leader.wait_for("round_closed", round=3)
        leader.kill()
        leader.start()
        result = leader.result()

Every wait has a deadline. One that passes, or a process that ends too early, raises StateError with the end of
every log.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from yarl import URL

from aggregator.history import History
from aggregator.settings import RunSettings
from broker.errors import StateError
from broker.head import Decision
from broker.rabbitmq import RabbitBroker
from broker.topology import AGGREGATOR, Topology
from fluffle.chaos.clock.sitecustomize import OFF_S
from fluffle.chaos.task import TASK, Pace
from fluffle.config import BrokerSection, Config, DataSection, RunSection, TrainSection
from fluffle.layers import to_toml
from fluffle.participate import participants

ROOT = Path(__file__).parents[2]
CLOCK = Path(__file__).parent / "clock"
FLUFFLE = (sys.executable, "-m", "fluffle")
DEADLINE_S = 60.0  # for anything that a healthy machine does in a few seconds
TAIL_LINES = 25
LEADER = "leader"
LOG_ENDED = "log_ended"  # told last, when the process has ended


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a log. `at` is when it was read, as `time.monotonic` has it."""

    name: str
    fields: Mapping[str, Any]
    at: float

    def is_one(self, name: str, fields: Mapping[str, Any]) -> bool:
        return self.name == name and all(value == self.fields.get(key) for key, value in fields.items())


class Log:
    """What a process writes to stderr between its start and its end. A thread follows it; a file keeps it."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self.lines: list[str] = []
        self.events: list[Event] = []
        self.ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._follow, args=(process, path), name=f"log of {path.stem}")
        self._thread.start()

    def wait_for(self, name: str, fields: Mapping[str, Any], deadline: float, first: int = 0) -> Event | None:
        """Such an event after the `first` so many; None if there is none at the deadline, or when the log ended."""

        def found() -> Event | None:
            return next((event for event in self.events[first:] if event.is_one(name, fields)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self.ended, deadline - time.monotonic())
            return found()

    def join(self) -> None:
        self._thread.join()

    def _follow(self, process: subprocess.Popen[bytes], path: Path) -> None:
        assert process.stderr
        with process.stderr as stream, path.open("ab") as kept:
            for line in stream:
                kept.write(line)
                kept.flush()
                self._note(line.decode(errors="replace").rstrip("\n"))
        process.wait()  # its files are closed before it is dead, and whoever is told asks for its exit code
        with self._news:
            self.ended = True
            self._news.notify_all()
        self._on_event(Event(LOG_ENDED, {}, time.monotonic()))

    def _note(self, line: str) -> None:
        event = parsed(line)
        with self._news:
            self.lines.append(line)
            if event:
                self.events.append(event)
            self._news.notify_all()
        if event:
            self._on_event(event)


class Process:
    """One command, as often as it is started. Its log is that of the newest start."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        among: Deployment,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = FLUFFLE,
    ) -> None:
        self.name = name
        self.program = program
        self.arguments = arguments
        self.environment = environment or {}
        self.clock_off_s = 0  # of the next start: how much later than now its wall clock says it is
        self.killed = False  # by us, and not started again
        self._among = among
        self._popen: subprocess.Popen[bytes]
        self.log: Log

    @property
    def json_file(self) -> Path:
        return self._among.directory / f"{self.name}.json"

    @property
    def run_dir(self) -> Path:
        return self._among.directory / f"run of {self.name}"

    @property
    def said(self) -> str:
        """All that it wrote to stderr."""
        return "\n".join(self.log.lines)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def code(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._popen.poll()

    def start(self) -> Process:
        self.killed = False
        self._popen = subprocess.Popen(  # noqa: S603 - our own words
            (*self.program, *self.arguments),
            cwd=self._among.directory,
            env={**self._among.environment, **self.environment, **wrong_clock(self.clock_off_s)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        file, told = self._among.directory / f"{self.name}.log", self._among.on_event
        self.log = Log(self._popen, file, lambda event: told(self, event))
        return self

    def wait_for(self, event: str, *, within_s: float = DEADLINE_S, first: int = 0, **fields: object) -> Event:
        """The first event of that name and with these fields, as soon as it is there: of all since the start, or of
        those after the `first` so many."""
        found = self.log.wait_for(event, fields, time.monotonic() + within_s, first)
        if found is None:
            wanted = " ".join([event, *(f"{key}={value!r}" for key, value in fields.items())])
            self._fail(f"wait for `{wanted}`", within_s)
        return found

    def all(self, event: str, **fields: object) -> list[Event]:
        """Every such event until now."""
        return [one for one in self.log.events if one.is_one(event, fields)]

    def kill(self) -> float:
        """kill -9; returns when that was."""
        self.killed, at = True, time.monotonic()
        self._popen.kill()
        self._end()
        return at

    def terminate(self) -> float:
        """What a supervisor sends first: SIGTERM; returns when that was. The process may take its time."""
        at = time.monotonic()
        self._popen.terminate()
        return at

    def freeze(self) -> float:
        """It stands still, and nobody is told; returns when that was."""
        self._popen.send_signal(signal.SIGSTOP)
        return time.monotonic()

    def thaw(self) -> None:
        self._popen.send_signal(signal.SIGCONT)

    def exit_code(self, within_s: float = DEADLINE_S) -> int:
        """Waits for the end of the process."""
        try:
            code = self._popen.wait(within_s)
        except subprocess.TimeoutExpired:
            self._fail("end", within_s)
        self._end()
        return code

    def stop(self) -> int:
        """SIGTERM, and what it ended with."""
        self.terminate()
        return self.exit_code()

    def result(self, within_s: float = DEADLINE_S) -> dict[str, Any]:
        """What an aggregator whose run is finished wrote with `--json`."""
        if self.exit_code(within_s) != 0:
            self._among.fail(f"{self.name} ended with {self._popen.returncode}, not with 0")
        result: dict[str, Any] = json.loads(self.json_file.read_text())
        return result

    def end(self) -> None:
        """Ends it whatever it is doing, if it still is."""
        if self._popen.poll() is None:
            self.killed = True
            self._popen.kill()
        self._end()

    def _end(self) -> None:
        self._popen.wait()
        self.log.join()

    def _fail(self, awaited: str, within_s: float) -> NoReturn:
        code = self._popen.poll()
        how = f"within {within_s:g} s" if code is None else f"before it ended with {code}"
        self._among.fail(f"{self.name} did not {awaited} {how}")


@dataclass
class Deployment:
    """The processes of one federation. They run in `directory`, where their logs are, too.

    `ports` are of proxies on this machine, by the name of the process that is to go through it.
    """

    url: URL
    password: Callable[[str], str] = field(repr=False)
    topology: Topology
    directory: Path
    ports: Mapping[str, int] = field(default_factory=dict)
    on_event: Callable[[Process, Event], None] = lambda process, event: None  # noqa: ARG005
    processes: dict[str, Process] = field(default_factory=dict, repr=False)

    @property
    def environment(self) -> dict[str, str]:
        ours = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        return {name: value for name, value in os.environ.items() if not name.startswith("FLUFFLE_BROKER")} | ours

    def aggregator(self, run: RunSettings, *options: str, name: str = LEADER, **environment: str) -> Process:
        """Starts one for that run. One of another name has a run directory of its own: a standby, perhaps."""
        file = self.directory / f"{run.run_id}.toml"
        file.write_text(self.run_toml(run))
        process = Process(name, (), self, environment)
        paths = ("--run-dir", str(process.run_dir), "--json", str(process.json_file))
        process.arguments = ("aggregator", str(file), *self._broker(AGGREGATOR, name), *paths, *options)
        return self.start(process)

    def worker(
        self, participant: str, *options: str, pace: Pace | None = None, task: str = TASK, **environment: str
    ) -> Process:
        """Starts one, or one for several participants (`p01..p03`); `task` "" leaves it to the run."""
        own = ("--task", task, "--data", (pace or Pace()).as_data) if task else ()
        name = ("--participant", participant, "--federation", self.topology.federation)
        arguments = ("worker", *name, *self._broker(participant, participant), *own, *options)
        return self.start(Process(participant, arguments, self, environment))

    def workers(self, *participants: str, task: str = TASK) -> list[Process]:
        return [self.worker(participant, task=task) for participant in participants]

    def run(self, *arguments: str) -> Process:
        """Any other command, to its end."""
        process = self.start(Process(arguments[0], arguments, self))
        process.exit_code()
        return process

    def start(self, process: Process) -> Process:
        if process.name in self.processes:
            self.processes[process.name].end()
        self.processes[process.name] = process
        return process.start()

    def broker(self) -> RabbitBroker:
        """Connections for any user, past all proxies."""
        return RabbitBroker(str(self.url), self.password)

    def set_up(self) -> None:
        """Declares the federation, so that workers can wait for an aggregator in it."""

        async def declare() -> None:
            connection = await self.broker().connect(AGGREGATOR, purpose="set up")
            await connection.declare(*self.topology.aggregator_declarations())
            await connection.close()

        asyncio.run(declare())

    def decisions(self, run: RunSettings) -> list[Decision]:
        """The ledger, out of the histories of all that led: what each of two leaders noted is there once."""
        found: dict[tuple[int, int, str, int, str], Decision] = {}
        for process in self.processes.values():
            if (process.run_dir / "history.sqlite").exists():
                with History(process.run_dir / "history.sqlite") as history:
                    found |= {
                        (d.epoch, d.offset, d.participant, d.task, d.verdict): d for d in history.ledger(run.run_id)
                    }
        return [found[key] for key in sorted(found)]

    def logged(self, event: str) -> list[Event]:
        """Every such event of all processes, whenever they were started."""
        files = [self.directory / f"{name}.log" for name in self.processes]
        lines = [line for file in files if file.exists() for line in file.read_text(errors="replace").splitlines()]
        return [found for line in lines if (found := parsed(line)) and found.name == event]

    def counted(self, run: RunSettings) -> Counter[tuple[str, int]]:
        """How often each participant's update of each task was counted."""
        return Counter((d.participant, d.task) for d in self.decisions(run) if d.verdict == "counted")

    def fail(self, why: str) -> NoReturn:
        tails = (f"--- {name}\n{tail(process)}" for name, process in self.processes.items())
        raise StateError("\n".join([why, *tails]))

    def end(self) -> None:
        for process in self.processes.values():
            process.end()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever was started in it ends with the block."""
        self.end()

    def run_toml(self, run: RunSettings) -> str:
        config = Config(
            task=run.learning_task or TASK,
            run=RunSection(id=run.run_id, seed=run.seed),
            data=DataSection(partition=str(run.data.get("partition", "iid"))),
            train=TrainSection.model_validate(run.train),
            broker=BrokerSection(federation=self.topology.federation, **run.broker.model_dump()),
            **{name: getattr(run, name) for name in ("round", "stop", "evaluation", "strategy", "codec")},
        )
        return to_toml(config)

    def _broker(self, user: str, process: str) -> tuple[str, ...]:
        """The address without a user, and a file with the passwords of that user, or of those users, alone."""
        secrets = self.directory / f"{user}.secrets.toml"
        secrets.touch(mode=0o600)
        secrets.write_text("".join(f"{one} = {json.dumps(self.password(one))}\n" for one in participants(user)))
        port = self.ports.get(process)
        url = self.url if port is None else self.url.with_host("127.0.0.1").with_port(port)
        return ("--broker", str(url).rstrip("/"), "--secrets", str(secrets), "--log-format", "json")


def wrong_clock(off_s: int) -> dict[str, str]:
    """What a process needs in its environment for a wall clock that is off by so many seconds."""
    return {OFF_S: str(off_s), "PYTHONPATH": f"{CLOCK}{os.pathsep}{ROOT}"} if off_s else {}


def parsed(line: str) -> Event | None:
    """What a line tells; one that a killed process could not finish tells nothing."""
    try:
        fields = json.loads(line) if line.startswith("{") else None
    except ValueError:
        fields = None
    return Event(fields.pop("event"), fields, time.monotonic()) if fields else None


def tail(process: Process) -> str:
    """The end of a log, one line an event."""
    lines = [shown(event) if (event := parsed(line)) else line for line in process.log.lines[-TAIL_LINES:]]
    return "\n".join("\n".join(lines).splitlines()[-TAIL_LINES:])


def shown(event: Event) -> str:
    left_out = ("timestamp", "level")
    return " ".join([event.name, *(f"{key}={value}" for key, value in event.fields.items() if key not in left_out)])
