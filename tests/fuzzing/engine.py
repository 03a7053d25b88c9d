"""Feeds a target with changed inputs, keeps those that reach new code, and holds each to its limits."""

from __future__ import annotations

import resource
import signal
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

from tests.fuzzing.mutate import LARGEST_BYTES, Mutate, splice

HERE = Path(__file__).parents[2]
WATCHED = tuple(str(HERE / package) for package in ("broker", "workers", "aggregator", "fluffle"))
TRACED = 10  # every so many inputs is followed line by line
MEASURED = 40  # every so many inputs is asked what it allocates
HANG_S = 5.0  # of processor time: a decoder that takes so long for so little hangs
MOST_KEPT = 3000


class Hang(BaseException):
    """An input took longer than the limit; no target catches this."""


@dataclass(frozen=True)
class Target:
    """A function that returns or raises one of `refusals`; anything else is a defect.

    It may allocate `factor` bytes for each of its input, and `spare_bytes` more.
    """

    check: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    mutate: Mutate
    refusals: tuple[type[Exception], ...] = ()
    factor: int = 64
    spare_bytes: int = 1 << 20
    close: Callable[[], None] = lambda: None


@dataclass
class Failure:
    """One defect: the first input that showed it, and how many others did."""

    error: str
    where: str
    input_hex: str
    times: int = 1


@dataclass
class Findings:
    """What came of one target."""

    target: str
    seed: int
    inputs: int = 0
    understood: int = 0
    refused: int = 0
    edges_of_seeds: int = 0
    edges: int = 0
    kept: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest_bytes: int = 0
    allowed: str = ""
    largest_allocation_bytes: int = 0
    rss_growth_mb: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        plain = {n: round(v, 4) if isinstance(v, float) else v for n, v in asdict(self).items()}
        return plain | {"new_edges": self.edges - self.edges_of_seeds, "failures": list(plain["failures"].values())}


class Edges:
    """Pairs of lines that followed each other in our own code."""

    def __init__(self) -> None:
        self.seen: set[tuple[CodeType, int, int]] = set()
        self._ours: dict[CodeType, bool] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            ours = self._ours[code] = code.co_filename.startswith(WATCHED)
        return self._follow(code) if ours else None

    def _follow(self, code: CodeType) -> Any:
        last, seen = 0, self.seen

        def line(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event == "line":
                seen.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line


@contextmanager
def _hangs_noticed() -> Iterator[None]:
    """Raises Hang in whatever runs for longer; counted in processor time, so a busy machine does no harm."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {HANG_S:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Fuzzer:
    """One target, one stream of inputs."""

    def __init__(self, name: str, target: Target, seed: int) -> None:
        self.target, self.findings = target, Findings(name, seed)
        self._dice, self._edges, self._corpus = Random(seed), Edges(), list(target.seeds)
        self.findings.allowed = f"{target.factor} x input + {target.spare_bytes >> 20} MiB"

    def run(self, inputs: int, seconds: float) -> Findings:
        found, began, rss = self.findings, time.monotonic(), _peak_rss()
        with _hangs_noticed():
            for data in self.target.seeds:
                self._traced(data)
            found.edges_of_seeds = len(self._edges.seen)
            while found.inputs < inputs and time.monotonic() - began < seconds:
                self._next()
        found.edges, found.kept = len(self._edges.seen), len(self._corpus) - len(self.target.seeds)
        found.seconds, found.rss_growth_mb = time.monotonic() - began, (_peak_rss() - rss) / 1024
        return found

    def _next(self) -> None:
        data = self._made()
        if self.findings.inputs % TRACED == 0:
            if self._traced(data) and len(self._corpus) < MOST_KEPT:
                self._corpus.append(data)
        elif self.findings.inputs % MEASURED == 1:
            self._measured(data)
        else:
            self._try(data)

    def _made(self) -> bytes:
        dice, corpus = self._dice, self._corpus
        young = dice.choice((self.target.seeds, corpus, corpus[-20:]))  # what was kept is often beyond repair
        data = self.target.mutate(dice.choice(young), dice)
        while dice.random() < 0.2:
            data = self.target.mutate(data, dice)
        if dice.random() < 0.02:
            data = splice(data, dice.choice(corpus), dice)
        return data[:LARGEST_BYTES]

    def _traced(self, data: bytes) -> bool:
        before = len(self._edges.seen)
        with self._edges.following():
            self._try(data)
        return len(self._edges.seen) > before

    def _measured(self, data: bytes) -> None:
        tracemalloc.start()
        try:
            self._try(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.findings.largest_allocation_bytes = max(self.findings.largest_allocation_bytes, peak)
        if peak > (most := self.target.factor * len(data) + self.target.spare_bytes):
            self._failed(MemoryError(f"allocated {peak} bytes, allowed are {most}"), data)

    def _try(self, data: bytes) -> None:
        self.findings.inputs += 1
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        began = time.perf_counter()
        try:
            self.target.check(data)
            self.findings.understood += 1
        except self.target.refusals:
            self.findings.refused += 1
        except (Exception, Hang) as error:
            self._failed(error, data)
        if (took := time.perf_counter() - began) > self.findings.slowest_s:
            self.findings.slowest_s, self.findings.slowest_bytes = took, len(data)

    def _failed(self, error: BaseException, data: bytes) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(HERE) in frame.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-3:]))
        key = f"{type(error).__name__} at {where}"
        if key in self.findings.failures:
            self.findings.failures[key].times += 1
        else:
            text = f"{type(error).__name__}: {error}"[:300]
            self.findings.failures[key] = Failure(text, where, data[:4096].hex())


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
