"""One cell of a sweep, in a process of its own.

`run_cell` starts `python -m fluffle.cell`, which is told its job on standard input and answers with the result on
standard output. It ends itself when its input ends: whoever kills a sweep kills its cells.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fluffle.layers import is_setting_variable

TAIL_BYTES = 4000  # of what a failed cell wrote on standard error
ORPHANED = 3  # exit code of a cell whose sweep is gone

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """What a cell does: a command of `fluffle`, with this configuration (TOML). It gives up the run `abandon`."""

    command: str
    config: str
    run_id: str
    abandon: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `--json` of the command wrote, or why there is nothing: in one line."""

    result: dict[str, Any]
    error: str = ""


def run_cell(job: Job, began: Callable[[Process], object] = lambda _: None) -> Outcome:
    """Runs one cell to its end. Blocks; `began` is told of the process."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fluffle.cell"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=_environment(os.environ),
        )  # fmt: skip
        began(process)
        with process:
            assert process.stdin
            assert process.stdout
            _tell(process.stdin, job)
            output = process.stdout.read()  # its input stays open meanwhile
            code = process.wait()
        return _outcome(code, output, log)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings come with the job, and one thread is what a cell may use."""
    kept = {name: value for name, value in environ.items() if not is_setting_variable(name)}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _tell(stdin: IO[bytes], job: Job) -> None:
    try:
        stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        stdin.flush()
    except (BrokenPipeError, ValueError):
        pass  # it ended at once, and its exit code and last words tell why; or the pool has closed its input


def _outcome(code: int, output: bytes, log: IO[bytes]) -> Outcome:
    if code == 0:
        try:
            return Outcome(json.loads(output))
        except ValueError:
            return Outcome({}, "the cell ended well, but what it wrote is no JSON")
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL_BYTES))
    lines = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    last = lines[-1].removeprefix("fluffle: error: ")
    return Outcome({}, f"{last} (exit code {code})" if code > 0 else f"killed by signal {-code}: {last}")


def main() -> None:
    """What the process does."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        sys.exit(ORPHANED)
    job = Job(**json.loads(line))
    directory = Path(tempfile.mkdtemp(prefix="fluffle-cell-"))
    threading.Thread(target=_end_with_the_sweep, args=(directory,), daemon=True).start()
    try:
        _run(job, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(job: Job, directory: Path) -> None:
    from fluffle.cli import main as fluffle

    file = directory / "cell.toml"
    file.write_text(job.config, "utf-8")
    options = ["--config", str(file), "--set", f"run.dir={directory / 'run'}", "--json", "-"]
    options += ["--abandon", job.abandon] if job.abandon else []
    sys.argv[1:] = [job.command, *options, "--log-level", "warning", "--log-format", "text"]
    fluffle()


def _end_with_the_sweep(directory: Path) -> None:
    while os.read(sys.stdin.fileno(), TAIL_BYTES):  # not through sys.stdin, whose lock would be held at the exit
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()
