"""All targets by name, and what a session of fuzzing needs around them."""

from __future__ import annotations

import logging
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from broker.wire import KINDS
from tests.fuzzing import codings, decoders, files, runs
from tests.fuzzing.engine import Findings, Fuzzer, Target

ADDRESS_SPACE_BYTES = 6 << 30  # of one process: whoever asks for more gets a MemoryError, which is a defect

TARGETS: dict[str, Callable[[Path], Target]] = {
    "frames": lambda _: decoders.frames(),
    **{f"message-{kind}": partial(lambda kind, _: decoders.message(kind), kind) for kind in KINDS},
    "tensors": lambda _: decoders.blobs(),
    "chunks": lambda _: decoders.chunks(),
    "sums": lambda _: decoders.sums(),
    "codecs": lambda _: codings.codecs(),
    "residuals": lambda _: codings.residuals(),
    "differences": lambda _: codings.differences(),
    "journal": files.journal,
    "checkpoints": files.checkpoints,
    "history": files.history,
    "config": files.config,
    "secrets": files.secrets,
    "result": files.result,
    "lead": runs.lead,
    "updates": runs.updates,
    "outbox": runs.outbox,
}


def fuzz(name: str, *, inputs: int, seconds: float, seed: int) -> Findings:
    """So many inputs for one target, or so many seconds, in a directory of its own."""
    with _silence(), tempfile.TemporaryDirectory(prefix="fluffle-fuzz-", dir=_in_memory()) as directory:
        target = TARGETS[name](Path(directory) / name)
        try:
            return Fuzzer(name, target, seed).run(inputs, seconds)
        finally:
            target.close()


def fuzz_alone(name: str, inputs: int, seconds: float, seed: int) -> dict[str, Any]:
    """The same in a process that does nothing else, and may have no more than so much memory."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    return fuzz(name, inputs=inputs, seconds=seconds, seed=seed).to_dict()


def _in_memory() -> str | None:
    """Files that live a millisecond need no disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def _silence() -> Iterator[None]:
    """A million refusals are no news; a warning is a defect."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        structlog.configure(**before)
