"""Models on disk: `<sha256>.safetensors`, and for people one readable manifest per version.

A file under its final name is complete: it is written beside it, synced, and renamed. `sha256sum FILE`
prints the name of the file. A large model is written where its checkpoint will be, tensor by tensor, and read
there: nobody holds it in memory.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from broker.durable import replace_file
from broker.errors import BadMessage, StateError
from broker.head import HeadRecord
from broker.mapped import Draft, draft, read_mapped
from broker.messages import Where
from broker.payloads import sha256_of
from broker.tensors import Buffer, manifest_of

FORMAT = "fluffle-checkpoint"
SCHEMA = 1
MODEL_SUFFIX = ".safetensors"
TMP_SUFFIX = ".tmp"
ABANDONED_S = 3600.0  # a temporary file this old belongs to a process that died

log = structlog.get_logger(__name__)


class Checkpoints:
    """The checkpoints of one run. Methods block; they raise StateError if the disk refuses."""

    def __init__(self, directory: Path | str, *, keep_newest: int = 3) -> None:
        self.directory = Path(directory)
        self.keep_newest = keep_newest
        self._read: dict[Path, tuple[tuple[int, ...], HeadRecord | None]] = {}  # manifests, as they were last seen
        with _disk(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a model or a strategy's state lies, or would lie."""
        return self.directory / f"{sha256}{MODEL_SUFFIX}"

    def draft(self, size_bytes: int) -> memoryview:
        """Room for a body that is still to be written, on this disk: once it is stored, it is its file."""
        return draft(self.directory, size_bytes)

    def store(self, sha256: str, blob: Buffer) -> None:
        """Puts a model or a strategy's state under its digest; on return it is on the disk."""
        path = self.path(sha256)
        with _disk(path):
            if Draft.behind(blob) or not (path.exists() and path.stat().st_size == len(blob)):
                _write(path, blob)

    def describe(self, record: HeadRecord) -> None:
        """Writes the manifest of the record's version, unless its model or its strategy's state is not here.

        Raises StateError if what is stored is no model. The manifest of a record of higher rank stays.
        """
        if record.model is None or not all(self.path(body.sha256).exists() for body in record.bodies):
            log.warning("checkpoint_skipped", version=record.version, reason="it is not stored here whole")
            return
        path = self.directory / f"v{record.version:06d}.json"
        present = self._record(path) if path.exists() else None
        if present is not None and present.rank > record.rank:
            log.warning("checkpoint_superseded", file=str(path), rank=record.rank, present=present.rank)
            return
        manifest = _manifest(record, record.model, _tensors(self.path(record.model.sha256)))
        with _disk(path):
            _write(path, json.dumps(manifest, indent=2).encode())

    def load(self, sha256: str) -> memoryview | None:
        """The model or state of that digest, read where it lies, or None. A damaged file is set aside and
        reported."""
        path = self.path(sha256)
        with _disk(path):
            blob = read_mapped(path) if path.exists() else None
        if blob is not None and sha256_of(blob) != sha256:
            self._set_aside(path)
            return None
        return blob

    def newest(self) -> HeadRecord | None:
        """The record of highest rank that is whole, with model and state. Damaged ones are reported and skipped."""
        records = sorted(self._records().values(), key=lambda record: record.rank, reverse=True)
        return next((record for record in records if record.model and self._is_whole(record)), None)

    def prune(self, keep: Collection[str] = ()) -> None:
        """Deletes all but the newest few manifests and those of `keep`, with the files that only those name.

        A file that no manifest names may be waiting for its own: it goes after an hour.
        """
        by_rank = sorted(self._records().items(), key=lambda item: item[1].rank, reverse=True)
        older = by_rank[self.keep_newest :]
        dropped = {path: record for path, record in older if _digests(record).isdisjoint(keep)}
        needed = set(keep).union(*(_digests(record) for path, record in by_rank if path not in dropped))
        unneeded = set[str]().union(*map(_digests, dropped.values())) - needed
        for path in (*dropped, *map(self.path, unneeded), *self._abandoned(needed)):
            with _disk(path):
                path.unlink(missing_ok=True)

    def _abandoned(self, needed: Collection[str]) -> list[Path]:
        files = (*self.directory.glob(f"*{MODEL_SUFFIX}"), *self.directory.glob(f"*{TMP_SUFFIX}"))
        return [path for path in files if path.stem not in needed and _age_s(path) > ABANDONED_S]

    def _records(self) -> dict[Path, HeadRecord]:
        with _disk(self.directory):
            self._read = {path: self._seen(path) for path in self.directory.glob("v*.json")}
        return {path: record for path, (_, record) in self._read.items() if record is not None}

    def _seen(self, path: Path) -> tuple[tuple[int, ...], HeadRecord | None]:
        """The manifest there; it is read again only if it was replaced."""
        identity = _identity(path)
        known = self._read.get(path)
        return known if known and identity and known[0] == identity else (identity, self._record(path))

    def _record(self, path: Path) -> HeadRecord | None:
        try:
            manifest = json.loads(path.read_bytes())
            if (manifest["format"], manifest["schema"]) != (FORMAT, SCHEMA):
                raise ValueError("not a manifest of this Fluffle")
            return HeadRecord.model_validate_json(json.dumps(manifest["head"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.error("checkpoint_manifest_damaged", file=str(path), error=str(error)[:200])
            return None

    def _is_whole(self, record: HeadRecord) -> bool:
        return all(self._verified(body.sha256) for body in record.bodies)

    def _verified(self, sha256: str) -> bool:
        path = self.path(sha256)
        if not path.exists():
            log.error("checkpoint_missing", file=str(path))
            return False
        with _disk(path):
            whole = sha256_of(read_mapped(path)) == sha256
        if not whole:
            self._set_aside(path)
        return whole

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(path.name + ".damaged")
        with _disk(path):
            path.replace(aside)
        log.error("checkpoint_damaged", file=str(path), moved_to=str(aside))


def _tensors(path: Path) -> list[dict[str, Any]]:
    try:
        with _disk(path):
            specs = manifest_of(read_mapped(path))
    except BadMessage as error:
        raise StateError(f"{path}: not a safetensors file: {error}") from None
    return [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]


def _manifest(record: HeadRecord, model: Where, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "run_id": record.run_id,
        "version": record.version,
        "round": record.round,
        "metrics": record.metrics,
        "file": f"{model.sha256}{MODEL_SUFFIX}",
        "size_bytes": model.size_bytes,
        "sha256": model.sha256,
        "tensors": tensors,
        "state_file": f"{record.state.sha256}{MODEL_SUFFIX}" if record.state else None,
        "head": record.model_dump(mode="json"),
    }


def _identity(path: Path) -> tuple[int, ...]:
    """Another one for every file that ever had that name; nothing if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _digests(record: HeadRecord) -> set[str]:
    return {body.sha256 for body in record.bodies}


def _write(path: Path, blob: Buffer) -> None:
    replace_file(path, blob, path.with_name(f"{path.name}.{secrets.token_hex(4)}{TMP_SUFFIX}"))


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path}: the checkpoint cannot be read or written ({error.strerror or error}): "
            "free space or check its permissions, or choose another directory with --run-dir"
        ) from error
