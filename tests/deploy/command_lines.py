"""Command lines in files of deploy/, held against the command as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from fluffle.cli import cli
from fluffle.config import Config, load_config, settings
from fluffle.layers import from_toml
from fluffle.learning import task_defaults

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def check_all(lines: Iterable[Sequence[str]]) -> None:
    for line in lines:
        check(line)


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
            raise click.UsageError(f"{name} has no command {word!r}")
        command, name = command.commands[word], f"{name} {word}"
    return command, name, rest


def load(path: Path) -> Config:
    """A run's configuration, by the real loader."""
    return load_config(from_toml(path), defaults=task_defaults)


def unknown_settings(path: Path) -> set[str]:
    """Names that no setting has. Raises ConfigError if it is no TOML."""
    known = {setting.name for setting in settings()}
    return {name for name in from_toml(path) if name not in known and not name.startswith("train.")}
