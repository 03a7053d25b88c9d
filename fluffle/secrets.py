"""The passwords of the broker's users: a TOML file of `name = "password"` that only its owner may read."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from broker.durable import replace_file
from broker.errors import ConfigError

log = structlog.get_logger(__name__)

PASSWORD_BYTES = 24
OWNER_ONLY = 0o600
HEADING = "# Passwords of the broker's users. Keep this file to yourself.\n"


def make_secrets(path: Path, users: Iterable[str], randomness: Callable[[int], str]) -> dict[str, str]:
    """All passwords of the file, after adding one for each of these users who has none.

    `randomness` makes a text of so many random bytes, as `secrets.token_urlsafe`.
    """
    known = read_secrets(path) if path.exists() else {}
    added = {user: randomness(PASSWORD_BYTES) for user in dict.fromkeys(users) if user not in known}
    if added:
        before = path.read_text("utf-8") if path.exists() else HEADING
        lines = "".join(f"{user} = {json.dumps(password)}\n" for user, password in added.items())
        _write(path, f"{before.rstrip()}\n{lines}")
    return known | added


def read_secrets(path: Path) -> dict[str, str]:
    """The passwords by user. Warns if others can read them. Raises ConfigError."""
    try:
        text, mode = path.read_text("utf-8"), path.stat().st_mode
        found = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}): name the file that `fluffle broker definitions "
            "--secrets FILE` wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'{path}: is not TOML ({error}): write one line `name = "password"` per user') from None
    for user, password in found.items():
        if not isinstance(password, str) or not password:
            raise ConfigError(f'{path}: {user} has no password as text: write {user} = "password"')
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("secrets_exposed", file=str(path), mode=f"{stat.S_IMODE(mode):o}", remedy=f"chmod 600 {path}")
    return found


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL, OWNER_ONLY))  # never, not even briefly, for others
        replace_file(path, text.encode(), beside)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}): name a file in a directory where you may write"
        ) from None
