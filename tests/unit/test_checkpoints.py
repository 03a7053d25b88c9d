"""Checkpoints: complete under their final name, checked when read, kept as long as needed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from structlog.testing import capture_logs

from aggregator.checkpoints import Checkpoints
from broker import durable as module
from broker import tensors
from broker.errors import StateError
from broker.head import Best, HeadRecord
from broker.messages import Where


def model(value: float) -> bytes:
    return tensors.encode({"w": np.full((2, 3), value, dtype=np.float32), "b": np.zeros(3, dtype=np.float32)})


def digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def record(version: int, *, epoch: int = 1, seq: int | None = None, state: bytes = b"") -> HeadRecord:
    blob = model(version)
    where = Where(where="inline", size_bytes=len(blob), sha256=digest(blob))
    return HeadRecord(
        run_id="run-1",
        epoch=epoch,
        seq=version if seq is None else seq,
        version=version,
        round=version,
        model=where,
        state=Where(where="inline", size_bytes=len(state), sha256=digest(state)) if state else None,
        lineage=((0, 0, "a" * 64),),
        settled={"p01": (version, "counted")},
        metrics={"accuracy": 0.5},
        best=Best(version=1, round=1, value=0.5, sha256="b" * 64),
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def save(checkpoints: Checkpoints, saved: HeadRecord) -> str:
    assert saved.model is not None
    checkpoints.store(saved.model.sha256, model(saved.version))
    checkpoints.describe(saved)
    return saved.model.sha256


def test_a_checkpoint_is_a_plain_safetensors_file(checkpoints: Checkpoints) -> None:
    sha256 = save(checkpoints, record(1))
    path = checkpoints.path(sha256)
    assert digest(path.read_bytes()) == sha256 == path.stem
    assert load_file(path)["w"].tolist() == [[1.0] * 3] * 2
    assert checkpoints.load(sha256) == model(1)
    assert checkpoints.load("0" * 64) is None


def test_the_manifest_tells_people_and_machines(checkpoints: Checkpoints) -> None:
    saved = record(12)
    sha256 = save(checkpoints, saved)
    manifest = json.loads((checkpoints.directory / "v000012.json").read_text())
    assert manifest["file"] == f"{sha256}.safetensors"
    assert manifest["metrics"] == {"accuracy": 0.5}
    assert {"name": "w", "dtype": "F32", "shape": [2, 3]} in manifest["tensors"]
    assert checkpoints.newest() == saved


def test_the_newest_is_the_one_of_highest_rank(checkpoints: Checkpoints) -> None:
    for saved in (record(3, epoch=2, seq=0), record(5, epoch=1, seq=99), record(4, epoch=2, seq=1)):
        save(checkpoints, saved)
    assert checkpoints.newest() == record(4, epoch=2, seq=1)


def test_a_former_leader_does_not_replace_a_newer_manifest(checkpoints: Checkpoints) -> None:
    save(checkpoints, record(3, epoch=2, seq=0))
    save(checkpoints, record(3, epoch=1, seq=9))
    assert checkpoints.newest() == record(3, epoch=2, seq=0)


def test_a_damaged_model_is_set_aside_and_reported(checkpoints: Checkpoints) -> None:
    save(checkpoints, record(1))
    sha256 = save(checkpoints, record(2))
    path = checkpoints.path(sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with capture_logs() as logs:
        assert checkpoints.newest() == record(1)
    assert "checkpoint_damaged" in [line["event"] for line in logs]
    assert checkpoints.load(sha256) is None
    assert path.with_name(path.name + ".damaged").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "other", "schema": 1}', '{"format":"fluffle-checkpoint"}']
)
def test_a_damaged_manifest_is_reported_and_skipped(checkpoints: Checkpoints, text: str) -> None:
    save(checkpoints, record(1))
    (checkpoints.directory / "v000002.json").write_text(text)
    with capture_logs() as logs:
        assert checkpoints.newest() == record(1)
    assert [line["event"] for line in logs] == ["checkpoint_manifest_damaged"]


def test_an_empty_directory_has_no_newest(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None


def test_storing_again_keeps_the_file(checkpoints: Checkpoints) -> None:
    sha256 = save(checkpoints, record(1))
    before = checkpoints.path(sha256).stat().st_ino
    checkpoints.store(sha256, memoryview(model(1)))
    assert checkpoints.path(sha256).stat().st_ino == before


def test_a_record_whose_model_is_elsewhere_is_not_described(checkpoints: Checkpoints) -> None:
    checkpoints.describe(record(1))
    assert list(checkpoints.directory.iterdir()) == []


def test_only_models_are_described(checkpoints: Checkpoints) -> None:
    saved = record(1)
    assert saved.model is not None
    checkpoints.store(saved.model.sha256, b"something else")
    with pytest.raises(StateError, match="not a safetensors file"):
        checkpoints.describe(saved)


def test_pruning_keeps_the_newest_and_the_named(checkpoints: Checkpoints) -> None:
    digests = [save(checkpoints, record(version)) for version in range(1, 8)]
    state = b"state of version 6"
    checkpoints.store(digest(state), state)
    checkpoints.describe(record(6, seq=60, state=state))
    checkpoints.prune({digests[0]})
    kept = {path.stem for path in checkpoints.directory.glob("*.safetensors")}
    assert kept == {digests[0], *digests[4:], digest(state)}
    assert sorted(path.stem for path in checkpoints.directory.glob("v*.json")) == [
        "v000001", "v000005", "v000006", "v000007",
    ]  # fmt: skip


def test_pruning_spares_what_is_being_stored_but_not_for_ever(checkpoints: Checkpoints) -> None:
    waiting = checkpoints.path(digest(model(9)))
    checkpoints.store(waiting.stem, model(9))
    (checkpoints.directory / "x.safetensors.0.tmp").write_bytes(b"")
    checkpoints.prune()
    assert waiting.exists()
    for path in checkpoints.directory.iterdir():
        os.utime(path, (1, 1))
    checkpoints.prune()
    assert list(checkpoints.directory.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StateError, match=r"No space left on device.*free space"):
        checkpoints.store("a" * 64, model(1))
    assert list(checkpoints.directory.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints")
