"""The commands of operators, thin: what they do is in `fluffle/control.py`, imported when they run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from broker.messages import Command

http_option = click.option(
    "--http",
    metavar="URL",
    default="http://127.0.0.1:8750",
    show_default="127.0.0.1:8750",
    help="Where an aggregator of the run has its endpoint (its setting http.listen).",
)
participant_argument = click.argument("name", metavar="NAME")
BROKER_OPTIONS: list[Any] = [
    click.option("--broker", "url", metavar="URL", help="amqp[s]://aggregator:password@host/vhost."),
    click.option("--federation", metavar="NAME", help="Which federation on that broker.  [default: default]"),
    click.option(
        "--secrets", "secrets_file", type=click.Path(dir_okay=False, path_type=Path), help="File with the password."
    ),
    click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="RUN.toml",
        help="The run's settings, which name broker and federation.",
    ),
]


def operates(run: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that lead to the broker, and hands them on as `where`."""

    @functools.wraps(run)
    def decorated(
        url: str | None, federation: str | None, secrets_file: Path | None, config_file: Path | None, **rest: Any
    ) -> None:
        run(where=(config_file, url, federation, secrets_file), **rest)

    return functools.reduce(lambda made, option: option(made), reversed(BROKER_OPTIONS), decorated)


Place = tuple[Path | None, str | None, str | None, Path | None]


def send(where: Place, command: Command, participant: str = "") -> None:
    from fluffle import control

    wish = control.wish(command, participant)
    click.echo(asyncio.run(control.command(*control.operator_broker(*where), wish)))


@click.command()
@http_option
@click.option("--json", "json_target", metavar="FILE|-", help="Write the status as JSON; `-` is stdout.")
def status(http: str, json_target: str | None) -> None:
    """Show what an aggregator does: who leads, the round, who is live, what it waits for."""
    from fluffle.cli import check_target, emit
    from fluffle.control import read_status, status_page

    check_target(json_target)
    found = read_status(http)
    emit(found.model_dump(mode="json"), status_page(found), json_target)


@click.command()
@operates
def pause(where: Place) -> None:
    """Open no further round until `fluffle resume`. The open one goes on to its close."""
    send(where, "pause")


@click.command()
@operates
def resume(where: Place) -> None:
    """Open rounds again after `fluffle pause`."""
    send(where, "resume")


@click.command()
@operates
def stop(where: Place) -> None:
    """Finish the run when its open round closes; what it learnt is kept."""
    send(where, "stop")


@click.group()
def participants() -> None:
    """Look at the participants of a federation, remove one, or admit it again."""


@participants.command("list")
@http_option
def list_participants(http: str) -> None:
    """List who is live, and who was removed."""
    from fluffle.control import live_table, read_status

    click.echo(live_table(read_status(http)), nl=False)


@participants.command()
@participant_argument
@operates
def remove(name: str, where: Place) -> None:
    """Ask NAME no more and refuse what it sends, in this run and all that follow.

    Its user at the broker stays: delete it there, too, if it shall not even connect.
    """
    send(where, "remove", name)


@participants.command()
@participant_argument
@operates
def admit(name: str, where: Place) -> None:
    """Let NAME take part again after it was removed."""
    send(where, "admit", name)


COMMANDS: tuple[click.Command, ...] = (status, pause, resume, stop, participants)
