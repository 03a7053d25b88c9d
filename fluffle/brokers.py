"""From an address and a file of passwords to a broker that connections can be made to."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from yarl import URL

from broker.errors import ConfigError
from broker.rabbitmq import RabbitBroker, RabbitSettings
from fluffle.config import BrokerSection
from fluffle.secrets import read_secrets


def rabbit_broker(section: BrokerSection) -> RabbitBroker:
    """The broker of a configuration. Raises ConfigError."""
    settings = RabbitSettings(heartbeat_s=section.amqp_heartbeat_s, patience_s=section.patience_s)
    return connectable(section.url, section.secrets, settings)


def connectable(url: str, secrets: str = "", settings: RabbitSettings | None = None) -> RabbitBroker:
    """RabbitMQ at this address. Whoever connects needs a password from the address or from the file `secrets`.

    An address with user and password is that user's only. One with a user name alone, too: the file has the
    password. One without either serves every user in the file. Raises ConfigError.
    """
    address = _parsed(url)
    if address.password is not None or address.query.get("auth", "").upper() == "EXTERNAL":
        return RabbitBroker(url, settings=settings)
    if not secrets:
        raise ConfigError(
            f"the address {address} has no password: give --secrets FILE, or amqp://NAME:PASSWORD@HOST:PORT/VHOST"
        )
    path = Path(secrets)
    password_of = partial(_password, read_secrets(path), path)
    if address.user is None:
        return RabbitBroker(url, password_of, settings)
    return RabbitBroker(str(address.with_password(password_of(address.user))), settings=settings)


def user_of(url: str) -> str | None:
    """The user that an address names."""
    return _parsed(url).user


def _parsed(url: str) -> URL:
    try:
        address = URL(url)
        good = address.scheme in ("amqp", "amqps") and bool(address.host)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            "the broker's address must be that of a RabbitMQ: amqp[s]://[NAME:PASSWORD@]HOST:PORT/VHOST"
        )
    return address


def _password(passwords: dict[str, str], path: Path, user: str) -> str:
    if user not in passwords:
        raise ConfigError(
            f"{path}: has no password of {user!r}: add it, or run `fluffle broker definitions` with that "
            "participant and load its output"
        )
    return passwords[user]
