"""Models in several files: what transformers writes we read, and what we write it reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from broker.errors import ConfigError, StateError
from broker.tensors import Arrays, encode
from fluffle.cli import cli
from fluffle.shards import INDEX, WHOLE, load_model, size_of, write_shards


def model() -> Arrays:
    rng = np.random.default_rng(0)
    sides = {"embedding": (10, 4), "layer.0": (4, 4), "layer.1": (4, 4), "bias": (4,), "scale": ()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sides.items()}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("most_bytes", "shards"), [(1, 5), (80, 4), (130, 3), (160, 2), (10_000, 1)])
def test_what_is_cut_comes_back_whole(tmp_path: Path, most_bytes: int, shards: int) -> None:
    write_shards(model(), tmp_path, most_bytes)
    found = files(tmp_path)
    assert len(found) == (1 if shards == 1 else shards + 1)
    assert encode(load_model(tmp_path)) == encode(model())
    for name in (name for name in found if name.startswith("model-")):
        assert name.endswith(f"-of-{shards:05d}.safetensors")
        held = load_file(tmp_path / name)
        assert sum(array.nbytes for array in held.values()) <= most_bytes or len(held) == 1


def test_the_index_is_that_of_transformers(tmp_path: Path) -> None:
    write_shards(model(), tmp_path, 200)
    index = json.loads((tmp_path / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in model().values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], model()[name])
    assert encode(load_model(tmp_path / INDEX)) == encode(model())


def test_plain_transformers_reads_what_is_cut_and_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=50)
    written = transformers.GPT2Model(config)
    written.save_pretrained(tmp_path / "theirs", max_shard_size=5000)
    assert (tmp_path / "theirs" / INDEX).is_file()
    arrays = load_model(tmp_path / "theirs")
    for name, tensor in written.state_dict().items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())
    write_shards(arrays, tmp_path / "ours", 3000)
    config.save_pretrained(tmp_path / "ours")
    read = transformers.GPT2Model.from_pretrained(tmp_path / "ours")
    for name, tensor in written.state_dict().items():
        np.testing.assert_array_equal(read.state_dict()[name].numpy(), tensor.numpy())


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b'{"weight_map": {"bias": "../model.safetensors"}}',
        b'{"weight_map": {"bias": "/etc/passwd"}}',
        b'{"weight_map": {"bias": 1}}',
        b'{"weight_map": {"bias": "nowhere.safetensors"}}',
        b'{"weight_map": {"other": "model.safetensors"}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, index: bytes) -> None:
    (tmp_path / WHOLE).write_bytes(encode(model()))
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(StateError, match=rf"{INDEX}: not a readable"):
        load_model(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1KB", 1000)])
def test_sizes_in_words(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "2", "0GB", "-1GB", "2TB", "1.5GB", "9" * 20 + "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 2GB"):
        size_of(text)


def test_the_command_cuts_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(encode({"a": np.zeros(1000, np.float32), "b": np.ones(9, np.float32)}))
    line = ["export", str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--shard-size", "1KB"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX
    ]  # fmt: skip
    refused = CliRunner().invoke(cli, [*line, "--format", "npz"])
    assert refused.exit_code == 2
    assert "npz is never cut" in refused.output
