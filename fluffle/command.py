"""What every command is made of: errors in one line, the options of a configuration, where results go."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from broker.errors import ConfigError, FluffleError, StateError, first_known
from fluffle.flags import Flag

if TYPE_CHECKING:
    from fluffle.config import Config, Layer
    from fluffle.logs import Format, Level
    from fluffle.sweep import Sweep


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


class Stopped(Failure):
    """A supervisor asked to stop before the work was done."""

    exit_code = 143  # 128 + SIGTERM


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
    """What the command line says about a configuration. `flags` are by setting, TASK among them."""

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
        task = self.flags.get("task")
        if resume and task and (begun := layers[0]["task"].value) != task:
            raise ConfigError(f"{files[0]}: the run to resume learns {begun}, not {task}: leave TASK out")
        flags = from_flags(self.flags, self.sets)
        return load_config(*layers, from_environment(os.environ), flags, defaults=task_defaults)

    def run_config(self) -> Config:
        """The configuration of a run that others can take over; its id is the file's name, if none is set."""
        from fluffle.config import from_values, load_config, slug
        from fluffle.jobs import run_defaults

        name = self.config_file.stem if self.config_file else ""
        layers = (from_values({"run.id": slug(name)[:60]}, "the file's name"), *self._layers())
        return load_config(*layers, defaults=run_defaults(*layers))

    def sweep(self) -> Sweep:
        """The sweep in the file; environment and flags win over its base. Raises ConfigError."""
        from fluffle.layers import from_environment, from_flags
        from fluffle.learning import task_defaults
        from fluffle.sweep import load_sweep

        assert self.config_file
        over = (from_environment(os.environ), from_flags(self.flags, self.sets))
        return load_sweep(self.config_file, *over, defaults=functools.cache(task_defaults))

    def site_config(self) -> Config:
        """The configuration of who runs nothing itself: a worker, or somebody who looks after a broker."""
        from fluffle.config import load_site

        return load_site(*self._layers())

    def _layers(self) -> tuple[Layer, ...]:
        from fluffle.layers import from_environment, from_flags, from_toml

        file = (from_toml(self.config_file),) if self.config_file else ()
        return (*file, from_environment(os.environ), from_flags(self.flags, self.sets))

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


def configurable(*flags: Flag, given: Sequence[Any] | None = None) -> Callable[[Callable[..., None]], Any]:
    """Gives a command the short flags and the options that every configuration has, as one `Asked`.

    `given` are those that say what it is about: TASK and a file of settings, unless it wants others.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(
            config_file: Path | None,
            sets: tuple[str, ...],
            log_level: Level,
            log_format: Format | None,
            **rest: Any,
        ) -> None:
            names = {_parameter(flag): flag.setting for flag in flags} | {"task": "task"}
            chosen = {setting: rest.pop(name) for name, setting in names.items() if name in rest}
            command(Asked(config_file, sets, chosen, log_level, log_format), **rest)

        about = (TASK, CONFIG_FILE) if given is None else given
        options = [*about, *(_option(flag) for flag in flags), *CONFIG_OPTIONS]
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), run)

    return decorate


def _parameter(flag: Flag) -> str:
    return flag.setting.replace(".", "_")


def _option(flag: Flag) -> Any:
    if not flag.metavar:
        switch = f"{flag.option}/--no-{flag.option[2:]}"
        return click.option(switch, _parameter(flag), default=None, callback=_as_text, help=flag.help)
    return click.option(flag.option, _parameter(flag), metavar=flag.metavar, help=flag.help)


def _as_text(_: click.Context, __: click.Parameter, on: bool | None) -> str | None:  # noqa: FBT001 - a flag
    return None if on is None else str(on).lower()


TASK = click.argument("task", required=False)
CONFIG_FILE = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Settings from a TOML file; environment and flags win over it.",
)
RUN_FILE = click.argument(
    "config_file", metavar="RUN.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
SWEEP_FILE = click.argument("config_file", metavar="SWEEP.toml", type=click.Path(dir_okay=False, path_type=Path))
CONFIG_OPTIONS: list[Any] = [
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any setting, as train.lr=0.1; repeatable. See `fluffle settings`.",
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


def check_target(json_target: str | None) -> None:
    """Fails before the work and not after it. Raises ConfigError."""
    if json_target not in (None, "-") and not Path(json_target).absolute().parent.is_dir():
        raise ConfigError(f"--json {json_target}: there is no such directory")


def indented(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, allow_nan=False)


def emit(
    result: Mapping[str, Any],
    text: str,
    json_target: str | None,
    dump: Callable[[Mapping[str, Any]], str] = indented,
) -> None:
    """Words to stdout, JSON to its target; with JSON on stdout the words go to stderr."""
    click.echo(text, nl=False, err=json_target == "-")
    if json_target is None:
        return
    line = dump(result) + "\n"
    if json_target == "-":
        click.echo(line, nl=False)
        return
    try:
        Path(json_target).write_text(line, "utf-8")
    except OSError as error:
        raise ConfigError(f"--json {json_target}: cannot be written: {error.strerror or error}") from None
