"""The command `fluffle chaos`: everything is struck, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from broker.errors import StateError
from broker.topology import AGGREGATOR
from fluffle.chaos.node import installed
from fluffle.chaos.plan import Fault, Shape
from fluffle.chaos.processes import ROOT
from fluffle.chaos.scenario import Scenario, perform
from fluffle.cli import cli
from tests.rabbit_node import Rabbit, password
from workers.partition import participant_names

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(1800)]

PARTICIPANTS = 4


def chaos(directory: Path, *options: str) -> dict[str, Any]:
    """What the command wrote with `--json`; it must have ended with 0."""
    target = directory / "chaos.json"
    command = (sys.executable, "-m", "fluffle", "chaos", *options, "--json", str(target))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report: dict[str, Any] = json.loads(target.read_text())
    return report


def needs_rabbitmq() -> None:
    if not installed():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("RabbitMQ is not installed")


def nothing_was_lost(report: dict[str, Any], faults: int) -> None:
    updates = report["updates"]
    assert report["passed"]
    assert report["faults"]["struck"] == faults == len(report["struck"])
    assert updates["published"] == sum(updates[fate] for fate in ("counted", "late", "refused", "duplicate"))
    assert updates["undecided"] == updates["invented"] == updates["contradicted"] == updates["counted_twice"] == []
    assert 0 < report["recovery_median_s"] <= report["recovery_max_s"]


def ends_undisturbed(report: dict[str, Any], faults: int) -> None:
    nothing_was_lost(report, faults)
    assert report["same"]
    assert set(report["model_sha256"].values()) == {report["undisturbed_sha256"]}
    counted = report["updates"]["counted"] + report["updates"]["lost_by_broker"]["counted"]
    assert counted == PARTICIPANTS * report["rounds"]


def test_a_run_through_eight_faults_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    needs_rabbitmq()
    report = chaos(tmp_path, "--seed", "57", "--faults", "8")  # none that lasts long
    ends_undisturbed(report, 8)
    assert report["own_broker"]
    assert report["faults"].keys() >= {"lost_tail", "wrong_clock", "repeat"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_run_through_a_hundred_faults(tmp_path: Path, seed: int) -> None:
    needs_rabbitmq()
    ends_undisturbed(chaos(tmp_path, "--seed", str(seed), "--faults", "100"), 100)


@pytest.mark.slow
def test_models_that_go_in_chunks(tmp_path: Path) -> None:
    needs_rabbitmq()
    ends_undisturbed(chaos(tmp_path, "--large", "--faults", "30"), 30)


@pytest.mark.slow
def test_what_codecs_owe(tmp_path: Path) -> None:
    needs_rabbitmq()
    ends_undisturbed(chaos(tmp_path, "--large", "--coded", "--faults", "30"), 30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_with_a_quorum_every_update_meets_one_fate(tmp_path: Path, seed: int) -> None:
    needs_rabbitmq()
    report = chaos(tmp_path, "--quorum", "--seed", str(seed), "--faults", "100")
    nothing_was_lost(report, 100)
    assert report["same"] is None
    assert report["faults"]["asleep"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_asynchronous_rounds_lose_nothing_and_count_nothing_twice(tmp_path: Path, seed: int) -> None:
    needs_rabbitmq()
    nothing_was_lost(chaos(tmp_path, "--asynchronous", "--seed", str(seed), "--faults", "50"), 50)


@pytest.mark.slow
def test_a_broker_that_is_named_is_used_and_not_struck(rabbit: Rabbit, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.toml"
    users = (AGGREGATOR, *participant_names(PARTICIPANTS))
    secrets.write_text("".join(f"{user} = {json.dumps(password(user))}\n" for user in users))
    secrets.chmod(0o600)
    where = ("--broker", str(rabbit.url), "--secrets", str(secrets))
    report = chaos(tmp_path, "--faults", "10", *where, "--federation", rabbit.topology().federation)
    ends_undisturbed(report, 10)
    assert not report["own_broker"]
    assert {"broker_kill", "memory_alarm", "lost_tail"}.isdisjoint(report["faults"])
    assert report["faults"]["repeat"]


@pytest.mark.slow
def test_a_run_that_does_not_go_on_ends_with_the_end_of_every_log(tmp_path: Path) -> None:
    """A worker sleeps for longer than the command waits."""
    needs_rabbitmq()
    shape = Shape(("p01", "p02"), 1)
    asleep = [Fault("asleep", "p02", after_round=1, delay_s=0.0, lasts_s=600.0)]
    with pytest.raises(StateError, match="not mended within 5 s") as told:
        perform(Scenario(1, shape, stalled_s=5.0), asleep, tmp_path, lambda _: None)
    for name in ("leader", "standby", "p01", "p02"):
        assert f"--- {name}\n" in str(told.value)
    assert "work_begun participant=p01" in str(told.value)


# -- what cannot work -------------------------------------------------------------------------------------------


def refused(*options: str) -> str:
    outcome = CliRunner().invoke(cli, ["chaos", *options])
    assert outcome.exit_code == 2
    return outcome.output


def test_without_rabbitmq_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluffle.chaos.node.SERVER", Path("/nowhere"))
    assert "install rabbitmq-server 3.10 or newer" in refused()


@pytest.mark.parametrize("url", ["amqp://me:secret@host", "amqps://host"])
def test_a_broker_that_it_cannot_use_is_refused(url: str) -> None:
    told = refused("--broker", url, "--secrets", "secrets.toml")
    assert "without a user" in told
    assert "secret@" not in told


def test_passwords_of_all_are_needed(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.toml"
    secrets.touch(mode=0o600)
    secrets.write_text('aggregator = "a"\np02 = "b"\n')
    told = refused("--broker", "amqp://host", "--secrets", str(secrets), "--participants", "3")
    assert "no password of p01, p03" in told


def test_what_is_to_be_kept_needs_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluffle.chaos.node.SERVER", tmp_path)
    (tmp_path / "something").touch()
    assert "is not empty" in refused("--keep", str(tmp_path))
