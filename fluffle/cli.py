"""The command `fluffle`. Every command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from broker.errors import ConfigError, FluffleError, StateError, first_known
from fluffle.broker_commands import broker_group
from fluffle.flags import COMMON_FLAGS, FEDERATION_FLAGS, Flag

if TYPE_CHECKING:
    from fluffle.config import Config
    from fluffle.learning import Prediction
    from fluffle.logs import Format, Level
    from workers.task import Arrays
    from workers.torch_task import TaskDefinition

RUNS = Path("runs")


class Failure(click.ClickException):
    """One line on stderr instead of a traceback."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"fluffle: error: {self.message}", file=file or sys.stderr)


class Misuse(Failure):
    """Something on the command line, in the environment or in a file cannot work."""

    exit_code = 2


class Interrupted(Failure):
    """Somebody pressed Ctrl-C."""

    exit_code = 130  # 128 + SIGINT, as shells have it


class Cli(click.Group):
    """Turns errors that Fluffle raises on purpose into one line and an exit code, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except (FluffleError, ExceptionGroup) as error:
            known = first_known(error)
            if known is None or ctx.params["debug"]:
                raise
            raise (Misuse if isinstance(known, ConfigError) else Failure)(str(known)) from None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says about a run's configuration."""

    task: str | None
    config_file: Path | None
    sets: tuple[str, ...]
    flags: Mapping[str, str | None]
    log_level: Level
    log_format: Format | None

    def config(self, *, resume: bool = False) -> Config:
        """The configuration of all layers. Raises ConfigError; StateError if there is nothing to resume."""
        from fluffle.config import load_config
        from fluffle.layers import from_environment, from_flags, from_toml
        from fluffle.learning import task_defaults

        files = [self._resumed_file()] if resume else []
        files += [self.config_file] if self.config_file else []
        layers = [from_toml(file) for file in files]
        if resume and self.task and (begun := layers[0]["task"].value) != self.task:
            raise ConfigError(f"{files[0]}: the run to resume learns {begun}, not {self.task}: leave TASK out")
        flags = from_flags({"task": self.task, **self.flags}, self.sets)
        return load_config(*layers, from_environment(os.environ), flags, defaults=task_defaults)

    def _resumed_file(self) -> Path:
        directory = self.flags.get("run.dir")
        if directory is None:
            raise ConfigError("--resume needs the run's directory: add --run-dir DIR")
        file = Path(directory) / "run.toml"
        if not file.is_file():
            raise StateError(f"{directory}: no run to resume: check --run-dir, or leave --resume out")
        return file

    def configure_logs(self, *, quiet: bool = False) -> None:
        from fluffle.logs import configure_logs

        level = "warning" if quiet and self.log_level == "info" else self.log_level
        configure_logs(level, self.log_format or "text")


def configurable(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command TASK, the short flags and the options that every configuration has, as one `Asked`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(
            task: str | None,
            config_file: Path | None,
            sets: tuple[str, ...],
            log_level: Level,
            log_format: Format | None,
            **rest: Any,
        ) -> None:
            chosen = {flag.setting: rest.pop(_parameter(flag)) for flag in flags}
            command(Asked(task, config_file, sets, chosen, log_level, log_format), **rest)

        options = [_option(flag) for flag in flags] + CONFIG_OPTIONS
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), run)

    return decorate


def _parameter(flag: Flag) -> str:
    return flag.setting.replace(".", "_")


def _option(flag: Flag) -> Any:
    return click.option(flag.option, _parameter(flag), metavar=flag.metavar, help=flag.help)


CONFIG_OPTIONS: list[Any] = [
    click.argument("task", required=False),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any setting, as train.lr=0.1; repeatable. See `fluffle settings`.",
    ),
    click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Settings from a TOML file; environment and flags win over it.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="Least important events to log.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        help="Log lines to stderr in this format, also on a terminal (instead of the live table).",
    ),
]
json_option = click.option(
    "--json", "json_target", metavar="FILE|-", help="Write the result as one JSON object; `-` is stdout."
)
run_argument = click.argument("run", metavar="RUN", required=False)
model_argument = click.argument("model", metavar="RUN_OR_FILE")
task_argument = click.argument("task", required=False)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fluffle")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def cli(debug: bool) -> None:  # noqa: ARG001, FBT001 - read by Cli.invoke
    """Federated learning as an asynchronous message-queue pipeline over RabbitMQ.

    Try: fluffle simulate mnist-logreg --participants 10 --rounds 5
    """
    from fluffle.logs import configure_logs

    configure_logs("warning")


@cli.command()
@configurable(*COMMON_FLAGS, *FEDERATION_FLAGS)
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, with its settings.")
@json_option
def simulate(asked: Asked, resume: bool, json_target: str | None) -> None:  # noqa: FBT001 - a flag
    """Train TASK with aggregator and participants in this process.

    TASK is a shipped one (see `fluffle tasks`) or package.module:Object.
    """
    from fluffle.display import make_display
    from fluffle.finish import finish
    from fluffle.rundir import RunDir
    from fluffle.simulation import plan_simulation, run_simulation
    from fluffle.text import summary

    check_target(json_target)
    config = asked.config(resume=resume)
    plan = plan_simulation(config)
    run = RunDir(config.run_dir)
    run.begin(config, resume=resume)
    display = make_display(f"{config.task} · {config.run.id}", config.stop.rounds, lines=bool(asked.log_format))
    asked.configure_logs(quiet=display.live)
    with display:
        outcome = asyncio.run(run_simulation(plan, display))
    result = finish(run, config, outcome.record, outcome.wall_s)
    emit(result, summary(result, run), json_target)


@cli.command()
@configurable(*COMMON_FLAGS)
@json_option
def central(asked: Asked, json_target: str | None) -> None:
    """Train TASK on pooled data: what federation costs.

    One model on everybody's data together, the same recipe and the same held-out examples.
    """
    baseline(asked, json_target, alone=False)


@cli.command()
@configurable(*COMMON_FLAGS)
@json_option
def local(asked: Asked, json_target: str | None) -> None:
    """Train TASK at each participant alone: what federation gains.

    One model per participant, the same recipe and the same held-out examples.
    """
    baseline(asked, json_target, alone=True)


def baseline(asked: Asked, json_target: str | None, *, alone: bool) -> None:
    from fluffle.baselines import BaselineSettings, train_central, train_local
    from fluffle.display import progress_bar
    from fluffle.learning import shares_of
    from fluffle.results import central_result, local_result
    from fluffle.text import baseline_summary
    from workers.modules import use_one_thread
    from workers.tasks import find_task

    check_target(json_target)
    asked.configure_logs()
    use_one_thread()
    config = asked.config()
    definition = find_task(config.task)
    shares = shares_of(config, definition)
    job = (definition, shares, BaselineSettings(config.stop.rounds, config.run.seed, config.train.chosen()))
    began = time.perf_counter()
    with progress_bar(config.task, config.stop.rounds * (len(shares.shards) if alone else 1)) as advance:
        if alone:
            result = local_result(config, train_local(*job, advance))
        else:
            result = central_result(config, train_central(*job, advance))
    result["wall_s"] = time.perf_counter() - began
    emit(result, baseline_summary(result), json_target)


@cli.command()
def tasks() -> None:
    """List the learning tasks that are shipped."""
    from fluffle.text import columns
    from workers.tasks import CATALOGUE

    rows = [(name, entry.summary) for name, entry in CATALOGUE.items()]
    click.echo(columns([("TASK", "WHAT IT LEARNS"), *rows]), nl=False)
    click.echo("\nYour own: package.module:OBJECT, a TaskDefinition.")


@cli.command()
def settings() -> None:
    """List every setting there is.

    With its type, default, meaning, short flag and environment variable. In TOML, the part before the dot is the
    section. Later ones win: defaults, the task's own, TOML, environment, flags.
    """
    from fluffle.config import settings as all_settings

    for setting in all_settings():
        default = "" if setting.default in (None, "") else f" = {setting.default}"
        ways = "  ".join(filter(None, (setting.flag, setting.env)))
        click.echo(f"{setting.name}: {setting.type}{default}\n    {setting.description}\n    {ways}")
    click.echo("\nA task may know further train.* settings.")


@cli.group()
def runs() -> None:
    """Look at runs that are or were kept under runs/."""


@runs.command("list")
@click.option(
    "--dir", "root", type=click.Path(path_type=Path), default=RUNS, show_default=True, help="Where to look."
)
def list_runs(root: Path) -> None:
    """List runs with their state and result."""
    from fluffle.rundir import all_runs
    from fluffle.text import columns, run_row

    rows = [run_row(run) for run in all_runs(root)]
    head = ("RUN", "TASK", "STRATEGY", "ROUNDS", "RESULT", "STATE")
    click.echo(columns([head, *rows]) if rows else f"no runs in {root}/: try `fluffle simulate digits`\n", nl=False)


@runs.command("show")
@run_argument
def show_run(run: str | None) -> None:
    """Show one run, the newest if none is named: its rounds, the fate of its updates, its files."""
    from fluffle.rundir import find_run, newest_run
    from fluffle.text import run_page

    click.echo(run_page(find_run(run) if run else newest_run(RUNS)), nl=False)


@cli.command()
@model_argument
@task_argument
@json_option
def evaluate(model: str, task: str | None, json_target: str | None) -> None:
    """Measure a model on its task's held-out data. A file that is no run's needs TASK."""
    from fluffle import learning
    from fluffle.text import metrics_text

    check_target(json_target)
    arrays, definition = open_model(model, task)
    outcome = learning.evaluate(definition, arrays)
    text = f"{metrics_text(outcome.metrics)} on {outcome.num_examples} held-out examples\n"
    result = {"task": definition.name, "metrics": outcome.metrics, "num_examples": outcome.num_examples}
    emit(result, text, json_target)


@cli.command()
@model_argument
@task_argument
@click.option(
    "--input",
    "input_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Rows to predict: .csv with the data's columns, or .npz with an array `x`.",
)
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Predict N held-out examples instead.")
def predict(model: str, task: str | None, input_file: Path | None, sample: int | None) -> None:
    """Predict with a model; CSV on stdout, one line per row."""
    from fluffle import learning

    if (input_file is None) == (sample is None):
        raise click.UsageError("give either --input FILE or --sample N")
    arrays, definition = open_model(model, task)
    if input_file is not None:
        inputs, truth = learning.read_inputs(input_file, learning.load_data(definition)), None
    else:
        inputs = learning.held_out(definition, most=sample)
        truth = inputs.y.tolist()
    found = learning.predict(definition, arrays, inputs)
    click.echo(prediction_lines(found, truth), nl=False)
    if dropped := len(inputs) - len(found):
        click.echo(f"fluffle: {dropped} of {len(inputs)} rows were left out: a value is missing", err=True)


def prediction_lines(found: list[Prediction], truth: list[Any] | None) -> str:
    """CSV with a header; `truth` adds what is known of each row."""
    has_probability = any(prediction.probability is not None for prediction in found)
    head = ["row", "prediction", *(["probability"] if has_probability else []), *(["truth"] if truth else [])]
    lines = [",".join(head)]
    for prediction in found:
        cells = [str(prediction.row), f"{prediction.value:g}"]
        cells += [f"{prediction.probability:.4f}"] if prediction.probability is not None else []
        cells += [f"{truth[prediction.row]:g}"] if truth else []
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


@cli.command()
@model_argument
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "npz"]),
    help="What to write.  [default: by the ending of OUT, else safetensors]",
)
def export(model: str, out: Path, file_format: str | None) -> None:
    """Write a run's model to OUT, as safetensors or NumPy's npz."""
    from fluffle.rundir import export_model, find_model

    path, _ = find_model(model)
    chosen = file_format or ("npz" if out.suffix == ".npz" else "safetensors")
    export_model(path, out, chosen)
    click.echo(f"{out}: {out.stat().st_size} bytes of {chosen}")


@cli.group()
def data() -> None:
    """Get data sets."""


@data.command()
@click.argument("name", type=click.Choice(["mnist"]))
def fetch(name: str) -> None:  # noqa: ARG001 - the only one there is
    """Get the full data set (MNIST: 70,000 images); digests are checked. The tasks then use it."""
    from workers.data import fetch_mnist

    fetch_mnist(progress=lambda line: click.echo(line, err=True))


def open_model(model: str, task: str | None) -> tuple[Arrays, TaskDefinition]:
    """A model, and the task that it belongs to: the run's, or the one that was named."""
    from fluffle.learning import load_model
    from fluffle.rundir import find_model
    from workers.tasks import find_task

    path, run = find_model(model)
    name = task or (run.config().task if run else None)
    if name is None:
        raise ConfigError(f"{model}: a file does not tell its task: add TASK (`fluffle tasks` lists them)")
    return load_model(path), find_task(name)


def check_target(json_target: str | None) -> None:
    """Fails before the work and not after it. Raises ConfigError."""
    if json_target not in (None, "-") and not Path(json_target).absolute().parent.is_dir():
        raise ConfigError(f"--json {json_target}: there is no such directory")


def emit(result: Mapping[str, Any], text: str, json_target: str | None) -> None:
    """Words to stdout, JSON to its target; with JSON on stdout the words go to stderr."""
    click.echo(text, nl=False, err=json_target == "-")
    if json_target is None:
        return
    line = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if json_target == "-":
        click.echo(line, nl=False)
        return
    try:
        Path(json_target).write_text(line, "utf-8")
    except OSError as error:
        raise ConfigError(f"--json {json_target}: cannot be written: {error.strerror or error}") from None


cli.add_command(broker_group)


def main() -> None:
    """The entry point of the command. A user's own task is found in the current directory, too."""
    sys.path.insert(0, os.getcwd())
    cli(prog_name="fluffle")
