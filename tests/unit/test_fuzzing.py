"""A little of `python -m tests.fuzzing` in every test run, and that the fuzzer notices what it must notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker.errors import BadMessage
from tests.fuzzing import engine
from tests.fuzzing.engine import Findings, Fuzzer, Target
from tests.fuzzing.mutate import raw
from tests.fuzzing.targets import TARGETS, fuzz

SLOW = {"lead", "updates", "outbox", "config", "secrets", "history", "checkpoints", "journal", "sums"}


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_more_than_be_refused(name: str) -> None:
    check(fuzz(name, inputs=150 if name in SLOW else 1500, seconds=20, seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_of_many_does_more_than_be_refused(name: str) -> None:
    check(fuzz(name, inputs=30_000, seconds=45, seed=3))


def check(found: Findings) -> None:
    assert not found.failures, found.failures
    assert found.understood > 0  # what is only ever refused tests little
    assert found.inputs > 0


# -- the fuzzer itself ----------------------------------------------------------------------------------------


def found_by(check: Callable[[bytes], None], seed: bytes = b"seed", inputs: int = 400) -> Findings:
    return Fuzzer("t", Target(check, (seed,), raw([b"magic"]), (BadMessage,)), seed=1).run(inputs, 30)


def test_an_error_that_is_not_documented_is_a_defect() -> None:
    def broken(data: bytes) -> None:
        if data[:1] != b"s":
            raise KeyError(data[:1])
        raise BadMessage("no")

    (failure,) = found_by(broken).failures.values()
    assert failure.error.startswith("KeyError")
    assert failure.times > 1
    assert not bytes.fromhex(failure.input_hex).startswith(b"s")


def test_a_hang_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HANG_S", 0.05)

    def hangs(data: bytes) -> None:
        while b"magic" in data:
            pass

    found = found_by(hangs, inputs=10)
    assert [failure.error for failure in found.failures.values()] == ["Hang: more than 0.05 s"]


def test_an_allocation_beyond_the_limit_is_a_defect() -> None:
    found = found_by(lambda data: bytearray((3 << 20) if len(data) else 0).clear(), inputs=60)
    assert all("allocated 3" in failure.error for failure in found.failures.values())
    assert found.failures
    assert found.largest_allocation_bytes > 3 << 20


def test_what_reaches_new_lines_is_kept_and_changed_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four doors one behind the other: nobody gets through all of them in one step."""
    monkeypatch.setattr(engine, "WATCHED", (__file__,))

    def doors(data: bytes) -> None:
        if data.count(b"magic") < 2:
            return
        if data.count(b"magic") < 4:
            return
        if data.count(b"magic") < 6:
            return
        if data.count(b"magic") > 7:
            raise KeyError("through")

    assert found_by(doors, inputs=4000).failures
    monkeypatch.setattr(engine, "WATCHED", ())
    assert not found_by(doors, inputs=4000).failures


def test_the_same_seed_gives_the_same_inputs() -> None:
    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []
        Fuzzer("t", Target(seen.append, (b"abc",), raw([b"magic"])), seed).run(50, 30)
        return seen

    assert inputs(1) == inputs(1) != inputs(2)
