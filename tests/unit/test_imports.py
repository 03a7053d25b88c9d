"""What a process imports before it does anything: nothing heavy that it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from broker import tensors
from fluffle.chaos.processes import ROOT

HEAVY = ("torch", "transformers", "peft", "matplotlib", "sklearn", "scipy", "pandas")
UNTIL_THE_LOOP = f"""
import asyncio, sys
from fluffle.cli import main

def stop(coroutine, **options):
    coroutine.close()
    print("began", *(name for name in {(*HEAVY, "aiohttp")} if name in sys.modules))
    sys.exit()

asyncio.run = stop
main()
"""
BROKER = "amqp://{}:secret@localhost"


def imported(directory: Path, *arguments: str) -> list[str]:
    """Which of these a command has imported when its event loop begins."""
    line = [sys.executable, "-c", UNTIL_THE_LOOP, *arguments]
    done = subprocess.run(
        line, cwd=directory, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    began, *found = done.stdout.split()
    assert began == "began"
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(tensors.encode({"w": np.zeros(3, np.float32)}))
    (tmp_path / "run.toml").write_text(
        'task = "digits"\n[run]\ninitial = "model.safetensors"\n[evaluation]\nmode = "none"\n'
    )
    return tmp_path


def test_an_aggregator_that_is_given_its_model_imports_nothing_heavy(run: Path) -> None:
    assert imported(run, "aggregator", "run.toml", "--broker", BROKER.format("aggregator"), "--http", "") == []


def test_a_worker_imports_what_it_trains_with_when_it_trains(tmp_path: Path) -> None:
    assert imported(tmp_path, "worker", "--participant", "p01", "--broker", BROKER.format("p01")) == []


def test_help_imports_nothing_at_all(tmp_path: Path) -> None:
    names = (*HEAVY, "numpy", "pydantic", "aiohttp")
    code = f"import sys, fluffle.cli; print(*(name for name in {names} if name in sys.modules))"
    line = [sys.executable, "-c", code]
    done = subprocess.run(
        line, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_a_large_model_brings_transformers_only_when_it_is_bound(tmp_path: Path) -> None:
    code = "import sys, workers.tasks.spam, workers.hf.export; print({'transformers', 'peft'} & sys.modules.keys())"
    line = [sys.executable, "-c", code]
    done = subprocess.run(
        line, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()")
