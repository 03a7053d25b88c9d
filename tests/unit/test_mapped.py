"""Bodies in mapped files: they take no memory, leave nothing behind, and become files without a copy."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.checkpoints import Checkpoints
from aggregator.settings import RoundSettings, StrategySettings
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from broker import durable, mapped, tensors
from broker.durable import replace_file
from broker.errors import StateError
from broker.mapped import Draft, draft, read_mapped
from broker.payloads import sha256_of
from broker.tensors import Arrays, blocks, decode, encode, give_back

MIB = 1 << 20
VALUES = 4 * MIB  # 16 MiB in float32


def anonymous_and_files_mib() -> tuple[float, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return kib["RssAnon"] / 1024, (kib["RssFile"] + kib["RssShmem"]) / 1024


def arrays(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((4, VALUES // 4), dtype=np.float32), "b": np.arange(3, dtype=np.float32)}


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def cannot(*_: object, **__: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.fixture(params=["a name for it", "a copy of it"])
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Not every file system can give a file a name afterwards."""
    if request.param == "a copy of it":
        monkeypatch.setattr(mapped.os, "link", cannot)
    return str(request.param)


def test_a_draft_becomes_the_file_that_it_is_stored_as(tmp_path: Path, names: str) -> None:
    blob = tensors.encode_in(lambda size: draft(tmp_path, size), arrays())
    assert files(tmp_path) == []
    inode = blob.obj and os.fstat(blob.obj._file).st_ino  # type: ignore[attr-defined]
    replace_file(tmp_path / "model", blob, tmp_path / "beside")
    assert files(tmp_path) == ["model"]
    assert (tmp_path / "model").read_bytes() == encode(arrays()) == blob
    assert ((tmp_path / "model").stat().st_ino == inode) == (names == "a name for it")
    assert (Draft.behind(blob) is None) == (names == "a name for it")


def test_files_have_the_permissions_that_others_get(tmp_path: Path) -> None:
    replace_file(tmp_path / "draft", draft(tmp_path, 10), tmp_path / "beside")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "draft").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_has_its_name_is_written_again_if_the_file_is_gone(tmp_path: Path) -> None:
    checkpoints, blob = Checkpoints(tmp_path), draft(tmp_path, 10)
    blob[:] = b"0123456789"
    checkpoints.store("a" * 64, blob)
    checkpoints.path("a" * 64).unlink()
    checkpoints.store("a" * 64, blob)
    assert checkpoints.path("a" * 64).read_bytes() == b"0123456789"


def test_a_draft_takes_the_place_of_what_may_be_damaged(tmp_path: Path) -> None:
    checkpoints, blob = Checkpoints(tmp_path), draft(tmp_path, 10)
    blob[:] = b"0123456789"
    checkpoints.path("a" * 64).write_bytes(b"012345678X")
    checkpoints.store("a" * 64, blob)
    assert checkpoints.path("a" * 64).read_bytes() == b"0123456789"


def test_a_disk_that_fills_while_a_draft_is_stored_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    blob = checkpoints.draft(MIB)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StateError, match=r"No space left on device.*free space"):
        checkpoints.store("a" * 64, blob)
    assert files(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=f"no room for a body of {1 << 60} bytes.*free some"):
        Checkpoints(tmp_path).draft(1 << 60)
    assert files(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from aggregator.checkpoints import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
blob = checkpoints.draft(8 << 20)
blob[: 4 << 20] = bytes(range(256)) * (16 << 10)
print("half", flush=True)
sys.stdin.read()
"""


def test_a_writer_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    line = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
    assert files(tmp_path) == []


def test_a_model_that_is_read_from_its_file_is_what_was_stored(tmp_path: Path) -> None:
    checkpoints, blob = Checkpoints(tmp_path), encode(arrays())
    sha256 = hashlib.sha256(blob).hexdigest()
    checkpoints.store(sha256, blob)
    found = checkpoints.load(sha256)
    assert found == blob
    assert found is not None
    assert found.readonly
    checkpoints.prune()
    checkpoints.path(sha256).unlink()
    assert found == blob, "whoever reads it need not care that it is gone"


def test_a_checkpoint_without_bytes_is_damaged(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path("a" * 64).write_bytes(b"")
    assert checkpoints.load("a" * 64) is None
    assert files(tmp_path) == [f"{'a' * 64}.safetensors.damaged"]


# -- giving back ------------------------------------------------------------------------------------------------


def test_what_is_given_back_is_only_read_again(tmp_path: Path) -> None:
    whole = np.frombuffer(draft(tmp_path, 4 * VALUES), np.float32)
    whole[:] = 1
    part = whole[MIB + 1 : 2 * MIB + 7]
    part[:] = 2
    give_back(part)
    give_back(memoryview(whole)[: MIB // 2])
    assert part.sum() == 2 * part.size
    assert whole.sum() == whole.size + part.size


@pytest.mark.parametrize("size", [0, 1, 17])
def test_what_lies_in_memory_is_nothing_to_give_back(size: int) -> None:
    for view in (np.zeros(size), np.zeros(size)[:1], bytes(size), bytearray(size), memoryview(bytes(size))):
        give_back(view)
        assert not tensors.is_mapped(view)


@pytest.mark.parametrize("size", [0, 1, tensors.BLOCK, tensors.BLOCK + 1, 70 * tensors.BLOCK + 3])
def test_blocks_cover_everything_once(size: int) -> None:
    seen = np.zeros(size, np.int8)
    for part in blocks(seen, np.zeros(size)):
        assert seen[part].size <= tensors.BLOCK
        seen[part] += 1
    assert seen.tolist() == [1] * size


def read_all(flat: NDArray[np.float32]) -> float:
    return sum(float(flat[part].sum()) for part in blocks(flat))


def test_a_round_of_a_large_model_holds_the_sum_and_little_else(tmp_path: Path) -> None:
    """Model, update and new model lie in files; 48 MiB, of which a stretch of blocks each may be held."""
    room = Checkpoints(tmp_path).draft
    model, update = (decode(tensors.encode_in(room, arrays(seed))) for seed in (1, 2))
    strategy = make_strategy(StrategySettings(), RoundSettings(participants=2))
    strategy.start(model, {})
    for values in strategy._sum._sums.values():  # type: ignore[attr-defined]
        values[:] = 0  # 32 MiB, which are not what is measured
    anonymous, of_files = anonymous_and_files_mib()
    strategy.add(update, Contribution(10, "p01"))
    blob = tensors.blank(model, room)
    moved = strategy.finish(decode(blob, writable=True))
    sha256_of(blob)
    after_anonymous, after_files = anonymous_and_files_mib()
    assert after_anonymous - anonymous < 4
    assert after_files - of_files < 2
    in_memory = make_strategy(StrategySettings(), RoundSettings(participants=2))
    in_memory.start(arrays(1), {})
    in_memory.add(arrays(2), Contribution(10, "p01"))
    assert encode(moved) == encode(in_memory.finish()) == blob


def test_reading_a_file_by_blocks_holds_little_of_it(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(encode(arrays()))
    values, before = decode(read_mapped(tmp_path / "model"))["w"].reshape(-1), anonymous_and_files_mib()
    assert read_all(values) != 0
    after = anonymous_and_files_mib()
    assert after[1] - before[1] < 2
    assert values.sum() != 0
    assert anonymous_and_files_mib()[1] - before[1] > 8, "a whole one is what it is"
