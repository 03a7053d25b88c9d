"""The commands of operators, thin: what they do is in `fluffle/control.py`, imported when they run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from broker.errors import ConfigError
from broker.topology import Topology
from fluffle.command import CONFIG_FILE, Asked, check_target, configurable, emit
from fluffle.flags import OPERATOR_FLAGS

if TYPE_CHECKING:
    from broker.messages import Command
    from broker.transport import Broker

http_option = click.option(
    "--http",
    metavar="URL",
    default="http://127.0.0.1:8750",
    show_default="127.0.0.1:8750",
    help="Where an aggregator of the run has its endpoint (its setting http.listen).",
)
participant_argument = click.argument("name", metavar="NAME")
operates = configurable(*OPERATOR_FLAGS, given=(CONFIG_FILE,))


def operated_on(asked: Asked) -> tuple[Broker, Topology]:
    """The broker and the federation on it. Raises ConfigError."""
    from fluffle.brokers import rabbit_broker

    config = asked.site_config()
    if config.broker.url == "memory":
        raise ConfigError("which broker? give --broker amqp://HOST, or --config RUN.toml")
    return rabbit_broker(config.broker), Topology(config.broker.federation)


def send(asked: Asked, command: Command, participant: str = "") -> None:
    from fluffle import control

    broker, topology = operated_on(asked)
    click.echo(asyncio.run(control.command(broker, topology, control.wish(command, participant))))


@click.command()
@http_option
@click.option("--json", "json_target", metavar="FILE|-", help="Write the status as JSON; `-` is stdout.")
def status(http: str, json_target: str | None) -> None:
    """Show what an aggregator does: who leads, the round, who is live, what it waits for."""
    from fluffle.control import read_status, status_page

    check_target(json_target)
    found = read_status(http)
    emit(found.model_dump(mode="json"), status_page(found), json_target)


@click.command()
@operates
def pause(asked: Asked) -> None:
    """Open no further round until `fluffle resume`. The open one goes on to its close."""
    send(asked, "pause")


@click.command()
@operates
def resume(asked: Asked) -> None:
    """Open rounds again after `fluffle pause`."""
    send(asked, "resume")


@click.command()
@operates
def stop(asked: Asked) -> None:
    """Finish the run when its open round closes; what it learnt is kept."""
    send(asked, "stop")


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
def remove(asked: Asked, name: str) -> None:
    """Ask NAME no more and refuse what it sends, in this run and all that follow.

    Its user at the broker stays: delete it there, too, if it shall not even connect.
    """
    send(asked, "remove", name)


@participants.command()
@participant_argument
@operates
def admit(asked: Asked, name: str) -> None:
    """Let NAME take part again after it was removed."""
    send(asked, "admit", name)


COMMANDS: tuple[click.Command, ...] = (status, pause, resume, stop, participants)
