"""Where configuration comes from: TOML, environment and flags become layers; a run's own goes back to TOML."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.errors import ConfigError
from broker.messages import Scalar
from fluffle.config import PREFIX, SECTIONS, Config, Given, Layer, near, setting_named, settings, without_password
from fluffle.flags import FLAGS

NOT_SETTINGS = frozenset({"FLUFFLE_AMQP_URL", "FLUFFLE_DATA_DIR"})


def from_toml(path: Path) -> Layer:
    """A layer from a TOML file. Raises ConfigError if it cannot be read or is malformed."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
        return {name: Given(value, str(path)) for name, value in flat(document)}
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def from_environment(environ: Mapping[str, str]) -> Layer:
    """A layer from variables that begin with FLUFFLE_. Raises ConfigError for one that is no setting."""
    by_variable = {setting.env: setting.name for setting in settings()}
    layer: Layer = {}
    for variable, text in environ.items():
        if not is_setting_variable(variable):
            continue
        name = by_variable.get(variable)
        if name is None and variable.startswith(f"{PREFIX}TRAIN_"):
            name = "train." + variable.removeprefix(f"{PREFIX}TRAIN_").lower()
        if name is None:
            hint = near(variable, [*by_variable, *NOT_SETTINGS])
            raise ConfigError(f"unknown environment variable {variable}{hint}")
        layer[name] = Given(_parse(name, text), variable)
    return layer


def is_setting_variable(name: str) -> bool:
    return name.startswith(PREFIX) and name not in NOT_SETTINGS


def from_flags(flags: Mapping[str, str | None], sets: Sequence[str] = ()) -> Layer:
    """A layer from short flags (by setting, None: not given) and from `--set KEY=VALUE`, which wins."""
    options = {flag.setting: flag.option for flag in FLAGS} | {"task": "TASK"}
    layer = {
        name: Given(_parse(name, text), options.get(name, f"--set {name}"))
        for name, text in flags.items()
        if text is not None
    }
    for pair in sets:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: write KEY=VALUE, as --set train.lr=0.1")
        layer[name.strip()] = Given(_parse(name.strip(), text.strip()), "--set")
    return layer


def to_toml(config: Config) -> str:
    """The effective configuration as TOML that `from_toml` reads back; passwords are left out."""
    values = config.model_dump(exclude_none=True)
    values["broker"]["url"] = without_password(config.broker.url)
    lines = ["# The full configuration of this run. `fluffle settings` explains each setting.", ""]
    if values["broker"]["url"] != config.broker.url:
        lines[1:1] = ["# The broker's password was left out: give it in FLUFFLE_BROKER_URL."]
    lines += [f"task = {_toml(values.pop('task'))}"]
    for section, table in values.items():
        lines += ["", f"[{section}]", *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in nested tables, by dotted name."""
    for key, value in document.items():
        name = prefix + key
        if isinstance(value, dict) and value:
            yield from flat(value, f"{name}.")
        elif value != {} or name not in SECTIONS:
            yield name, value


def _parse(name: str, text: str) -> Any:
    """Text as TOML would read it, or as it stands where it is no TOML value or a text is wanted."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = document["value"]
    whole = set(document) == {"value"} and "#" not in text
    setting = setting_named(name)
    return value if isinstance(value, str) or (whole and not (setting and setting.is_text)) else text


def scalar_text(value: Scalar) -> str:
    """A value as one would write it in TOML, texts without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Scalar) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return scalar_text(value)
