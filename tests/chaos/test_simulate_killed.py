"""`fluffle simulate`, killed with SIGKILL in the middle and resumed from its run directory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-c", "from fluffle.cli import main; main()", "simulate")
ROUNDS = 40  # files lag a quarter of a second behind, which is some rounds
TRAINING = ("--set", "train.local_epochs=1", "--set", "train.batch_size=64")
SETTINGS = ("digits", "--participants", "4", "--rounds", str(ROUNDS), "--set", "run.id=killed", *TRAINING)


def simulate(directory: Path, *arguments: str) -> dict[str, object]:
    """Runs to the end and returns what `--json` wrote."""
    target = directory.parent / f"{directory.name}.json"
    command = (*COMMAND, *arguments, "--run-dir", str(directory), "--json", str(target))
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(target.read_text())
    return result


def kill_at_version(directory: Path, version: int, *arguments: str) -> None:
    """Starts a run and kills it once a checkpoint of that version or a later one is there."""
    command = (*COMMAND, *SETTINGS, *arguments, "--run-dir", str(directory))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stem >= f"v{version:06d}" for path in (directory / "checkpoints").glob("v*.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("version", "strategy"),
    [(12, "fedavg"), *(pytest.param(*at, marks=pytest.mark.slow) for at in ((1, "fedavg"), (12, "fedadam")))],
)
def test_a_killed_simulation_resumes_to_the_same_bits(tmp_path: Path, version: int, strategy: str) -> None:
    undisturbed = simulate(tmp_path / "undisturbed", *SETTINGS, "--strategy", strategy)
    kill_at_version(tmp_path / "killed", version, "--strategy", strategy)
    resumed = simulate(tmp_path / "killed", "--resume")
    assert resumed["model_sha256"] == undisturbed["model_sha256"]
    assert resumed["rounds"] == ROUNDS
    assert [row["round"] for row in resumed["history"]] == list(range(1, ROUNDS + 1))  # type: ignore[attr-defined]
    assert resumed["updates"]["accepted"] == 4 * ROUNDS  # type: ignore[index]
