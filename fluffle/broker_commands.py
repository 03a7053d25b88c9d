"""`fluffle broker`: what an operator does with RabbitMQ. The commands only ask and print."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import ConfigError
from fluffle.command import check_target, emit

if TYPE_CHECKING:
    from broker.fitness import Finding
    from broker.rabbitmq import RabbitBroker
    from broker.topology import Topology

MOST_PARTICIPANTS = 100_000
MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED"}


def _together(*options: Any) -> Callable[[Any], Any]:
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


broker_option = click.option(
    "--broker", "url", required=True, envvar="FLUFFLE_BROKER_URL", metavar="URL",
    help="amqp[s]://[NAME:PASSWORD@]HOST:PORT/VHOST; without NAME and PASSWORD, --secrets has them.",
)  # fmt: skip
federation_option = click.option(
    "--federation", default="default", show_default=True, metavar="F", help="Name space on the broker."
)
secrets_file = click.option(
    "--secrets", metavar="FILE", default="", help="TOML file of passwords by user name, as `definitions` writes it."
)
participant_options = _together(
    click.option("--participants", "named", metavar="P,P,...", default="", help="Names of the participants."),
    click.option(
        "--participants-file", "listed", metavar="FILE",
        type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The same, one name per line.",
    ),
    click.option(
        "--count", type=click.IntRange(1, MOST_PARTICIPANTS), metavar="N",
        help="The same: p01 to pN, as simulations call them.",
    ),
)  # fmt: skip


@click.group("broker")
def broker_group() -> None:
    """Prepare and check the RabbitMQ that a federation runs over."""


@broker_group.command()
@participant_options
@federation_option
@click.option("--vhost", default="/", show_default=True, help="The virtual host that all of it lies in.")
@click.option(
    "--secrets", required=True, metavar="FILE",
    help="TOML file of passwords by user name. Kept; users who have none get one.",
)  # fmt: skip
@click.option("--out", metavar="FILE", help="Where to write the document.  [default: stdout]")
def definitions(
    named: str, listed: Path | None, count: int | None, federation: str, vhost: str, secrets: str, out: str | None
) -> None:
    """Write all of a federation's users, rights and queues, as RabbitMQ loads them.

    One user for the aggregator, one per participant, each with exactly the rights it needs. Load it with
    `rabbitmqctl import_definitions FILE`, or at boot with `load_definitions = FILE` in rabbitmq.conf.
    Loading again changes nothing but what is different.

    Users that it does not name lose nothing. Those that it does name have, in this virtual host, the rights it
    says and no others: give each federation a virtual host of its own. To remove a participant:
    `rabbitmqctl delete_user NAME`.
    """
    from secrets import token_bytes, token_urlsafe

    from broker import definitions as made
    from broker.topology import Topology
    from fluffle.secrets import make_secrets

    enrolment = made.Enrolment(Topology(federation), _participants(named, listed, count))
    passwords = make_secrets(Path(secrets), enrolment.users, token_urlsafe)
    hashes = {user: made.password_hash(passwords[user], token_bytes(made.SALT_BYTES)) for user in enrolment.users}
    document = json.dumps(made.definitions([enrolment], hashes, vhost), indent=2) + "\n"
    _put(document, out)
    click.echo(
        f"{len(enrolment.users)} users of federation {federation!r} in virtual host {vhost!r}; "
        f"their passwords are in {secrets}\n"
        f"load it:  rabbitmqctl import_definitions {out or 'FILE'}\n"
        f"or at boot, in rabbitmq.conf:  load_definitions = {Path(out).absolute() if out else 'FILE'}\n"
        "users that are not in it lose nothing",
        err=True,
    )


@broker_group.command()
@broker_option
@secrets_file
@federation_option
@participant_options
def setup(url: str, secrets: str, federation: str, named: str, listed: Path | None, count: int | None) -> None:
    """Declare a federation's exchanges, queues and stream, as its aggregator would.

    Then workers can start before the aggregator. With participants, their inboxes are declared, too. Doing it
    again changes nothing.
    """
    from broker.definitions import Enrolment
    from broker.topology import Topology
    from fluffle.brokers import connectable

    given = bool(named or listed or count)
    enrolment = Enrolment(Topology(federation), _participants(named, listed, count) if given else ())
    asyncio.run(_set_up(connectable(url, secrets), enrolment.topology, enrolment.participants))
    inboxes = f" with {len(enrolment.participants)} inboxes" if given else ""
    click.echo(f"federation {federation!r} is set up{inboxes}")


@broker_group.command()
@broker_option
@secrets_file
@federation_option
@click.option("--as", "user", metavar="NAME", help="Who to be.  [default: the address' user, else the aggregator]")
@click.option("--json", "json_target", metavar="FILE|-", help="Write the report as one JSON object; `-` is stdout.")
def check(url: str, secrets: str, federation: str, user: str | None, json_target: str | None) -> None:
    """Try out whether a RabbitMQ is fit for Fluffle: one line per check.

    As the aggregator, everything that it will do; as a participant, what its worker will do, and that what it
    must not do is refused. What is declared for it is deleted again. Exit code 1 if anything failed.
    """
    from secrets import token_hex

    from broker.topology import AGGREGATOR, Topology
    from fluffle.brokers import connectable, user_of
    from fluffle.config import without_password

    check_target(json_target)
    name = user or user_of(url) or AGGREGATOR
    findings = asyncio.run(_examined(connectable(url, secrets), name, Topology(federation), token_hex(4)))
    fit = all(finding.level != "failed" for finding in findings)
    report = {
        "broker": without_password(url), "user": name, "federation": federation, "fit": fit,
        "checks": [
            {"check": f.check, "level": f.level, "finding": f.finding, "remedy": f.remedy} for f in findings
        ],
    }  # fmt: skip
    emit(report, report_text(findings), json_target)
    if not fit:
        sys.exit(1)


def report_text(findings: list[Finding]) -> str:
    """One line per check; the remedy of what is not fine below it."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.level]:<8}{finding.check:<{width}}  {finding.finding}")
        lines += [f"{'':<{8 + width}}  remedy: {finding.remedy}"] if finding.remedy else []
    return "\n".join(lines) + "\n"


async def _set_up(broker: RabbitBroker, topology: Topology, participants: tuple[str, ...]) -> None:
    from broker.topology import AGGREGATOR

    transport = await broker.connect(AGGREGATOR, purpose="setup")
    try:
        await transport.declare(*topology.aggregator_declarations())
        for participant in participants:
            await transport.declare(*topology.inbox_declarations(participant))
    finally:
        await transport.close()


async def _examined(broker: RabbitBroker, user: str, topology: Topology, token: str) -> list[Finding]:
    from broker.errors import TransportError
    from broker.fitness import Bench, Finding, examine

    try:
        transport = await broker.connect(user, purpose="check")
    except (TransportError, ConfigError) as error:
        return [Finding("connection", "failed", str(error), "see the message")]
    try:
        probe = await broker.probe(user)
        try:
            return [
                Finding("connection", "ok", f"connected as {user}"),
                *await examine(Bench(transport, probe, topology, token)),
            ]
        finally:
            await probe.close()
    finally:
        await transport.close()


def _participants(named: str, listed: Path | None, count: int | None) -> tuple[str, ...]:
    """The names, given in one of three ways. Raises ConfigError."""
    from workers.partition import participant_names

    if sum(map(bool, (named, listed, count))) != 1:
        raise ConfigError("name the participants: one of --participants, --participants-file or --count")
    if count:
        return tuple(participant_names(count))
    words = listed.read_text("utf-8").splitlines() if listed else named.split(",")
    found = tuple(word for word in map(str.strip, words) if word and not word.startswith("#"))
    if not found:
        raise ConfigError(f"{listed or '--participants'}: names nobody: write p01,p02 or one name per line")
    return found


def _put(text: str, out: str | None) -> None:
    """To stdout, or to a file that is whole or not there."""
    from broker.durable import replace_file

    if out is None:
        click.echo(text, nl=False)
        return
    path = Path(out)
    try:
        replace_file(path, text.encode(), path.with_name(f".{path.name}.new"))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from None
