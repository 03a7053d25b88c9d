"""All of W1 to W6, one after another, and one table at the end.

    make bench
    python -m benchmarks --only payload --only memory

Each is a command of its own, so that the memory of one is not another's; each writes its numbers with versions and
date into `benchmarks/results`. W5 is its short form here: skewed digits and one seed (`python -m benchmarks.codecs`
does all). Nothing else should run meanwhile. Ends with 1 if an aim was missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.measure import RESULTS, Line, table
from fluffle.chaos.processes import ROOT

SUITE: dict[str, tuple[str, ...]] = {  # W1 to W6: the file of results, and the command
    "control_plane": ("control_plane",),
    "payload": ("payload",),
    "training": ("training",),
    "scale": ("scale",),
    "codecs_digits": ("codecs", "--task", "digits", "--partition", "dirichlet:0.5", "--seeds", "1"),
    "memory": ("memory",),
}
LONGEST_S = 900.0


def run(name: str, out: Path) -> list[Line]:
    """One benchmark in a process of its own; what it prints is shown as it comes."""
    module, *options = SUITE[name]
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=LONGEST_S)
    return [Line(**line) for line in json.loads(out.read_text())["lines"]]


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SUITE)), help="Only these.")
@click.option("--out", "directory", type=click.Path(file_okay=False, path_type=Path), default=RESULTS)
def main(only: tuple[str, ...], directory: Path) -> None:
    """Runs them, and prints what they measured beside their references and aims."""
    directory.mkdir(parents=True, exist_ok=True)
    began, lines = time.monotonic(), []
    for name in only or SUITE:
        click.echo(f"{name}:", err=True)
        lines += run(name, directory / f"{name}.json")
    click.echo(f"\n{table(lines)}\n\n{time.monotonic() - began:.0f} seconds")
    missed = [line for line in lines if line.met is False]
    for line in missed:
        click.echo(f"missed: {line.benchmark} {line.what}: {line.value:g} {line.unit}, aim {line.aim}", err=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
