"""Sweeps that really train: cells are the runs that `fluffle simulate` makes, here and elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result
from yarl import URL

from fluffle import simulate
from fluffle.cli import cli
from tests.rabbit_node import PARTICIPANTS, Rabbit, password

ROOT = Path(__file__).parents[2]
SWEEP = """
seeds = [3]
[base]
task = "digits"
stop.rounds = 2
round.participants = 3
train.max_steps = 5
[grid]
strategy.name = ["fedavg", "krum"]
"""
CELL = {"stop.rounds": 2, "round.participants": 3, "train.max_steps": 5, "run.seed": 3}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(SWEEP)


@pytest.fixture(autouse=True)
def _logs() -> object:
    yield
    structlog.reset_defaults()


def fluffle(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="fluffle")


def shas(results: Path) -> list[str]:
    return [cell["result"]["model_sha256"] for cell in json.loads(results.read_text())["cells"]]


def test_a_cell_is_that_run_and_one_that_fails_is_named(tmp_path: Path) -> None:
    outcome = fluffle("sweep", "study.toml", "--json", "all.json", "--picture", "all.png")
    assert outcome.exit_code == 1
    reason = (
        "strategy.name krum, seed 3: strategy.name = 'krum' with strategy.byzantine = 1 needs at least 5 updates"
    )
    assert f"1 of 2 cells failed; the same command runs them again:\n  {reason}" in outcome.stderr
    assert "event=cell_failed" in outcome.stderr
    assert "study: accuracy, 1 of 2 cells" in outcome.stdout
    alone = simulate("digits", {**CELL, "run.dir": "alone"})
    assert shas(Path("all.json")) == [alone.summary["model_sha256"]]
    assert Path("all.json").read_bytes() == Path("runs/sweeps/study/results.json").read_bytes()
    assert Path("all.png").stat().st_size > 1000
    # its file is a result like others
    (cell,) = Path("runs/sweeps/study/cells").iterdir()
    compared = fluffle("compare", str(cell), "alone", "--json", "-")
    assert [run["model_sha256"] for run in json.loads(compared.stdout)["runs"]] == [shas(Path("all.json"))[0]] * 2


def test_federated_central_and_local_runs_stand_side_by_side(tmp_path: Path) -> None:
    settings = [f"--set={name}={value}" for name, value in CELL.items()]
    for command in ("simulate", "central", "local"):
        assert fluffle(command, "digits", *settings, "--run-dir", f"runs/{command}").exit_code == 0
    outcome = fluffle("compare", "simulate", "runs/central", "runs/local/result.json", "--picture", "all.png")
    assert outcome.exit_code == 0, outcome.output
    head, *rows = (line.split() for line in outcome.stdout.splitlines())
    assert head[:5] == ["RUN", "TASK", "STRATEGY", "ROUNDS", "ACCURACY"]
    assert [row[2] for row in rows] == ["fedavg", "central", "local"]
    assert Path("all.png").stat().st_size > 1000
    listed = fluffle("runs", "list").stdout
    assert "central   2/2" in listed
    assert fluffle("evaluate", "runs/central").exit_code == 0
    assert "PARTICIPANT" in fluffle("runs", "show", "local").stdout
    assert "already holds a run" in fluffle("central", "digits", "--run-dir", "runs/central").stderr
    broken = fluffle("compare", "study.toml")
    assert broken.exit_code == 1
    assert "study.toml: cannot be read" in broken.stderr


@pytest.mark.slow
def test_a_killed_sweep_leaves_nobody_behind_and_goes_on(tmp_path: Path) -> None:
    seeds = SWEEP.replace("[3]", "[1, 2, 3]").replace('["fedavg", "krum"]', '["fedavg"]')
    Path("study.toml").write_text(seeds)
    with subprocess.Popen(
        [sys.executable, "-m", "fluffle", "sweep", "study.toml", "--jobs", "1"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        first = next(line for line in process.stderr if "event=cell_finished" in line)
        process.kill()
    assert "seed 1" in first
    before = {path: path.stat().st_mtime_ns for path in Path("runs/sweeps/study/cells").glob("*.json")}
    outcome = fluffle("sweep", "study.toml", "--jobs", "1")
    assert outcome.exit_code == 0, outcome.output
    assert "event=cells_found_finished cells=1 left=2" in outcome.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    undisturbed = fluffle("sweep", "study.toml", "--dir", "again", "--jobs", "2")
    assert undisturbed.exit_code == 0
    assert shas(Path("again/results.json")) == shas(Path("runs/sweeps/study/results.json"))


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.timeout(900)
def test_over_rabbitmq_each_family_does_what_it_does_here(rabbit: Rabbit, tmp_path: Path) -> None:
    """The same bits, but for asynchronous runs: there what meets in a version depends on when it comes."""
    sweep = str(ROOT / "benchmarks" / "sweeps" / "families.toml")
    secrets = tmp_path / "secrets.toml"
    secrets.write_text("".join(f'{user} = "{password(user)}"\n' for user in ["aggregator", *PARTICIPANTS]))
    secrets.chmod(0o600)
    url = str(URL.build(scheme="amqp", host=rabbit.url.host or "", port=rabbit.url.port))
    federation = f"broker.federation={rabbit.topology().federation}"
    over = ("--broker", url, "--secrets", str(secrets), "--set", federation)
    spread = fluffle("sweep", sweep, *over, "--dir", "spread")
    assert spread.exit_code == 0, spread.output
    assert not Path("spread/unfinished").exists()
    assert "over a broker cells run one after another" in fluffle("sweep", sweep, *over, "--jobs", "2").stderr
    assert fluffle("sweep", sweep, "--dir", "here").exit_code == 0
    print(spread.output)
    there, here = (by_cell(Path(folder) / "results.json") for folder in ("spread", "here"))
    assert there.keys() == here.keys()
    for cell, result in here.items():
        if "asynchronous" not in cell:
            assert there[cell]["model_sha256"] == result["model_sha256"], cell
        assert there[cell]["updates"]["accepted"] == result["updates"]["accepted"] == 50
        assert there[cell]["metrics"]["accuracy"] == pytest.approx(result["metrics"]["accuracy"], abs=0.1)


def by_cell(results: Path) -> dict[str, Any]:
    return {
        str(cell["place"]) + str(cell["seed"]): cell["result"] for cell in json.loads(results.read_text())["cells"]
    }


CLUSTER = """
import subprocess, sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        sweep = [sys.executable, "-m", "fluffle", "sweep", "study.toml", "--dask", cluster.scheduler_address]
        sys.exit(subprocess.run(sweep).returncode)
"""


@pytest.mark.slow
def test_a_dask_cluster_runs_the_cells(tmp_path: Path) -> None:
    """In processes of their own: Dask blocks its event loop now and then."""
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'fluffle[dask]'")
    Path("study.toml").write_text(SWEEP.replace('["fedavg", "krum"]', '["fedavg"]'))
    Path("cluster.py").write_text(CLUSTER)
    done = subprocess.run([sys.executable, "cluster.py"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    alone = simulate("digits", {**CELL, "run.dir": "alone"})
    assert shas(Path("runs/sweeps/study/results.json")) == [alone.summary["model_sha256"]]


def test_a_backend_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, option in (("distributed", "dask"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, module, None)
        outcome = fluffle("sweep", "study.toml", f"--{option}", "somewhere")
        assert outcome.exit_code == 2
        assert f"--{option} needs the package {module}: pip install 'fluffle[{option}]'" in outcome.stderr
