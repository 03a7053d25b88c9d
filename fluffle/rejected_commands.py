"""`fluffle rejected`, thin: what it does is in `fluffle/rejected.py`, imported when it runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from fluffle.command import Asked
from fluffle.control_commands import operated_on, operates

if TYPE_CHECKING:
    from fluffle.rejected import Refused


@click.group()
def rejected() -> None:
    """Look at the messages that the aggregator refused."""


@rejected.command("list")
@operates
def list_rejected(asked: Asked) -> None:
    """List what was refused, the oldest first: offset, participant, quoted bytes, reason.

    Looking takes nothing away.
    """
    from fluffle.rejected import table

    click.echo(table(found_by(asked)), nl=False)


@rejected.command("show")
@click.argument("number", metavar="N", type=click.IntRange(min=1), required=False)
@operates
def show_rejected(asked: Asked, number: int | None) -> None:
    """Show the refused message number N of the list, the newest if none is named: why, and its first bytes."""
    from fluffle.rejected import page

    click.echo(page(found_by(asked), number), nl=False)


@rejected.command("clear")
@operates
def clear_rejected(asked: Asked) -> None:
    """List what was refused, and take it away. What is refused meanwhile stays."""
    from fluffle.rejected import clear, table

    asyncio.run(clear(*operated_on(asked), lambda found: click.echo(table(found), nl=False)))


def found_by(asked: Asked) -> list[Refused]:
    from fluffle.rejected import look

    return asyncio.run(look(*operated_on(asked)))
