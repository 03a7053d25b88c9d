"""The code blocks of a page, and how each language is run: in order, in one scratch folder, in this process."""

from __future__ import annotations

import asyncio
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from unittest.mock import patch

import click
from click.testing import CliRunner

from broker.memory import MemoryBroker
from broker.topology import AGGREGATOR
from fluffle import simulate
from fluffle.cell import Job, Outcome
from fluffle.cli import cli
from fluffle.layers import from_toml
from fluffle.learning import task_defaults
from fluffle.sweep import load_sweep
from workers.tasks import CATALOGUE

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (?P<name>[\w.]+\.(py|toml))\n")
ELSEWHERE = {  # need the network, or a broker: read, not run
    *("data fetch", "broker check", "broker setup", "aggregator", "worker", "status", "pause", "resume", "stop"),
    *("participants list", "participants remove", "participants admit", "chaos"),
}
CLUSTERS = {"--dask", "--ray"}
ONLY_SUMS = {"own_table:TASK", *(name for name, entry in CATALOGUE.items() if not entry.needs_torch)}
FETCHED = {name for name, entry in CATALOGUE.items() if entry.needs} | {"runs/spam", "runs/bard"}  # not shipped
TRAINING = ("simulate", "central", "local")
FEWER = 20  # times fewer rounds than the page says
LESS = {"sweep": ("--jobs", "1", "--set", "stop.rounds=2", "--set", "train.max_steps=3")}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for fence in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, fence.start()) + 1, fence["language"], fence["text"])


def run(block: Block) -> None:
    """Does what the block says, or checks it. An example that names its file is written to that file."""
    named = FILE_NAME.match(block.text)
    if named:
        Path(named["name"]).write_text(block.text, "utf-8")
    LANGUAGES[block.language](block)


def _python(block: Block) -> None:
    code: CodeType = compile(block.text, block.place, "exec")
    scope: dict[str, object] = {"__name__": "example"}
    exec(code, scope)
    for name, function in scope.items():
        if name.startswith("test_") and inspect.iscoroutinefunction(function):
            asyncio.run(_contract_test(function))


async def _contract_test(function: Callable[..., object]) -> None:
    transport = await MemoryBroker().connect(AGGREGATOR, purpose="example")
    result = function(transport, "fl.example.queue")
    assert inspect.isawaitable(result)
    await result


def _toml(block: Block) -> None:
    document = tomllib.loads(block.text)
    file = Path("checked.toml")
    file.write_text(block.text, "utf-8")
    assert from_toml(file), block.place
    if "seeds" in document:
        assert load_sweep(file, defaults=task_defaults).cells, block.place


def _bash(block: Block) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        command, *arguments = words[len(environment) :]
        COMMANDS[command](arguments, environment, f"{block.place}: {line}")


def _fluffle(arguments: list[str], environment: dict[str, str], place: str) -> None:
    name = parsed(arguments)
    if name in ELSEWHERE or "amqp" in place or CLUSTERS & set(arguments) or FETCHED & set(arguments):
        return
    shorter = shortened(arguments) if name in TRAINING else [*arguments, *LESS.get(name, ())]
    with patch("fluffle.pools.run_cell", _cell_in_this_process):
        outcome = CliRunner().invoke(cli, shorter, env=environment, prog_name="fluffle")
    assert outcome.exit_code == 0, f"{place}\n{outcome.output}"


def _cell_in_this_process(job: Job, _: object) -> Outcome:
    """Instead of a process of its own, which takes seconds to begin; `tests/learning` has those."""
    Path("cell.toml").write_text(job.config, "utf-8")
    settings = {name: given.value for name, given in from_toml(Path("cell.toml")).items()}
    return Outcome(simulate(settings.pop("task"), settings | {"run.dir": f"cells/{job.run_id}"}).summary)


def shortened(arguments: list[str]) -> list[str]:
    """The same training with few rounds and steps."""
    rounds = int(arguments[arguments.index("--rounds") + 1]) if "--rounds" in arguments else 1
    steps = [] if arguments[1] in ONLY_SUMS else ["--set", "train.max_steps=3"]
    return [*arguments, "--rounds", str(max(1, rounds // FEWER)), *steps]


def parsed(arguments: list[str]) -> str:
    """The command's name, as `data fetch`. Raises UsageError for an option that does not exist."""
    command: click.Command = cli
    rest = list(arguments)
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    command.make_context(str(command.name), list(rest))
    return " ".join(arguments[: len(arguments) - len(rest)])


def _make(arguments: list[str], _: dict[str, str], place: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(arguments) <= set(targets), place


def _reads_files(arguments: list[str], _: dict[str, str], place: str) -> None:
    assert all(Path(name).is_file() for name in arguments), place


def _rabbitmqctl(arguments: list[str], _: dict[str, str], place: str) -> None:
    """Not run: it works on a broker that pages do not have. `tests/integration` uses what pages tell."""
    known = {"import_definitions": 1, "delete_user": 1, "delete_queue": 1, "close_all_user_connections": 2}
    assert known.get(arguments[0]) == len(arguments) - 1, place
    if arguments[0] == "import_definitions":
        _reads_files(arguments[1:], {}, place)


LANGUAGES: dict[str, Callable[[Block], None]] = {
    "python": _python,
    "toml": _toml,
    "bash": _bash,
    "text": lambda _: None,
    "mermaid": lambda _: None,
}
COMMANDS: dict[str, Callable[[list[str], dict[str, str], str], None]] = {
    "fluffle": _fluffle,
    "make": _make,
    "rabbitmqctl": _rabbitmqctl,
    "sha256sum": _reads_files,
}
