"""The commands that a deployment runs: the aggregator, the worker, and what they need before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import click

from broker.errors import ConfigError
from fluffle.command import CONFIG_FILE, RUN_FILE, Asked, Stopped, check_target, configurable, emit, json_option
from fluffle.flags import AGGREGATOR_FLAGS, SITE_FLAGS


@click.command()
@configurable(*AGGREGATOR_FLAGS, given=(RUN_FILE,))
@click.option("--abandon", metavar="RUN_ID", default="", help="Give up the unfinished run of this name first.")
@click.option("--from-checkpoint", is_flag=True, help="If the broker lost the run, go on from the run directory.")
@click.option("--fresh", is_flag=True, help="If the broker lost the run, begin it again from the initial model.")
@json_option
def aggregator(asked: Asked, abandon: str, from_checkpoint: bool, fresh: bool, json_target: str | None) -> None:  # noqa: FBT001 - flags
    """Lead the run in RUN.toml, or stand by until whoever leads it is gone.

    Start it again after a crash and it goes on; start a second one and it is the standby. Ends with the run.
    """
    from fluffle.brokers import rabbit_broker
    from fluffle.display import make_display
    from fluffle.finish import finish
    from fluffle.jobs import run_job
    from fluffle.rundir import RunDir
    from fluffle.serve import serve, wall_s
    from fluffle.signals import Terminated
    from fluffle.stores import keepers_store
    from fluffle.text import summary

    asked.configure_logs()
    check_target(json_target)
    config = asked.run_config()
    if config.broker.url == "memory":
        raise ConfigError(
            "an aggregator needs a broker that others can reach: give --broker amqp://HOST, or broker.url"
        )
    broker, store = rabbit_broker(config.broker), keepers_store(config.store)
    job = replace(run_job(config), abandon=abandon, from_checkpoint=from_checkpoint, fresh=fresh)
    run = RunDir(config.run_dir)
    run.keep(config)
    display = make_display(f"{config.task} · {config.run.id}", config.stop.rounds, lines=bool(asked.log_format))
    asked.configure_logs(quiet=display.live)
    try:
        with display:
            record = asyncio.run(serve(config, job, broker, display, store))
    except Terminated:
        raise Stopped(
            f"run {config.run.id!r} was told to stop here (SIGTERM): start it again and it goes on"
        ) from None
    result = finish(run, config, record, wall_s(record))
    emit(result, summary(result, run), json_target)


@click.command()
@configurable(*SITE_FLAGS, given=(CONFIG_FILE,))
@click.option("--once", is_flag=True, help="Stop when a run that it saw is over, instead of waiting for the next.")
@click.option("--child", is_flag=True, help="Stop when standard input ends: for programs that start workers.")
def worker(asked: Asked, once: bool, child: bool) -> None:  # noqa: FBT001 - flags
    """Train for a participant, or for several, whenever the federation asks for it.

    Learns the run's task on this participant's share of its data, unless --task and --data name others. Waits for a
    broker that is not there, and remembers in its journal what it must not do twice.
    """
    from fluffle.brokers import rabbit_broker
    from fluffle.participate import Until, check_site, make_workers, opened_journals, participate
    from fluffle.transfers import watching

    asked.configure_logs()
    config = asked.site_config()
    assignments = check_site(config)
    broker = rabbit_broker(config.broker)
    with opened_journals(config) as journals, watching(lines=bool(asked.log_format)) as on_transfer:
        workers = make_workers(config, assignments, journals, broker, on_transfer)
        asyncio.run(participate(config, workers, Until(once, child)))


@click.command()
@click.argument("task")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def initial(task: str, out: Path) -> None:
    """Write the initial model of TASK to OUT, for an aggregator that has no torch (run.initial)."""
    from broker import tensors
    from broker.durable import replace_file
    from workers.tasks import find_task

    blob = tensors.encode(find_task(task).bind().initial())
    try:
        replace_file(out, blob, out.with_name(f"{out.name}.new"))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None
    click.echo(f"{out}: {len(blob)} bytes, the initial model of {task}")
