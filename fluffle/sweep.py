"""A sweep: the file that describes a grid of runs, and the cells of that grid.

A file has settings that all cells share (`[base]`, as in a run's file), axes, seeds, and what to report. An axis is
a setting with a list of values (`[grid]`), or a name with variants, each of which sets what it likes
(`[variants.NAME]`). Every combination is a cell for every seed, but those that `[[skip]]` names.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from broker.errors import ConfigError
from broker.messages import Part, Scalar
from fluffle.config import Config, Defaults, Given, Layer, load_config, near, slug
from fluffle.layers import flat, scalar_text

COMMAND = "command"  # of a cell; stands among its settings, and is none
COMMANDS = ("simulate", "central", "local")
ELSEWHERE = {"run.seed": "write seeds = [1, 2]", "run.id": "cells name themselves", "run.dir": "use --dir DIR"}
NO_DIFFERENCE: dict[
    str, Any
] = {  # settings that change where a cell runs or what it tells meanwhile, and nothing that it finds
    "run": {"id", "dir"},
    "broker": {"secrets"},
    "http": True,
    "process": True,
    "site": True,
}

Place = Mapping[str, str]  # the label of each axis
Against = Literal["rounds", "updates", "seconds"]


class Report(Part):
    """What to tell. `columns` and `panels` name axes: of the table, and of the picture."""

    metric: str = ""
    targets: Annotated[list[float], Field(max_length=16)] = []
    to: list[Against] = ["rounds"]  # what is counted until a target is reached
    costs: list[Literal["rounds", "updates", "up", "down", "seconds"]] = []  # of whole runs
    against: Against = "rounds"  # the picture's horizontal axis
    columns: str = ""
    panels: str = ""


class SweepFile(Part):
    """A sweep as it is written. The settings in it are checked cell by cell."""

    title: str = ""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [42]
    base: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    variants: dict[str, dict[str, dict[str, Any]]] = {}
    skip: list[dict[str, Any]] = []
    report: Report = Report()


@dataclass(frozen=True, slots=True)
class Axis:
    """What varies: for each label, the settings that it stands for."""

    name: str
    layers: Mapping[str, Layer]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep. `digest` is that of all that its result depends on."""

    place: Place
    seed: int
    command: str
    config: Config
    digest: str

    @property
    def name(self) -> str:
        return ", ".join([*(f"{axis} {label}" for axis, label in self.place.items()), f"seed {self.seed}"])


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that can be run. `document` is the file as it was written."""

    name: str
    title: str
    document: Mapping[str, Any]
    report: Report
    cells: tuple[Cell, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.cells[0].place)


def load_sweep(path: Path, *over: Layer, defaults: Defaults = lambda _: {}) -> Sweep:
    """A sweep from its file; the layers `over` win over its base, and its axes over those.

    Every cell's settings are checked. `defaults` gives a task's own. Raises ConfigError.
    """
    document = _read(path)
    file = _checked(document, path)
    base = {name: given for layer in (_layer(file.base, f"{path}, base"), *over) for name, given in layer.items()}
    axes = [*_grid(file, path), *_variants(file, path)]
    skipped = [{axis: scalar_text(label) for axis, label in one.items()} for one in file.skip]
    _check_places(file, axes, skipped, path)
    cells = tuple(
        _cell(path, place, seed, _over(base, axes, place), defaults)
        for place in _places(axes, skipped)
        for seed in dict.fromkeys(file.seeds)
    )
    _check_cells(cells, path)
    return Sweep(path.stem, file.title or path.stem, document, file.report, cells)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the sweep: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _checked(document: Mapping[str, Any], path: Path) -> SweepFile:
    for where, given, model in (("", document, SweepFile), ("report.", document.get("report", {}), Report)):
        known = list(model.model_fields)
        if unknown := next((key for key in given if key not in known), None):
            hint = near(unknown, known) if near(unknown, known).startswith(": did") else f": use {', '.join(known)}"
            raise ConfigError(f"{path}: a sweep has no {where}{unknown}{hint}")
    try:
        return SweepFile.model_validate(document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{path}: {name}: {fault['msg'][:1].lower()}{fault['msg'][1:]}") from None


def _layer(tables: Mapping[str, Any], origin: str) -> Layer:
    layer = {name: Given(value, origin) for name, value in flat(tables)}
    for name in layer:
        if name in ELSEWHERE:
            raise ConfigError(f"{origin}: {name} cannot be set in a sweep: {ELSEWHERE[name]}")
    return layer


def _grid(file: SweepFile, path: Path) -> Iterator[Axis]:
    for name, values in flat(file.grid):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}, grid: {name} = {values!r}: write a list of values, as [1, 2]")
        yield Axis(name, {scalar_text(value): _layer({name: value}, f"{path}, grid") for value in values})


def _variants(file: SweepFile, path: Path) -> Iterator[Axis]:
    for name, variants in file.variants.items():
        where = f"{path}, variants.{name}"
        yield Axis(name, {label: _layer(tables, f"{where}.{label}") for label, tables in variants.items()})


def _check_places(file: SweepFile, axes: Sequence[Axis], skipped: Sequence[Place], path: Path) -> None:
    """Refuses axes and labels that there are not."""
    known = {axis.name: list(axis.layers) for axis in axes}
    for what, name in (("columns", file.report.columns), ("panels", file.report.panels)):
        if name and name not in known:
            raise ConfigError(
                f"{path}: report.{what} = {name!r} is no axis: there are {', '.join(known) or 'none'}"
            )
    for place in skipped:
        for name, label in place.items():
            if label not in known.get(name, ()):
                there_are = ", ".join(known.get(name, known)) or "none"
                raise ConfigError(f"{path}: skip: there is no {name} {label}: there are {there_are}")


def _check_cells(cells: Sequence[Cell], path: Path) -> None:
    if not cells:
        raise ConfigError(f"{path}: no cell is left: skip fewer, or give each axis a label")
    by_digest: dict[str, Cell] = {}
    for cell in cells:
        other = by_digest.setdefault(cell.digest, cell)
        if other is not cell:
            raise ConfigError(f"{path}: {cell.name} is the same run as {other.name}: leave one of them out")


def _places(axes: Sequence[Axis], skipped: Sequence[Place]) -> Iterator[Place]:
    for labels in product(*(axis.layers for axis in axes)):
        place = {axis.name: label for axis, label in zip(axes, labels, strict=True)}
        if not any(one.items() <= place.items() for one in skipped):
            yield place


def _over(base: Layer, axes: Sequence[Axis], place: Place) -> Layer:
    """The settings of a place; of two axes that set the same, the later one wins."""
    return base | {name: given for axis in axes for name, given in axis.layers[place[axis.name]].items()}


def _cell(path: Path, place: Place, seed: int, layer: Layer, defaults: Defaults) -> Cell:
    command = _command(layer.get(COMMAND, Given(COMMANDS[0], "")))
    settings = {name: given for name, given in layer.items() if name != COMMAND}
    config = load_config(settings, {"run.seed": Given(seed, f"{path}, seeds")}, defaults=defaults)
    digest = digest_of(command, config)
    run_id = f"{slug(path.stem)[:30].strip('-')}-{digest[:8]}-{secrets.token_hex(4)}"
    named = config.model_copy(update={"run": config.run.model_copy(update={"id": run_id, "dir": ""})})
    return Cell(place, seed, command, named, digest)


def _command(given: Given) -> str:
    if given.value not in COMMANDS:
        raise ConfigError(f"{given.origin}: {COMMAND} = {given.value!r}: use one of {', '.join(COMMANDS)}")
    return str(given.value)


def digest_of(command: str, config: Config) -> str:
    """The same for the same run, whatever settings were added to the project since: defaults do not count."""
    values = config.model_dump(exclude_defaults=True, exclude=NO_DIFFERENCE)
    told: dict[str, Scalar | dict[str, Any]] = {"command": command, **{key: v for key, v in values.items() if v}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
