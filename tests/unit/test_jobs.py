"""What an aggregator runs, out of a configuration, with and without the task's code at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from broker import tensors
from broker.errors import ConfigError, StateError
from fluffle.cli import cli
from fluffle.config import Config, from_values, load_config
from fluffle.jobs import MEASURED, run_defaults, run_job
from tests.federation import Pull
from workers.tasks import find_task


def config(**values: Any) -> Config:
    layer = from_values({"task": "digits", "run.id": "r", **values})
    return load_config(layer, defaults=run_defaults(layer))


@pytest.fixture
def initial(tmp_path: Path) -> str:
    outcome = CliRunner().invoke(cli, ["initial", "digits", str(tmp_path / "initial.safetensors")])
    assert (outcome.exit_code, outcome.output.split()[-1]) == (0, "digits")
    return str(tmp_path / "initial.safetensors")


def test_a_task_brings_its_initial_model_and_how_it_is_measured() -> None:
    job = run_job(config())
    digits = find_task("digits").bind()
    assert tensors.encode(job.initial()) == tensors.encode(digits.initial())
    assert job.evaluate is not None
    assert set(job.evaluate(job.initial())) == {*MEASURED["accuracy"], *(f"recall_{digit}" for digit in range(10))}
    assert job.metric == "accuracy"
    assert (job.settings.learning_task, job.settings.data) == ("digits", {"partition": "iid", "participants": 10})


def test_a_file_may_hold_the_initial_model(initial: str) -> None:
    told = {"run.initial": initial, "evaluation.mode": "federated"}
    job = run_job(config(**told, **{"train.whatever": 1}))  # who lacks the code takes the task's settings on trust
    assert tensors.encode(job.initial()) == tensors.encode(find_task("digits").bind().initial())
    assert (job.evaluate, job.metric) == (None, "loss")
    measured = run_job(config(**{"run.initial": initial}))
    assert measured.evaluate is not None
    with pytest.raises(StateError, match=r"nowhere.safetensors: not a readable safetensors file"):
        run_job(config(**{**told, "run.initial": "nowhere.safetensors"}))


def test_what_nobody_measures_is_not_waited_for() -> None:
    with pytest.raises(ConfigError, match=r"stop.target_metric is 'rmse', which task 'digits' does not measure"):
        run_job(config(**{"stop.target_metric": "rmse:3"}))


@pytest.mark.parametrize(
    ("mode", "known", "unknown"),
    [
        ("central", ["macro_f1", "recall_9", "train_loss"], ["recall_10", "accuracy_worst_10", "f1"]),
        (
            "federated",
            ["macro_f1", "accuracy_worst_10", "loss_std"],
            ["recall_9", "train_loss_std", "accuracy_best"],
        ),
        ("none", ["train_loss"], ["accuracy"]),
    ],
)
def test_a_metric_that_judges_is_one_that_is_measured(mode: str, known: list[str], unknown: list[str]) -> None:
    for name in known:
        assert run_job(config(**{"evaluation.mode": mode, "evaluation.metric": name})).metric == name
    for name in unknown:
        with pytest.raises(ConfigError, match=f"evaluation.metric.* is '{name}', .* it measures train_loss"):
            run_job(config(**{"evaluation.mode": mode, "evaluation.metric": name}))
    with pytest.raises(ConfigError, match=r"it measures train_loss, loss, .*, recall_0, .*, recall_9"):
        run_job(config(**{"evaluation.metric": "recall_ten"}))


def test_fairness_is_that_of_the_metric_that_judges() -> None:
    told = {"evaluation.mode": "federated", "stop.target_metric": "loss_worst_10:0.5"}
    run_job(config(**told, **{"evaluation.metric": "loss"}))
    run_job(config(**told, **{"evaluation.metric": "loss_std"}))
    with pytest.raises(ConfigError, match=r"is 'loss_worst_10', .* it measures .*, accuracy_worst_10, "):
        run_job(config(**told))


def test_a_plain_learning_task_or_what_makes_one_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    module.TASK, module.make = Pull("p01"), lambda who, data: Pull(f"{who}{data}07")
    for name in ("TASK", "make"):
        job = run_job(config(task=f"mine:{name}"))
        assert np.array_equal(job.initial()["w"], np.zeros(7, np.float32))
        assert job.evaluate is not None
        assert set(job.evaluate(job.initial())) == {"loss"}


def test_the_aggregator_needs_no_torch_if_it_has_the_initial_model(initial: str, tmp_path: Path) -> None:
    """In a process where torch and scikit-learn cannot be imported, as in the aggregator's image."""
    run = f"task = 'digits'\n[run]\ninitial = '{initial}'\n[evaluation]\nmode = 'federated'\n"
    (tmp_path / "run.toml").write_text(run)
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "sklearn.py").write_text("raise ImportError('no scikit-learn here')")
    program = (
        "import sys, pathlib; from fluffle.command import Asked; from fluffle.jobs import run_job\n"
        "import fluffle.serve, fluffle.run_commands, fluffle.brokers, fluffle.finish, fluffle.display\n"
        "asked = Asked(pathlib.Path('run.toml'), (), {}, 'info', None)\n"
        "job = run_job(asked.run_config()); print(len(job.initial()), asked.run_config().run.id)\n"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["4", "run"]), done.stderr
