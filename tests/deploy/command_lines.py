"""Command lines in files of deploy/, held against the command as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import pytest

from fluffle.cli import cli
from fluffle.config import Config, load_config, settings
from fluffle.layers import from_toml
from fluffle.learning import task_defaults

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# What docs/deploy.md needs and other changes bring: until they are there it is not checked, but listed.
AWAITED_COMMANDS = {
    "aggregator",
    "worker",
    "initial",
    "broker",
    "status",
    "pause",
    "resume",
    "stop",
    "participants",
}
AWAITED_SETTINGS = {
    "run.initial", "broker.federation", "broker.secrets", "http.listen", "site.participant", "site.data",
    "site.journal",
}  # fmt: skip


class NotRegistered(Exception):
    """A command that `fluffle` does not have yet."""


def check_all(lines: Iterable[Sequence[str]]) -> None:
    """Every line parses; if a command of one is not there yet, the test skips and says which."""
    awaited = set()
    for line in lines:
        try:
            check(line)
        except NotRegistered as missing:
            awaited.add(str(missing))
    if awaited:
        pytest.skip(f"not registered yet: {', '.join(sorted(awaited))}")


def check(arguments: Sequence[str], *, complete: bool = True) -> None:
    """Raises UsageError for an option that does not exist, or (if `complete`) for one that is missing.

    Values are not looked at, but for choices: files of a deployment are not here.
    """
    command, name, rest = find(arguments)
    if isinstance(command, click.Group):
        if complete:
            raise click.UsageError(f"{name} needs a command")
        return
    context = click.Context(command, info_name=name)
    given, left, _ = command.make_parser(context).parse_args(list(rest))
    if left:
        raise click.UsageError(f"{name}: too many arguments: {left}")
    for parameter in command.params:
        value = given.get(parameter.name or "")
        if complete and parameter.required and not value:
            raise click.UsageError(f"{name} needs {parameter.human_readable_name}")
        if isinstance(parameter.type, click.Choice) and isinstance(value, str):
            parameter.type.convert(value, parameter, context)


def find(arguments: Sequence[str]) -> tuple[click.Command, str, Sequence[str]]:
    """The innermost command, its full name, and what follows it."""
    command: click.Command = cli
    name, rest = "fluffle", list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        word = rest.pop(0)
        if word not in command.commands:
            if command is cli and word in AWAITED_COMMANDS:
                raise NotRegistered(word)
            raise click.UsageError(f"{name} has no command {word!r}")
        command, name = command.commands[word], f"{name} {word}"
    return command, name, rest


def load(path: Path) -> Config:
    """A run's configuration, by the real loader. Settings that other changes bring are an expected failure."""
    await_settings(path)
    return load_config(from_toml(path), defaults=task_defaults)


def await_settings(path: Path) -> None:
    missing = sorted(from_toml(path).keys() & AWAITED_SETTINGS - {setting.name for setting in settings()})
    if missing:
        pytest.xfail(f"these settings come with another change: {', '.join(missing)}")


def unknown_settings(path: Path) -> set[str]:
    """Names that no setting has. Raises ConfigError if it is no TOML."""
    known = {setting.name for setting in settings()}
    return {name for name in from_toml(path) if name not in known and not name.startswith("train.")}
