"""Differences of models: both sides come to the same bits, and what is rounded stays within the codec's bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import tensors
from broker.codecs.difference import EXACT, advanced, check_name, difference
from broker.errors import BadMessage, ConfigError, TaskError
from broker.tensors import Arrays

NAMES = (EXACT, "fp16", "bf16+zstd", "int8", "int8+zstd")


def version(seed: int, scale: float = 1.0) -> Arrays:
    draw = np.random.default_rng(seed)
    return {
        "w": (scale * draw.normal(size=(60, 70))).astype(np.float32),
        "b": (scale * draw.normal(size=7)).astype(np.float32),
        "half": (scale * draw.normal(size=(9, 9))).astype(np.float16),
        "double": scale * draw.normal(size=(9, 9)),
        "n": np.array(3 + seed, np.int64),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_whoever_has_the_one_comes_to_the_bits_of_the_other(name: str) -> None:
    base, wanted = version(1), version(2)
    committed, body = difference(name, base, wanted)
    assert tensors.encode(advanced(name, base, body)) == tensors.encode(committed)
    tensors.check_like(committed, base)


def test_nothing_is_lost_of_any_bits() -> None:
    strange = version(2)
    strange["w"][0, :3] = [np.nan, np.inf, -0.0]
    committed, body = difference(EXACT, version(1), strange)
    assert tensors.encode(committed) == tensors.encode(strange)
    assert tensors.encode(advanced(EXACT, version(1), body)) == tensors.encode(strange)


@pytest.mark.parametrize(("name", "most"), [("fp16", 1e-3), ("bf16+zstd", 1e-2), ("int8", 2e-2)])
def test_what_is_rounded_is_small_beside_the_step(name: str, most: float) -> None:
    base = version(1)
    step = version(2, scale=1e-3)
    wanted = {name: np.add(array, step[name], dtype=array.dtype) for name, array in base.items()}
    committed, _ = difference(name, base, wanted)
    for tensor in ("w", "b", "double"):
        assert np.abs(committed[tensor] - wanted[tensor]).max() <= most * np.abs(step[tensor]).max() + 1e-6
    assert committed["n"] == wanted["n"]


def test_small_steps_of_a_model_take_fewer_bytes() -> None:
    base = version(1)
    step = version(2, scale=1e-4)
    wanted = {name: np.add(array, step[name], dtype=array.dtype) for name, array in base.items()}
    whole = len(tensors.encode(wanted))
    assert len(difference(EXACT, base, wanted)[1]) < 0.8 * whole
    assert len(difference("int8", base, wanted)[1]) < 0.4 * whole


def test_a_model_that_is_not_finite_has_no_rounded_step() -> None:
    broken = version(2)
    broken["w"][3, 3] = np.inf
    with pytest.raises(TaskError, match="'w'"):
        difference("int8", version(1), broken)


@pytest.mark.parametrize("name", NAMES)
def test_a_difference_of_other_models_is_refused(name: str) -> None:
    _, body = difference(name, version(1), version(2))
    other = version(1) | {"w": np.zeros((70, 60), np.float32)}
    if name == EXACT:
        with pytest.raises(BadMessage):
            advanced(name, other, body)
    with pytest.raises(BadMessage):
        advanced(name, version(1) | {"w": np.zeros((6, 70), np.float32)}, body)


@given(name=st.sampled_from(NAMES), junk=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_junk_is_refused(name: str, junk: bytes) -> None:
    with pytest.raises(BadMessage):
        advanced(name, version(1), junk)


@pytest.mark.parametrize("name", ["xor", "topk:0.1", "sign", "powersgd:2", "qsgd:7", "nonsense", "int8+zstd+zstd"])
def test_codecs_that_owe_or_draw_are_none_for_models(name: str) -> None:
    with pytest.raises(ConfigError):
        check_name(name)
    with pytest.raises(BadMessage):
        advanced(name, version(1), b"")
