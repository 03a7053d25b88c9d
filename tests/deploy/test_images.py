"""The images: what is linted, what goes into them, and that the aggregator's has all that it imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import aggregator_requirements
import numpy as np
import pytest
from command_lines import DEPLOY, ROOT, check_all

from broker import tensors

DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
HADOLINT = Path(sys.executable).with_name("hadolint")
each_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.stem)

WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sklearn", "scipy"):
            raise ModuleNotFoundError(f"{name} is not in the aggregator's image", name=name)

sys.meta_path.insert(0, Absent())
before = set(sys.modules)
"""
IMPORT_ALL = """
import importlib, json, pkgutil
import aggregator, broker, fluffle.cli, fluffle.config, fluffle.finish, fluffle.layers, fluffle.logs, fluffle.rundir

for package in (aggregator, broker):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def instructions(dockerfile: Path, word: str) -> list[str]:
    text = dockerfile.read_text("utf-8").replace("\\\n", " ")
    return re.findall(rf"^{word} +(.*)$", text, re.MULTILINE)


@each_image
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    if not HADOLINT.exists():
        pytest.skip("hadolint is not installed: `make install` gets it")
    linted = subprocess.run([HADOLINT, "--no-color", dockerfile], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout


@each_image
def test_an_image_runs_fluffle_without_a_shell_and_without_root(dockerfile: Path) -> None:
    assert instructions(dockerfile, "ENTRYPOINT") == ['["fluffle"]']
    assert instructions(dockerfile, "STOPSIGNAL") == ["SIGTERM"]
    (user,) = instructions(dockerfile, "USER")
    assert int(user.partition(":")[0]) > 0


@each_image
def test_what_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    kept = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sources = [name for line in instructions(dockerfile, "COPY") for name in line.split()[:-1] if name != "."]
    assert sources
    for name in sources:
        assert (ROOT / name).exists()
        assert f"!{name}" in kept


def test_every_package_and_nothing_secret_goes_into_the_images() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]["find"]
    assert {f"!{pattern.rstrip('*')}" for pattern in found["include"]} <= set(lines)
    assert lines.index("*") < min(lines.index(line) for line in lines if line.startswith("!"))
    assert all((ROOT / line[1:]).exists() for line in lines if line.startswith("!"))
    assert not [line for line in lines if line.startswith("!deploy") and line.endswith(("deploy", "secrets"))]


def test_the_aggregators_requirements_are_those_of_the_project() -> None:
    said = aggregator_requirements.FILE.read_text("utf-8")
    assert said == aggregator_requirements.text(), "run `python tests/deploy/aggregator_requirements.py`"
    assert not re.findall(r"^(torch|scikit-learn|scipy)\b", said, re.MULTILINE)


def test_the_aggregator_imports_nothing_but_its_requirements() -> None:
    """Without torch and scikit-learn: everything that leads a run, and the command itself."""
    imported = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert imported.returncode == 0, imported.stderr
    homes = packages_distributions()
    modules = [name for name in json.loads(imported.stdout) if name in homes and not (ROOT / name).is_dir()]
    assert {"aiormq", "numpy", "pydantic"} <= set(modules)
    listed = re.findall(r"^([\w.-]+)==", aggregator_requirements.FILE.read_text("utf-8"), re.MULTILINE)
    installed = aggregator_requirements.closure(listed)
    for module in modules:
        names = {aggregator_requirements.normal(name) for name in homes[module]}
        assert names & installed, f"{module} (of {', '.join(names)}) would be missing"


def test_the_command_starts_without_torch(tmp_path: Path) -> None:
    """`fluffle aggregator` gets as far as looking for its broker, and ends with 143 when it is told to."""
    initial = tmp_path / "initial.safetensors"
    initial.write_bytes(tensors.encode({"w": np.zeros(3, np.float32)}))
    run, secrets = tmp_path / "run.toml", tmp_path / "secrets.toml"
    run.write_text(f'task = "digits"\n[run]\ninitial = "{initial}"\n[evaluation]\nmode = "none"\n')
    secrets.write_text('aggregator = "x"\n')
    arguments = [
        "aggregator", str(run), "--broker=amqp://127.0.0.1:9/x", f"--secrets={secrets}",
        f"--run-dir={tmp_path / 'run'}", "--http=127.0.0.1:0", "--log-format=json",
    ]  # fmt: skip
    code = f"{WITHOUT_TORCH}\nsys.argv[1:] = {arguments!r}\nfrom fluffle.cli import main\nmain()\n"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        heard = ""
        while "127.0.0.1:9" not in heard:
            line = process.stderr.readline()
            assert line, heard
            heard += line
    finally:
        process.terminate()
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 143, heard + rest
    assert "is not in the aggregator's image" not in heard + rest


@each_image
def test_the_default_command_exists(dockerfile: Path) -> None:
    (words,) = instructions(dockerfile, "CMD")[-1:]
    check_all([word for word in [json.loads(words)] if "--help" not in word])
