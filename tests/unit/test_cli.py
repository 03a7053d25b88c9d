"""The command: what it prints where, its exit codes, and never a traceback for what somebody typed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import structlog
from click.testing import CliRunner, Result

from aggregator.archive import Archive
from broker import tensors
from broker.errors import ConfigError, StateError, TaskError, first_known
from broker.head import ClosedRound, Decision, HeadRecord
from broker.messages import Where
from fluffle.cli import cli, prediction_lines
from fluffle.config import Config
from fluffle.display import Display

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    record: HeadRecord
    wall_s: float
    virtual_s: float | None = None


class Simulation:
    """Stands in for `fluffle.simulation`: commits one round of the task's initial model."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.error: BaseException | None = None

    def simulate(self, config: Config, display: Display, *, abandon: str = "") -> Outcome:
        return asyncio.run(self._simulate(config, display))

    async def _simulate(self, config: Config, display: Display) -> Outcome:
        self.config = config
        if self.error:
            raise self.error
        display.on_notice("participant_joined", participant="p01")
        record, blob = await asyncio.to_thread(committed, config)
        archive = await asyncio.to_thread(Archive, config.run_dir)
        assert record.model is not None
        await archive.store(record.model.sha256, blob)
        archive.note(record)
        await archive.close()
        return Outcome(record, 1.5)


def committed(config: Config) -> tuple[HeadRecord, bytes]:
    from workers.tasks import find_task

    blob = tensors.encode(find_task(config.task).bind().initial())
    closed = ClosedRound(work="train", round=1, attempt=1, task=1, cohort=1, opened=1.0, closed=3.0, bytes_up=10)
    record = HeadRecord(
        run_id=config.run.id,
        epoch=1,
        seq=1,
        version=1,
        round=1,
        model=Where(where="inline", size_bytes=len(blob), sha256=hashlib.sha256(blob).hexdigest()),
        closed=closed,
        decided=(Decision(epoch=1, offset=1, participant="p01", task=1, verdict="counted", weight=5),),
        metrics={"accuracy": 0.5, "loss": 2.0},
        finished="all 1 rounds done",
    )
    return record, blob


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    module: Any = types.ModuleType("fluffle.simulation")
    simulation = Simulation()
    module.plan_simulation = lambda config: config
    module.run_simulation = simulation.simulate
    monkeypatch.setitem(sys.modules, "fluffle.simulation", module)
    return simulation


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for variable in os.environ:
        if variable.startswith("FLUFFLE_"):
            monkeypatch.delenv(variable)
    yield
    structlog.reset_defaults()


def fluffle(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="fluffle")


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*above, name)
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)


@pytest.mark.parametrize("command", [(), *commands(cli)], ids=" ".join)
def test_every_command_and_option_explains_itself(command: tuple[str, ...]) -> None:
    result = fluffle(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: fluffle")
    found: click.Command = cli
    for name in command:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    assert found.help
    for parameter in found.params:
        assert not isinstance(parameter, click.Option) or parameter.help


def test_a_simulation_leaves_its_files_and_says_where(simulation: Simulation) -> None:
    result = fluffle("simulate", "digits", "--participants", "3", "--set", "train.lr=0.5", "--run-dir", "here")
    assert result.exit_code == 0, result.output
    assert simulation.config is not None
    assert simulation.config.round.participants == 3
    assert simulation.config.train.chosen()["lr"] == 0.5
    assert "accuracy 0.5, loss 2" in result.stdout
    assert "event=participant_joined" in result.stderr
    names = {"run.toml", "history.sqlite", "checkpoints", "model.safetensors", "curve.png", "result.json"}
    assert names <= {path.name for path in Path("here").iterdir()}


def test_json_on_stdout_is_alone_there(simulation: Simulation) -> None:
    result = fluffle("simulate", "digits", "--json", "-")
    found = json.loads(result.stdout)
    assert found["updates"] == {"accepted": 1, "late": 0, "rejected": 0, "duplicate": 0}
    assert found["run_id"].startswith("digits-")
    assert found["bytes"]["up"] == 10
    assert "is finished" in result.stderr


def test_json_to_a_file(simulation: Simulation) -> None:
    assert fluffle("simulate", "digits", "--json", "result.json").exit_code == 0
    assert json.loads(Path("result.json").read_text())["task"] == "digits"


def test_a_json_target_that_cannot_be_is_refused_before_the_work(simulation: Simulation) -> None:
    result = fluffle("simulate", "digits", "--json", "nowhere/result.json")
    assert result.exit_code == 2
    assert simulation.config is None


def test_settings_come_from_file_environment_and_flags(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.toml").write_text("task = 'digits'\n[stop]\nrounds = 3\n[train]\nlr = 0.3\nl2 = 0.3\n")
    monkeypatch.setenv("FLUFFLE_TRAIN_L2", "0.4")
    monkeypatch.setenv("FLUFFLE_STOP_ROUNDS", "4")
    assert fluffle("simulate", "--config", "run.toml", "--rounds", "5").exit_code == 0
    assert simulation.config is not None
    chosen = simulation.config.train.chosen()
    assert (chosen["lr"], chosen["l2"], simulation.config.stop.rounds) == (0.3, 0.4, 5)


@pytest.mark.parametrize(
    ("flags", "expected"), [((), True), (("--vectorise",), True), (("--no-vectorise",), False)]
)
def test_a_switch_wins_over_the_environment(
    simulation: Simulation,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    expected: bool,
) -> None:
    monkeypatch.setenv("FLUFFLE_SIMULATION_VECTORISE", "true")
    assert fluffle("simulate", "digits", *flags).exit_code == 0
    assert simulation.config is not None
    assert simulation.config.simulation.vectorise is expected


def test_data_with_a_few_owners_stays_with_them(simulation: Simulation) -> None:
    assert fluffle("simulate", "heart").exit_code == 0
    assert simulation.config is not None
    assert (simulation.config.data.partition, simulation.config.round.participants) == ("natural", 4)


def test_a_run_is_resumed_with_its_settings(simulation: Simulation) -> None:
    first = ("simulate", "digits", "--run-dir", "here", "--set", "train.lr=0.5", "--rounds", "3")
    assert fluffle(*first).exit_code == 0
    begun = simulation.config
    again = fluffle(*first)
    assert again.exit_code == 1
    assert "already holds a run: add --resume" in again.stderr
    assert fluffle("simulate", "--run-dir", "here", "--resume", "--rounds", "9").exit_code == 0
    assert simulation.config is not None
    assert begun is not None
    assert simulation.config.run == begun.run
    assert simulation.config.train == begun.train
    assert simulation.config.stop.rounds == 9
    other = fluffle("simulate", "heart", "--run-dir", "here", "--resume")
    assert (other.exit_code, "learns digits, not heart" in other.stderr) == (2, True)


def test_a_users_task_that_raises_is_named(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "from workers.torch_task import TaskDefinition\n"
        "TASK = TaskDefinition(name='mine', model=nn.Identity, load=lambda: open('/none'))\n"
    )
    monkeypatch.syspath_prepend(".")
    result = fluffle("simulate", "mine:TASK")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "task 'mine': loading its data failed with FileNotFoundError" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["simulate"], 2, "no task is named"),
        (["simulate", "dgits"], 2, "did you mean 'digits'"),
        (["simulate", "nowhere:Task"], 2, "importing 'nowhere' failed"),
        (["simulate", "digits", "--quorum", "11"], 2, "round.quorum = 11 is above round.participants = 10"),
        (["simulate", "digits", "--rounds", "many"], 2, "stop.rounds = 'many' (--rounds)"),
        (["simulate", "digits", "--set", "train.lrr=1"], 2, "did you mean train.lr?"),
        (["simulate", "digits", "--config", "none.toml"], 2, "none.toml: cannot read"),
        (["simulate", "digits", "--resume"], 2, "--resume needs the run's directory"),
        (["simulate", "digits", "--resume", "--run-dir", "none"], 1, "no run to resume"),
        (["central", "digits", "--partition", "natural"], 2, "has no groups"),
        (["runs", "show", "none"], 1, "none: no such run"),
        (["runs", "show"], 1, "holds no runs"),
        (["evaluate", "none"], 1, "none: no such run"),
        (["export", "none", "out.npz"], 1, "none: no such run"),
    ],
)
def test_a_mistake_gets_one_line_and_an_exit_code(
    simulation: Simulation, args: list[str], code: int, message: str
) -> None:
    result = fluffle(*args)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.startswith("fluffle: error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TaskError("task 'x' raised"), 1, "fluffle: error: task 'x' raised\n"),
        (ExceptionGroup("group", [StateError("disk full")]), 1, "fluffle: error: disk full\n"),
        (KeyboardInterrupt(), 130, "fluffle: error: interrupted\n"),
    ],
)
def test_errors_while_running(simulation: Simulation, error: BaseException, code: int, message: str) -> None:
    simulation.error = error
    result = fluffle("simulate", "digits")
    assert (result.exit_code, result.stderr) == (code, message)


def test_a_surprise_is_not_hidden() -> None:
    known, surprise = ConfigError("known"), ValueError("surprise")
    assert first_known(ExceptionGroup("", [ExceptionGroup("", [known])])) is known
    assert first_known(ExceptionGroup("", [known, surprise])) is None
    assert first_known(surprise) is None


def test_debug_shows_where_it_came_from(simulation: Simulation) -> None:
    simulation.error = StateError("disk full")
    result = fluffle("--debug", "simulate", "digits")
    assert result.exception is simulation.error


def test_central_and_local_answer_with_json() -> None:
    central = json.loads(fluffle("central", "heart", "--rounds", "2", "--json", "-").stdout)
    local = json.loads(fluffle("local", "heart", "--rounds", "2", "--json", "-").stdout)
    assert len(central["history"]) == 2
    assert len(local["participants"]) == 4
    assert central["metrics"].keys() == local["metrics"].keys() == {"loss", "accuracy"}


def test_lists() -> None:
    assert "mnist-logreg" in fluffle("tasks").stdout
    assert "round.quorum: int = 0" in fluffle("settings").stdout
    assert "no runs in" in fluffle("runs", "list").stdout


def test_a_finished_run_is_listed_measured_used_and_exported(simulation: Simulation) -> None:
    assert fluffle("simulate", "digits", "--set", "run.id=my-run").exit_code == 0
    assert "my-run  digits  fedavg" in fluffle("runs", "list").stdout
    assert fluffle("runs", "show", "my-run").stdout == fluffle("runs", "show").stdout
    measured = json.loads(fluffle("evaluate", "my-run", "--json", "-").stdout)
    assert measured["metrics"].keys() == {"loss", "accuracy"}
    assert fluffle("export", "my-run", "model.npz").exit_code == 0
    with np.load("model.npz", allow_pickle=False) as arrays:
        assert len(arrays.files) == 4
    file = "runs/my-run/model.safetensors"
    assert fluffle("evaluate", file, "digits").stdout.startswith("accuracy")
    nameless = fluffle("evaluate", file)
    assert (nameless.exit_code, "add TASK" in nameless.stderr) == (2, True)


def test_predictions_are_csv(simulation: Simulation) -> None:
    assert fluffle("simulate", "digits", "--set", "run.id=my-run").exit_code == 0
    sample = fluffle("predict", "my-run", "--sample", "5").stdout.splitlines()
    assert sample[0] == "row,prediction,probability,truth"
    assert len(sample) == 6
    np.savez("inputs.npz", x=np.zeros((3, 64)))
    assert len(fluffle("predict", "my-run", "--input", "inputs.npz").stdout.splitlines()) == 4
    np.savez("wrong.npz", x=np.zeros((3, 63)))
    wrong = fluffle("predict", "my-run", "--input", "wrong.npz")
    assert (wrong.exit_code, "rows of shape (63,)" in wrong.stderr) == (1, True)
    other = fluffle("predict", "my-run", "mnist-logreg", "--sample", "1")
    assert (other.exit_code, "not one of task 'mnist-logreg'" in other.stderr) == (1, True)
    assert fluffle("predict", "my-run").exit_code == 2


def test_predictions_from_a_table_with_missing_values(simulation: Simulation) -> None:
    from workers.tasks.diabetes import DIABETES

    assert fluffle("simulate", "diabetes", "--set", "run.id=my-run").exit_code == 0
    columns = DIABETES.load().columns
    rows = [[*map(str, range(len(columns)))], ["", *["1"] * (len(columns) - 1)]]
    Path("in.csv").write_text("\n".join(",".join(cells) for cells in (columns, *rows)) + "\n")
    result = fluffle("predict", "my-run", "--input", "in.csv")
    assert result.stdout.splitlines()[0] == "row,prediction"
    assert result.exit_code == 0
    Path("in.csv").write_text("nonsense\n1\n")
    assert "is missing: the first line must name" in fluffle("predict", "my-run", "--input", "in.csv").stderr


def test_prediction_lines_without_rows() -> None:
    assert prediction_lines([], None) == "row,prediction\n"


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLUFFLE_")}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[0] = 'fluffle'\n"
        "import fluffle.cli\n"
        "try:\n    fluffle.cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'matplotlib', 'numpy', 'pydantic', 'sklearn'} & set(sys.modules)))"
    )
    for args in (["--help"], ["simulate", "--help"]):
        assert run_python(code, *args).stdout.splitlines()[-1] == "[]"


def test_the_entry_point_as_a_process() -> None:
    done = run_python("from fluffle.cli import main; main()", "runs", "show", "none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fluffle: error: none: no such run")
    assert "Traceback" not in done.stderr
