"""deploy/compose.yaml: valid by the specification's schema, and true to the command and to itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import DEPLOY, ROOT, check_all

from broker.topology import Topology
from fluffle.config import SiteSection

FILE = DEPLOY / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
WORKERS = {name: service for name, service in SERVICES.items() if name.startswith("worker-")}
AGGREGATORS = {name: service for name, service in SERVICES.items() if name.startswith("aggregator-")}


def program(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed: `make install` gets it")
    return str(path)


def option(service: dict[str, Any], name: str) -> str:
    (value,) = [word.partition("=")[2] for word in service["command"] if word.startswith(f"--{name}=")]
    return str(value)


def test_it_follows_the_specification() -> None:
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_all_yaml_of_deploy_is_tidy() -> None:
    command = [program("yamllint"), "--strict", "-c", str(DEPLOY / ".yamllint.yaml"), str(DEPLOY)]
    linted = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout


def test_every_command_line_is_one_of_fluffle() -> None:
    lines = [service["command"] for service in SERVICES.values() if service["image"].startswith("fluffle-")]
    assert len(lines) == len(WORKERS) + len(AGGREGATORS) + 1
    check_all(lines)


def test_every_participant_has_its_own_name_password_and_journal() -> None:
    names = [option(service, "participant") for service in WORKERS.values()]
    assert names == ["p01", "p02", "p03", "p04", "p05"]
    for name, service in zip(names, WORKERS.values(), strict=True):
        assert Topology("default").inbox(name)
        assert service["secrets"] == [{"source": name, "target": "secrets.toml"}]
        assert service["volumes"] == [f"journal-{name}:{option(service, 'journal')}"]
        assert option(service, "secrets") == "/run/secrets/secrets.toml"
        assert service["restart"] == "unless-stopped"


def test_a_workers_health_is_asked_where_it_is_told() -> None:
    for service in WORKERS.values():
        listen = service["environment"]["FLUFFLE_SITE_HTTP"]
        assert f"http://{SiteSection(http=listen).http}/readyz" in service["healthcheck"]["test"][-1]


def test_leader_and_standby_are_the_same() -> None:
    first, second = AGGREGATORS.values()
    assert first.pop("ports") != second.pop("ports")
    assert first == second
    assert first["restart"].startswith("on-failure"), "a finished run exits with 0 and shall not begin again"


def test_the_first_model_is_that_of_the_run() -> None:
    _, task, out = SERVICES["initial"]["command"]
    run = (DEPLOY / "examples" / "run.toml").read_text("utf-8")
    assert f'task = "{task}"' in run
    assert f'initial = "{out}"' in run
    (volume,) = SERVICES["initial"]["volumes"]
    assert out.startswith(volume.partition(":")[2])
    for service in AGGREGATORS.values():
        assert f"{volume}:ro" in service["volumes"]
        assert service["depends_on"]["initial"] == {"condition": "service_completed_successfully"}


def test_rabbitmq_keeps_its_data() -> None:
    rabbit = SERVICES["rabbitmq"]
    assert rabbit["hostname"], "without one a new container has a new name, and an empty broker"
    assert "broker:/var/lib/rabbitmq" in rabbit["volumes"]
    target = rabbit["secrets"][0]["target"]
    assert f"definitions.local.path = {target}" in (DEPLOY / "rabbitmq.conf").read_text("utf-8")


def test_files_and_volumes_are_there_and_secrets_are_not() -> None:
    mounted = [volume for service in SERVICES.values() for volume in service["volumes"]]
    for volume in mounted:
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or (FILE.parent / source).is_file(), source
    used = {secret["source"] for service in SERVICES.values() for secret in service.get("secrets", ())}
    assert used == set(COMPOSE["secrets"])
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert not list((DEPLOY / "secrets").glob("*.example"))


def test_everything_has_limits() -> None:
    for name, service in SERVICES.items():
        assert "mem_limit" in service, name
        assert service["logging"]["options"]["max-size"], name
        if service["image"].startswith("fluffle-"):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert (ROOT / service["build"]["dockerfile"]).is_file()
