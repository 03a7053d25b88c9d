"""`fluffle simulate` over RabbitMQ: every participant is a process, and the bits are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs
from yarl import URL

from broker.errors import ConfigError, TaskError
from broker.messages import Scalar
from fluffle import simulate
from fluffle.config import from_values, load_config
from fluffle.crowd import check_credentials
from fluffle.logs import configure_logs
from tests.rabbit_node import PARTICIPANTS, Rabbit, password

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(240)]

RUN = {"round.participants": 3, "data.partition": "dirichlet:0.5", "stop.rounds": 3}


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    file = tmp_path / "secrets.toml"
    file.write_text("".join(f'{user} = "{password(user)}"\n' for user in ["aggregator", *PARTICIPANTS]))
    file.chmod(0o600)
    return file


def over(rabbit: Rabbit, secrets: Path) -> dict[str, str]:
    return {
        "broker.url": str(URL.build(scheme="amqp", host=rabbit.url.host or "", port=rabbit.url.port)),
        "broker.secrets": str(secrets),
        "broker.federation": rabbit.topology().federation,
    }


ATTACKED = {"strategy.name": "geometric-median", "round.quorum": 3, "study.attack": "gaussian:1"}


OWN = {"strategy.name": "scaffold", "personal.local": "2.*", "personal.ditto": 0.1, "evaluation.mode": "federated"}


@pytest.mark.parametrize(
    "more",
    [{}, pytest.param(ATTACKED, marks=pytest.mark.slow), pytest.param(OWN, marks=pytest.mark.slow)],
    ids=["plain", "attacked", "own"],
)
def test_the_bits_are_those_of_one_process(
    more: dict[str, Scalar], rabbit: Rabbit, secrets: Path, tmp_path: Path
) -> None:
    alone = simulate("digits", {**RUN, **more, "run.dir": str(tmp_path / "alone")})
    settings = {**RUN, **more, **over(rabbit, secrets), "simulation.vectorise": True}  # which only one process can
    configure_logs("info")
    with capture_logs() as told:
        spread = simulate("digits", {**settings, "run.dir": str(tmp_path / "spread")})
    assert [line["reason"] for line in told if line["event"] == "trained_one_by_one"] == [
        "over RabbitMQ every participant is a process of its own"
    ]
    assert spread.summary["model_sha256"] == alone.summary["model_sha256"]
    assert spread.summary["updates"] == alone.summary["updates"]
    logs = list((tmp_path / "spread" / "workers").glob("*/*.log"))
    assert len(logs) == 3
    assert all("worker_stopped" in log.read_text() for log in logs)
    assert sum("worker_attacks" in log.read_text() for log in logs) == ("study.attack" in more)


def test_an_estimator_finds_the_same_over_rabbitmq(rabbit: Rabbit, secrets: Path, tmp_path: Path) -> None:
    alone = simulate("digits-kmeans", {**RUN, "run.dir": str(tmp_path / "alone")})
    spread = simulate("digits-kmeans", {**RUN, **over(rabbit, secrets), "run.dir": str(tmp_path / "spread")})
    assert spread.summary["model_sha256"] == alone.summary["model_sha256"]
    assert spread.summary["metrics"] == alone.summary["metrics"]


def test_a_worker_that_fails_ends_it_and_is_quoted(rabbit: Rabbit, secrets: Path, tmp_path: Path) -> None:
    secrets.write_text(secrets.read_text().replace("secret of p02", "forgotten"))
    with pytest.raises(TaskError, match=r"the worker of p02 ended with exit code 1(.|\n)*refused user or password"):
        simulate("digits", {**RUN, **over(rabbit, secrets), "run.dir": str(tmp_path / "run")})


def test_credentials_for_everybody_are_asked_for() -> None:
    for url, file in (("amqp://localhost", ""), ("amqp://me:pw@localhost", "secrets.toml")):
        config = load_config(from_values({"task": "digits", "broker.url": url, "broker.secrets": file}))
        with pytest.raises(ConfigError, match="--secrets FILE"):
            check_credentials(config)
