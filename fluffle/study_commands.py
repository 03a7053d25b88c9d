"""The commands for studies: a sweep over settings and seeds, and runs side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import structlog

from broker.errors import ConfigError, StateError
from fluffle.command import SWEEP_FILE, Asked, check_target, configurable, emit, json_option
from fluffle.flags import BROKER_FLAGS

if TYPE_CHECKING:
    from fluffle.pools import Submit
    from fluffle.sweep import Cell, Sweep
    from fluffle.sweep_results import Finished, SweepDir

log = structlog.get_logger(__name__)
picture_option = click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the comparison into this file (PNG)."
)


@dataclass(frozen=True, slots=True)
class Where:
    """Where cells run: on a cluster, or so many at a time here (None: one a core)."""

    jobs: int | None
    dask: str | None
    ray: str | None

    def pool(self, sweep: Sweep, kept: SweepDir) -> AbstractContextManager[Submit]:
        """Raises ConfigError for what cannot go together."""
        from fluffle.pools import on_dask, on_ray, on_this_machine, one_by_one

        named = [name for name in ("jobs", "dask", "ray") if getattr(self, name) is not None]
        if any(cell.config.broker.url != "memory" for cell in sweep.cells):
            if named and self.jobs != 1:
                raise ConfigError(
                    f"--{named[0]}: over a broker cells run one after another, for a federation is in one run at a "
                    "time: leave it out"
                )
            return one_by_one(kept.unfinished_file)
        if len(named) > 1:
            raise ConfigError(f"--{named[0]} and --{named[1]}: give one of them")
        if self.dask is not None:
            return on_dask(self.dask)
        return on_ray(self.ray) if self.ray is not None else on_this_machine(self.jobs or os.cpu_count() or 1)


@click.command()
@configurable(*BROKER_FLAGS, given=(SWEEP_FILE,))
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where results are kept, and finished cells are found again.  [default: runs/sweeps/NAME]",
)
@click.option("--jobs", type=click.IntRange(min=1), help="How many cells at a time.  [default: one a core]")
@click.option("--dask", metavar="ADDRESS", help="Run the cells on the Dask cluster with this scheduler.")
@click.option("--ray", metavar="ADDRESS", help="Run the cells on this Ray cluster; `auto` finds one.")
@picture_option
@json_option
def sweep(
    asked: Asked, directory: Path | None, picture: Path | None, json_target: str | None, **where: Any
) -> None:
    """Run every cell of the grid in SWEEP.toml, and compare them.

    A cell is a run of its own, in a process of its own. Finished cells are not run again, so a sweep that was
    killed goes on; a cell that fails is named, and the others go on.
    """
    from fluffle.sweep_results import SweepDir, draw, dumped, gathered, table_of, write_json
    from fluffle.text import columns

    asked.configure_logs()
    check_target(json_target)
    found = asked.sweep()
    kept = SweepDir(directory or Path("runs") / "sweeps" / found.name)
    pool = Where(**where).pool(found, kept)
    kept.begin()
    finished = run_sweep(found, kept, pool)
    told = gathered(found, finished)
    write_json(kept.results_file, dumped(told))
    for path in filter(None, (kept.curve_file, picture) if finished.results else ()):
        draw(told, path)
    head = f"{found.title}: {told['metric']}, {len(finished.results)} of {len(found.cells)} cells\n\n"
    emit(told, f"{head}{columns(table_of(told))}\nresults  {kept.results_file}\n", json_target, dumped)
    if finished.errors:
        raise StateError(failures(found, finished.errors))


def run_sweep(found: Sweep, kept: SweepDir, pool: AbstractContextManager[Submit]) -> Finished:
    """Runs what is not finished, and tells of each cell that ends."""
    from fluffle.display import progress_bar
    from fluffle.sweep_results import Finished, run_cells

    finished = Finished({cell.digest: result for cell in found.cells if (result := kept.kept(cell))})
    left = [cell for cell in found.cells if cell.digest not in finished.results]
    if finished.results:
        log.info("cells_found_finished", cells=len(finished.results), left=len(left))
    if left:
        with progress_bar(found.name, len(left)) as advance, pool as submit:
            for cell, outcome in run_cells(left, kept, submit):
                finished.add(cell, outcome)
                advance(cell)
                tell(cell, outcome.result, outcome.error)
    return finished


def tell(cell: Cell, result: Mapping[str, Any], error: str) -> None:
    if error:
        log.error("cell_failed", cell=cell.name, error=error)
    else:
        log.info("cell_finished", cell=cell.name, seconds=round(result["wall_s"], 1), **result["metrics"])


def failures(found: Sweep, errors: Mapping[str, str]) -> str:
    """All of them, one a line."""
    lines = [f"\n  {cell.name}: {errors[cell.digest]}" for cell in found.cells if cell.digest in errors]
    return f"{len(lines)} of {len(found.cells)} cells failed; the same command runs them again:{''.join(lines)}"


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--metric", default="", help="What to compare.  [default: the first that all of them measured]")
@picture_option
@json_option
def compare(runs: tuple[str, ...], metric: str, picture: Path | None, json_target: str | None) -> None:
    """Put runs into one table and one picture: federated, central and local ones.

    RUN is a run's directory, its name below runs/, or a file that --json wrote.
    """
    from fluffle.comparison import Group, common_metric, compared, line_of, runs_table
    from fluffle.curve import draw_lines, save_curve
    from fluffle.rundir import find_result
    from fluffle.text import columns

    check_target(json_target)
    groups = [Group({"run": name}, (find_result(name),)) for name in dict.fromkeys(runs)]
    chosen = common_metric([group.results[0] for group in groups], metric)
    if picture is not None:
        lines = [line for group in groups if (line := line_of(group, chosen)).points]
        save_curve(draw_lines({"": lines}, "", chosen), picture)
    emit(compared(groups, chosen), columns(runs_table(groups, chosen)), json_target)
