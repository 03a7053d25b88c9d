"""Where a run is kept, and how a run or a model is found by what somebody typed."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from broker import tensors
from broker.durable import replace_file
from broker.errors import BadMessage, StateError
from broker.mapped import read_mapped
from fluffle.config import RUNS, Config, load_config, taken_on_trust
from fluffle.layers import from_toml, to_toml


@dataclass(frozen=True, slots=True)
class RunDir:
    """The directory of one run, and the names of what lies in it."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "run.toml"

    @property
    def history_file(self) -> Path:
        return self.path / "history.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model_file(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def best_file(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def curve_file(self) -> Path:
        return self.path / "curve.png"

    @property
    def confusion_file(self) -> Path:
        return self.path / "confusion.png"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    def artefacts(self) -> dict[str, Path]:
        """What is worth showing to people, by name."""
        return {
            "model": self.model_file,
            "best": self.best_file,
            "curve": self.curve_file,
            "confusion": self.confusion_file,
            "result": self.result_file,
            "history": self.history_file,
            "settings": self.config_file,
        }

    def config(self) -> Config:
        """The configuration that the run had. Raises StateError if this is no run."""
        if not self.config_file.is_file():
            raise StateError(f"{self.path}: not a run directory, there is no run.toml in it")
        layer = from_toml(self.config_file)
        return load_config(layer, defaults=taken_on_trust(layer))

    def result(self) -> dict[str, Any]:
        """What the finished run came to. Raises StateError if the file is damaged."""
        return read_result(self.result_file)

    def begin(self, config: Config, *, resume: bool) -> None:
        """Makes the directory and keeps the configuration in it. Raises StateError.

        A directory with a run in it is only used again to resume; to resume there must be one.
        """
        if resume and not self.config_file.is_file():
            raise StateError(f"{self.path}: no run to resume: check --run-dir, or leave --resume out")
        if not resume and (self.config_file.exists() or self.history_file.exists()):
            raise StateError(f"{self.path}: already holds a run: add --resume, or choose another --run-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config_file.write_text(to_toml(config), "utf-8")
        except OSError as error:
            raise StateError(
                f"{self.path}: cannot be used as the run directory ({error.strerror or error}): "
                "choose another --run-dir"
            ) from None

    def keep(self, config: Config) -> None:
        """Keeps the configuration in the directory, which may hold the same run already. Raises StateError."""
        if self.config_file.is_file() and (run_id := self.config().run.id) != config.run.id:
            raise StateError(f"{self.path}: holds run {run_id!r}, not {config.run.id!r}: choose another --run-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            beside = self.path / f"run.toml.{os.getpid()}.new"  # a standby may use the same directory
            replace_file(self.config_file, to_toml(config).encode(), beside)
        except OSError as error:
            raise StateError(
                f"{self.path}: cannot be used as the run directory ({error.strerror or error}): "
                "choose another --run-dir"
            ) from None


def read_result(path: Path) -> dict[str, Any]:
    """A file as `--json` writes it. Raises StateError if it is damaged."""
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: cannot be read: {error}") from None
    return result


def all_runs(root: Path) -> Iterator[RunDir]:
    """Every run below a directory, in the order of their names."""
    return (RunDir(path.parent) for path in sorted(root.glob("*/run.toml")))


def find_run(name: str, root: Path = Path(RUNS)) -> RunDir:
    """A run by its directory, or by its name below `root`. Raises StateError that names the near one."""
    for path in (Path(name), root / name):
        if RunDir(path).config_file.is_file():
            return RunDir(path)
    names = [run.path.name for run in all_runs(root)]
    close = difflib.get_close_matches(name, names, 1, 0.3)
    hint = f"did you mean {close[0]}?" if close else f"{root}/ holds {len(names)} runs (`fluffle runs list`)"
    raise StateError(f"{name}: no such run: {hint}")


def find_result(name: str, root: Path = Path(RUNS)) -> dict[str, Any]:
    """What a run came to, by its directory, its name, or a file that `--json` wrote. Raises StateError."""
    path = Path(name)
    if not path.is_file():
        run = find_run(name, root)
        if not run.result_file.is_file():
            raise StateError(f"{run.path}: the run has no result.json yet: let it finish, or go on with --resume")
        return run.result()
    found = read_result(path)
    if not isinstance(found, dict) or not {"task", "strategy", "rounds", "metrics", "wall_s"} <= found.keys():
        raise StateError(f"{path}: not the result of one run: name a run's directory, or a file that --json wrote")
    return found


def find_model(name: str, root: Path = Path(RUNS)) -> tuple[Path, RunDir | None]:
    """A model's file, and the run that it belongs to if `name` names a run. Raises StateError."""
    path = Path(name)
    if path.is_file():
        return path, None
    run = find_run(name, root)
    if not run.model_file.is_file():
        raise StateError(f"{run.path}: the run has no model.safetensors yet: let it finish, or name a checkpoint")
    return run.model_file, run


def newest_run(root: Path = Path(RUNS)) -> RunDir:
    """The run that was begun last. Raises StateError if there is none."""
    found = max(all_runs(root), key=lambda run: run.config_file.stat().st_mtime, default=None)
    if found is None:
        raise StateError(f"{root}/: holds no runs: try `fluffle simulate digits`, or name a run's directory")
    return found


def export_model(model: Path, out: Path, file_format: str) -> None:
    """Copies a model file as `safetensors`, or writes its arrays as `npz`. Raises StateError."""
    try:
        if file_format == "npz":
            arrays: dict[str, Any] = dict(tensors.decode(read_mapped(model)))
            with out.open("wb") as file:  # given a name, NumPy would add an ending to it
                np.savez(file, **arrays)
        else:
            shutil.copyfile(model, out)
    except (OSError, BadMessage) as error:
        raise StateError(f"{out}: {model} cannot be exported: {error}") from None
