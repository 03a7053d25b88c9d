"""`fluffle chaos`: for those who want to see it for themselves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from broker.errors import ConfigError
from fluffle.broker_commands import secrets_file
from fluffle.command import check_target, emit, json_option

if TYPE_CHECKING:
    from fluffle.chaos.scenario import Address, Scenario


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Which faults strike when.")
@click.option("--faults", type=click.IntRange(min=1), default=20, show_default=True, help="How many.")
@click.option("--participants", type=click.IntRange(2, 50), default=4, show_default=True, help="How many workers.")
@click.option("--quorum", is_flag=True, help="All but one suffice for a round; workers are gone for rounds, too.")
@click.option("--asynchronous", is_flag=True, help="Rounds are buffered (FedBuff): nobody waits for anybody.")
@click.option("--large", is_flag=True, help="A model of 80 kB, which goes in chunks.")
@click.option("--coded", is_flag=True, help="Updates go as top-k with error feedback, large models as differences.")
@click.option("--broker", "url", metavar="URL", help="amqp://HOST:PORT/VHOST.  [default: a private RabbitMQ]")
@secrets_file
@click.option("--federation", default="chaos", show_default=True, metavar="F", help="Name space on the broker.")
@click.option("--keep", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
              help="Keep logs and run directories there.")  # fmt: skip
@json_option
def chaos(
    seed: int, faults: int, participants: int, quorum: bool, asynchronous: bool, large: bool, coded: bool,  # noqa: FBT001
    url: str | None, secrets: str, federation: str, keep: Path | None, json_target: str | None,
) -> None:  # fmt: skip
    """Break everything on purpose, and check that nothing was lost.

    A leader, a standby and workers run as processes over a private RabbitMQ, learn something small, and are killed,
    frozen, cut off and slowed down as the seed says, or their clocks are wrong. The broker is killed and loses what
    it had not synced; messages arrive again. Exit code 0 if the model has the bits of an undisturbed run and every
    published update met exactly one fate. A broker that --broker names is not struck.
    """
    from secrets import token_hex

    from broker.topology import AGGREGATOR
    from fluffle.chaos.node import installed
    from fluffle.chaos.plan import Shape
    from fluffle.chaos.scenario import Scenario
    from workers.partition import participant_names

    check_target(json_target)
    if asynchronous and coded:
        raise ConfigError("--coded has error feedback, which asynchronous rounds refuse: leave one of them out")
    if not url and not installed():
        raise ConfigError(
            "RabbitMQ is not installed here: install rabbitmq-server 3.10 or newer (Debian, Ubuntu: apt install "
            "rabbitmq-server), or name a broker that may be used with --broker amqp://HOST --secrets FILE"
        )
    names = tuple(participant_names(participants))
    address = _address(url, secrets, (AGGREGATOR, *names)) if url else None
    shape = Shape(names, faults, own_broker=address is None, quorum=quorum or asynchronous, large=large)
    run_id = f"chaos-{seed}-{token_hex(3)}" if address else f"chaos-{seed}"
    _go(
        Scenario(seed, shape, run_id, federation, address, coded=coded, asynchronous=asynchronous),
        keep,
        json_target,
    )


def _go(scenario: Scenario, keep: Path | None, json_target: str | None) -> None:
    from fluffle.chaos.plan import draw
    from fluffle.chaos.report import build_report, report_text
    from fluffle.chaos.scenario import perform
    from fluffle.display import progress_bar
    from fluffle.logs import configure_logs

    configure_logs("warning" if sys.stderr.isatty() else "info")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends this ends what it started
    plan = draw(scenario.seed, scenario.shape)
    with kept(keep) as directory, progress_bar("rounds through chaos", scenario.shape.rounds) as advance:
        outcome = perform(scenario, plan, directory, advance)
    report = build_report(scenario, outcome)
    emit(report, report_text(report), json_target)
    if not report["passed"]:
        sys.exit(1)


@contextmanager
def kept(keep: Path | None) -> Iterator[Path]:
    """A directory for logs and run directories: the named one, which must be empty, or one for the block."""
    if keep is None:
        with TemporaryDirectory(prefix="fluffle-chaos-") as directory:
            yield Path(directory)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        used = any(keep.iterdir())
    except OSError as error:
        raise ConfigError(f"--keep {keep}: cannot be used ({error.strerror or error}): name another") from None
    if used:
        raise ConfigError(f"--keep {keep}: is not empty: name another directory")
    yield keep.absolute()


def _address(url: str, secrets: str, users: Sequence[str]) -> Address:
    """A broker that is not ours. Raises ConfigError."""
    from yarl import URL

    from fluffle.brokers import user_of
    from fluffle.chaos.scenario import Address
    from fluffle.secrets import read_secrets

    if user_of(url) is not None or not url.startswith("amqp://") or not secrets:
        raise ConfigError(
            "chaos plays aggregator and every participant, through proxies on this machine: give a plain --broker "
            "amqp://HOST without a user, and their passwords as --secrets FILE (`fluffle broker definitions`)"
        )
    passwords = read_secrets(Path(secrets))
    if missing := [user for user in users if user not in passwords]:
        raise ConfigError(f"{secrets}: has no password of {', '.join(missing)}: run `fluffle broker definitions`")
    return Address(URL(url), passwords.__getitem__)
