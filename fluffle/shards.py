"""A model in several files: shards of limited size and an index, as transformers writes and reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from broker import tensors
from broker.durable import replace_file
from broker.errors import BadMessage, ConfigError, StateError
from broker.mapped import draft, read_mapped
from broker.tensors import Arrays

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size_of(text: str) -> int:
    """The bytes that `2GB`, `500MB` or `100KB` are. Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d{0,8})\s?(KB|MB|GB)", text.strip().upper())
    if found is None:
        raise ConfigError(f"size {text[:40]!r}: write it as 2GB, 500MB or 100KB")
    return int(found[1]) * UNITS[found[2]]


def write_shards(arrays: Arrays, directory: Path, most_bytes: int) -> None:
    """Writes `model-00001-of-0000N.safetensors`, ... with tensors of at most so many bytes each, and
    `model.safetensors.index.json`; one shard alone is `model.safetensors`. A larger tensor has a shard of its own.

    Nothing is held but a few blocks, if the arrays lie in a mapped file. Raises StateError if the disk refuses.
    """
    parts = list(_parts(arrays, most_bytes))
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    files = files if len(parts) > 1 else [WHOLE]
    try:
        for file, part in zip(files, parts, strict=True):
            blob = tensors.encode_in(partial(draft, directory), part)
            replace_file(directory / file, blob, directory / f"{file}.new")
        if len(parts) > 1:
            places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            total = sum(array.nbytes for array in arrays.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            replace_file(directory / INDEX, json.dumps(index, indent=2).encode(), directory / f"{INDEX}.new")
    except OSError as error:
        raise StateError(f"{directory}: cannot be written: {error.strerror or error}") from None


def _parts(arrays: Arrays, most_bytes: int) -> Iterator[Arrays]:
    part: Arrays = {}
    for name, array in arrays.items():
        if part and sum(other.nbytes for other in part.values()) + array.nbytes > most_bytes:
            yield part
            part = {}
        part[name] = array
    yield part


def load_model(path: Path) -> Arrays:
    """The arrays of a safetensors file, or of a folder or an index of shards, read from there when they are looked
    at. Raises StateError."""
    if path.is_dir():
        path = path / INDEX if (path / INDEX).is_file() else path / WHOLE
    try:
        if path.suffix != ".json":
            return tensors.decode(read_mapped(path))
        return _read_shards(path)
    except (OSError, BadMessage, ValueError, RecursionError) as error:
        raise StateError(f"{path}: not a readable safetensors file: {error}") from None


def _read_shards(index: Path) -> Arrays:
    places = _places(json.loads(index.read_bytes()))
    shards = {file: tensors.decode(read_mapped(index.parent / file)) for file in sorted(set(places.values()))}
    if missing := [name for name, file in places.items() if name not in shards[file]]:
        raise BadMessage(f"{places[missing[0]]} has no tensor {missing[0]!r}")
    return {name: shards[file][name] for name, file in places.items()}


def _places(index: Any) -> dict[str, str]:
    """Each tensor's file: one in the folder of the index."""
    match index:
        case {"weight_map": dict(places)} if all(
            isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
            for file in places.values()
        ):
            return places
    raise BadMessage("it is no index of shards")
