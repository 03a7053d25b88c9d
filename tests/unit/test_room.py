"""Where a running sum lies: in memory if there is room, else in a file; the bits are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from aggregator.room import SMALL_BYTES, Zeros, available_bytes, in_memory, where_there_is_room
from aggregator.strategies.adaptive import Adaptive, adam
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.fedasync import FedAsync
from aggregator.strategies.fedavg import FedAvg
from aggregator.strategies.optimiser import ServerOptimiser
from aggregator.sums import FixedPointSum
from broker.mapped import draft
from broker.tensors import Arrays, encode, is_mapped

LARGE = SMALL_BYTES // 8 + 1
MANY = LARGE * 100


@pytest.mark.parametrize(
    ("count", "available", "on_disk"),
    [(LARGE, MANY, False), (LARGE, 2 * 8 * LARGE, False), (LARGE, 2 * 8 * LARGE - 1, True), (LARGE, None, False),
     (SMALL_BYTES // 8, 0, False)],
)  # fmt: skip
def test_a_sum_lies_where_there_is_room(tmp_path: Path, count: int, available: int | None, on_disk: bool) -> None:
    with capture_logs() as logs:
        found = where_there_is_room(tmp_path, lambda: available)(count)
    assert is_mapped(found) == on_disk
    assert found.size == count
    assert not found[[0, -1]].any()
    assert [line["event"] for line in logs] == ["sum_on_disk"] * on_disk
    assert list(tmp_path.iterdir()) == []


def test_without_a_directory_it_is_memory() -> None:
    assert not is_mapped(where_there_is_room(None, lambda: 0)(LARGE))


MEMINFO = "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 50 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 50 << 10),
        ({"proc/meminfo": "nonsense\n"}, None),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"}, 50 << 10),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "20480\n"}, 20480),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory.max": "20480",
                "sys/fs/cgroup/memory.stat": "anon 480\n",
            },
            20000,
        ),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "1000000"}, 50 << 10),
    ],
)
def test_what_is_available_is_what_linux_says(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_bytes(tmp_path) == expected


def model(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((3, 70_000)).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float64),
    }


def on_disk(directory: Path) -> Zeros:
    return lambda count: np.frombuffer(draft(directory, 8 * count), np.int64)


def rounds(strategy: FedAvg | FedAsync | ServerOptimiser) -> bytes:
    current, state = model(0), dict[str, np.ndarray]()
    for number in (1, 2, 3):
        strategy.start(current, state)
        for who in (1, 2):
            strategy.add(model(10 * number + who), Contribution(who, f"p{who}"))
        current, state = strategy.finish(), strategy.state
    return encode({**current, **state})


@pytest.mark.parametrize("name", ["fedavg", "fedasync", "fedadam"])
def test_on_the_disk_it_has_the_same_bits(tmp_path: Path, name: str) -> None:
    digests = []
    for zeros in (in_memory, on_disk(tmp_path)):
        total = FixedPointSum(100, 1000, zeros)
        strategies = {
            "fedavg": FedAvg(total, 1.0),
            "fedasync": FedAsync(total, 0.6),
            "fedadam": ServerOptimiser(total, Adaptive(adam, 0.03, 0.9, 0.99, 1e-3), ()),
        }
        digests.append(rounds(strategies[name]))
        assert is_mapped(total._sums["w"]) == (zeros is not in_memory)
    assert digests[0] == digests[1]
