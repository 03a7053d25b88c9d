"""From an address in the configuration to a broker that connections are made from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from broker.errors import ConfigError
from broker.rabbitmq import RabbitBroker, RabbitSettings
from fluffle.config import BrokerSection


def rabbit_broker(section: BrokerSection) -> RabbitBroker:
    """Raises ConfigError if passwords are wanted from a file that is not there or not one of passwords."""
    passwords = read_secrets(Path(section.secrets)).__getitem__ if section.secrets else None
    return RabbitBroker(section.url, passwords, RabbitSettings(patience_s=section.patience_s))


def read_secrets(path: Path) -> Mapping[str, str]:
    try:
        return {name: str(value) for name, value in tomllib.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as passwords: {error}") from None
