"""The file of passwords: kept, added to, never open to others; and the addresses that it completes."""

from __future__ import annotations

import secrets
import stat
import tomllib
from pathlib import Path

import pytest
import structlog

from broker.errors import ConfigError
from broker.rabbitmq import RabbitSettings
from fluffle.brokers import connectable, rabbit_broker, user_of
from fluffle.config import BrokerSection
from fluffle.secrets import make_secrets, read_secrets


def counting(size: int) -> str:
    return f"{size} random bytes"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secrets.toml"


def written(file: Path, text: str) -> Path:
    file.write_text(text, "utf-8")
    file.chmod(0o600)
    return file


def test_passwords_are_made_once_and_kept(file: Path) -> None:
    first = make_secrets(file, ["aggregator", "p01"], secrets.token_urlsafe)
    assert len(set(first.values())) == 2
    assert all(len(password) >= 32 for password in first.values())
    again = make_secrets(file, ["p01", "p02", "p02"], secrets.token_urlsafe)
    assert list(again) == ["aggregator", "p01", "p02"]
    assert {user: again[user] for user in first} == first
    assert read_secrets(file) == again == tomllib.loads(file.read_text())


def test_only_the_owner_may_read_it(file: Path) -> None:
    make_secrets(file, ["p01"], counting)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_somebody_wrote_stays(file: Path) -> None:
    written(file, '# ours\np01 = "a \\"quoted\\" \\u00e4 one"  # by hand')
    assert make_secrets(file, ["p01", "p02"], counting) == {"p01": 'a "quoted" ä one', "p02": "24 random bytes"}
    assert file.read_text().startswith("# ours\n")
    assert "# by hand" in file.read_text()
    before = file.stat().st_mtime_ns
    make_secrets(file, ["p02"], counting)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [("p01 = 5", "p01 has no password"), ('p01 = ""', "p01 has no password"), ("[p01]\nx = 'y'", "p01 has no"),
     ("p01: x", "is not TOML"), ("p01 = 'a'\np01 = 'b'", "is not TOML")],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_with_its_name(file: Path, text: str, reason: str) -> None:
    written(file, text)
    for use in (lambda: read_secrets(file), lambda: make_secrets(file, ["p02"], counting)):
        with pytest.raises(ConfigError, match=reason) as error:
            use()
        assert str(file) in str(error.value)
    assert file.read_text() == text


def test_a_file_that_is_not_there_or_cannot_be(file: Path) -> None:
    with pytest.raises(ConfigError, match=f"{file}.*fluffle broker definitions"):
        read_secrets(file)
    with pytest.raises(ConfigError, match="cannot be written"):
        make_secrets(file / "below" / "nothing", ["p01"], counting)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_others_who_can_read_it_are_warned_of(file: Path, mode: int, warns: bool) -> None:
    written(file, 'p01 = "hidden"').chmod(mode)
    with structlog.testing.capture_logs() as logs:
        read_secrets(file)
    assert [log["event"] for log in logs] == (["secrets_exposed"] if warns else [])
    assert "hidden" not in str(logs)


def address(url: str, file: Path | str, user: str) -> str:
    return str(connectable(url, str(file))._address(user).with_query({}))


def test_addresses_are_completed_from_the_file(file: Path) -> None:
    written(file, 'p01 = "a/b@c:d"\naggregator = "x"')
    assert address("amqp://host/v", file, "p01") == "amqp://p01:a%2Fb%40c%3Ad@host/v"
    assert address("amqp://host/v", file, "aggregator") == "amqp://aggregator:x@host/v"
    assert address("amqps://p01@host:5671/v", file, "p01") == "amqps://p01:a%2Fb%40c%3Ad@host:5671/v"
    assert address("amqp://p01:own@host/v", file, "p01") == "amqp://p01:own@host/v"
    assert address("amqp://p01:own@host/v", "", "p01") == "amqp://p01:own@host/v"


def test_a_user_without_a_password(file: Path) -> None:
    written(file, 'p01 = "x"')
    with pytest.raises(ConfigError, match=f"{file}.*'p02'"):
        connectable("amqp://host", str(file))._address("p02")
    with pytest.raises(ConfigError, match="'p02'"):
        connectable("amqp://p02@host", str(file))
    with pytest.raises(ConfigError, match="--secrets FILE"):
        connectable("amqp://host")
    with pytest.raises(ConfigError, match="p02"):
        connectable("amqp://p01@host", str(file))._address("p02")


@pytest.mark.parametrize("url", ["memory", "http://host", "amqp://", "amqp:host", "", "amqp://host:port"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="amqp"):
        connectable(url, "unused")


def test_the_connections_heartbeat_is_a_setting() -> None:
    """RabbitMQ takes two to three times what it is told: told four fifths, that is about twice the setting."""
    section = BrokerSection(url="amqp://p01:x@host", amqp_heartbeat_s=10)
    assert rabbit_broker(section)._address("p01").query == {"heartbeat": "8"}
    assert BrokerSection().amqp_heartbeat_s == RabbitSettings().heartbeat_s


def test_certificates_need_no_password() -> None:
    connectable("amqps://host/?auth=EXTERNAL")
    assert user_of("amqps://p01@host") == "p01"
    assert user_of("amqps://host") is None
