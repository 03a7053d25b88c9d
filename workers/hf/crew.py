"""Several processes train for one participant: each computes the gradient of its slice of a batch.

The first is the participant's own; it alone has optimiser, clock, journal and broker. The others (`helper.py`) know
nothing from one step to the next: they get parameters, examples and a seed, and give a gradient. Gloo adds those up
on the CPU, NCCL on CUDA. A helper ends when its standard input does, so it outlives nobody.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from broker import tensors
from broker.errors import TaskError
from workers.task import Arrays

dist: Any = torch.distributed  # it exports more than it declares
START_S = 600.0  # for a helper to load the base
STEP_S = 600.0  # for a helper to be where the others are
END_S = 5.0


@dataclass(frozen=True, slots=True)
class Work:
    """What one helper does in one step. `arrays`: examples, and weights of classes; `told`: everything else."""

    told: Mapping[str, Any]
    arrays: Arrays

    def to_bytes(self) -> bytes:
        return json.dumps(self.told).encode() + b"\n" + tensors.encode(self.arrays)

    @classmethod
    def from_bytes(cls, content: bytes) -> Work:
        told, _, blob = content.partition(b"\n")
        return cls(json.loads(told), tensors.decode(blob, writable=True) if blob else {})


@dataclass(frozen=True, slots=True)
class Lines:
    """How the processes of one participant reach each other: words through gloo, vectors as the device can."""

    said: Any
    vectors: Any

    @classmethod
    def opened(cls, store: Any, rank: int, size: int, device: torch.device) -> Lines:
        said = dist.ProcessGroupGloo(dist.PrefixStore("said", store), rank, size, timedelta(seconds=STEP_S))
        if device.type != "cuda":
            return cls(said, said)
        return cls(
            said,
            dist.ProcessGroupNCCL(dist.PrefixStore("vectors", store), rank, size, dist.ProcessGroupNCCL.Options()),
        )

    def share(self, parameters: Sequence[nn.Parameter]) -> None:
        """Everybody gets the first one's values."""
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self.vectors.broadcast(flat, 0).wait(timedelta(seconds=STEP_S))
        with torch.no_grad():
            for parameter, values in zip(parameters, _split(flat, parameters), strict=True):
                parameter.copy_(values)

    def add_up(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Everybody gets the sum of all gradients; returns the sum of losses. What has no gradient gets none."""
        parts = [p.grad.reshape(-1) if p.grad is not None else torch.zeros_like(p).reshape(-1) for p in parameters]
        flat = torch.cat([*parts, parts[0].new_tensor([loss])]).detach()
        self.vectors.allreduce(flat, dist.ReduceOp.SUM).wait(timedelta(seconds=STEP_S))
        for parameter, values in zip(parameters, _split(flat[:-1], parameters), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(values)
        return float(flat[-1].item())


@dataclass(slots=True, weakref_slot=True, eq=False)
class Crew:
    """The helpers of one model: `size` - 1, which are started when they are first needed. `hello`: what they load,
    but for their own `device`; `identity`: what they must come to. Used by one thread at a time."""

    size: int
    hello: Mapping[str, Any]
    identity: str
    devices: Sequence[str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _lines: Lines | None = None

    def __post_init__(self) -> None:
        weakref.finalize(self, _end, self.processes)  # also when the interpreter ends

    @contextmanager
    def at_work(self, work: Sequence[Work], parameters: Sequence[nn.Parameter]) -> Iterator[Lines]:
        """Gives each helper its work; inside, the own slice is to be done and `add_up` to be called. Raises
        TaskError if a helper cannot; all are ended then, and the next step starts others."""
        try:
            lines = self._started()
            for rank, (process, one) in enumerate(zip(self.processes, work, strict=True), 1):
                _say(process, lines, rank, one.to_bytes())
            lines.share(parameters)
            yield lines
        except (RuntimeError, OSError) as error:
            raise TaskError(f"{self._fate()} ({error}): see what it said, or set site.processes = 1") from error
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Ends all helpers, within some seconds."""
        _end(self.processes)
        self.processes.clear()
        self._lines = None

    def _fate(self) -> str:
        """What became of the helpers, which are ended."""
        deadline = time.monotonic() + 1.0
        for process in self.processes:
            _wait(process, max(0.0, deadline - time.monotonic()))
        ended = [
            f"helper {n} ended with code {p.returncode}" for n, p in enumerate(self.processes, 1) if p.returncode
        ]
        self.end()
        return ", ".join(ended) or "a helper did not do its part"

    def _started(self) -> Lines:
        if self._lines is None:
            limit = timedelta(seconds=START_S)
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
            for rank in range(1, self.size):
                self.processes.append(self._helper(rank, store.port))
            deadline = time.monotonic() + START_S
            for rank, process in enumerate(self.processes, 1):
                self._await_ready(rank, process, deadline)
            self._lines = Lines.opened(store, 0, self.size, torch.device(self.devices[0]))
        return self._lines

    def _helper(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.hf.helper"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        place = {"rank": rank, "size": self.size, "port": port, "threads": torch.get_num_threads()}
        told = {**self.hello, "device": self.devices[rank], "place": place}
        assert process.stdin
        process.stdin.write(json.dumps(told, default=sorted).encode() + b"\n")
        process.stdin.flush()
        return process

    def _await_ready(self, rank: int, process: subprocess.Popen[bytes], deadline: float) -> None:
        assert process.stdout
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise OSError(f"helper {rank} was not ready within {START_S:g} s")
        if (found := process.stdout.readline().strip().decode()) != self.identity:
            raise OSError(f"helper {rank} has the base {found[:12] or 'none'}, and here is {self.identity[:12]}")


def _say(process: subprocess.Popen[bytes], lines: Lines, rank: int, content: bytes) -> None:
    assert process.stdin
    process.stdin.write(b"%d\n" % len(content))
    process.stdin.flush()
    lines.said.send([torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))], rank, 0).wait()


def _split(flat: Tensor, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    sizes = [parameter.numel() for parameter in parameters]
    for values, parameter in zip(torch.split(flat, sizes), parameters, strict=True):
        yield values.view_as(parameter)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
    for process in processes:
        if not _wait(process, END_S):
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
