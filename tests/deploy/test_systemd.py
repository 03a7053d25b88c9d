"""deploy/systemd: units that systemd accepts, whose command lines are Fluffle's."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from command_lines import DEPLOY, check_all

AGGREGATOR = DEPLOY / "systemd" / "fluffle-aggregator.service"
WORKER = DEPLOY / "systemd" / "fluffle-worker@.service"
UNITS = [AGGREGATOR, WORKER]
PROGRAM = "/opt/fluffle/bin/fluffle"
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)

Directives = dict[str, list[str]]


def read(unit: Path) -> dict[str, Directives]:
    """Sections with their directives, each as often as it is given. configparser would keep the last only."""
    sections: dict[str, Directives] = {}
    for line in unit.read_text("utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            section.setdefault(name, []).append(value)
    return sections


def service(unit: Path) -> Directives:
    return read(unit)["Service"]


def installed(unit: Path, folder: Path) -> Path:
    """The unit as systemd would find it: an instance, with a program that is there."""
    copy = folder / unit.name.replace("@.", "@p-1.")
    copy.write_text(unit.read_text("utf-8").replace(PROGRAM, "/bin/true"))
    return copy


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@each_unit
def test_systemd_accepts_it(unit: Path, tmp_path: Path) -> None:
    verified = analyze("verify", "--man=no", installed(unit, tmp_path))
    assert (verified.returncode, verified.stderr) == (0, "")


def test_systemd_would_say_if_it_did_not(tmp_path: Path) -> None:
    copy = installed(AGGREGATOR, tmp_path)
    copy.write_text(copy.read_text().replace("DynamicUser=", "DynamicUsr="))
    assert "DynamicUsr" in analyze("verify", "--man=no", copy).stderr


@each_unit
def test_little_is_exposed(unit: Path, tmp_path: Path) -> None:
    """By systemd's own measure, from 0 (nothing) to 10."""
    measured = analyze("security", "--offline=true", "--no-pager", "--threshold=20", installed(unit, tmp_path))
    assert measured.returncode == 0, measured.stdout


@each_unit
def test_the_command_line_is_one_of_fluffle(unit: Path) -> None:
    (line,) = service(unit)["ExecStart"]
    program, *arguments = shlex.split(line)
    assert program == PROGRAM
    check_all([arguments])


@each_unit
def test_passwords_are_in_no_file_that_others_read(unit: Path) -> None:
    (credential,) = service(unit)["LoadCredential"]
    name, _, source = credential.partition(":")
    assert source.startswith("/etc/fluffle/")
    assert f"${{CREDENTIALS_DIRECTORY}}/{name}" in service(unit)["ExecStart"][0]
    assert service(unit)["DynamicUser"] == ["yes"]


@each_unit
def test_a_misconfigured_process_stays_down(unit: Path) -> None:
    assert service(unit)["RestartPreventExitStatus"] == ["2"]
    assert service(unit)["SuccessExitStatus"] == ["143"]
    assert read(unit)["Unit"]["StartLimitIntervalSec"] == ["0"]


def test_a_finished_run_is_not_begun_again_but_workers_always_come_back() -> None:
    assert service(AGGREGATOR)["Restart"] == ["on-failure"]
    assert service(WORKER)["Restart"] == ["always"]


def test_the_instance_is_the_participant() -> None:
    """%i and not %I, which would turn `p-1` into `p/1`."""
    (line,) = service(WORKER)["ExecStart"]
    assert "--participant %i" in line
    assert service(WORKER)["StateDirectory"] == ["fluffle-worker/%i"]
    assert service(WORKER)["LoadCredential"] == ["secrets.toml:/etc/fluffle/secrets/%i.toml"]
    assert "%I" not in WORKER.read_text("utf-8")
