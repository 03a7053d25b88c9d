"""Targets: encoded updates, what a worker's codec owes, and differences of models."""

from __future__ import annotations

import numpy as np

from broker import tensors
from broker.codecs import packing
from broker.codecs.difference import EXACT, advanced, difference
from broker.codecs.lossless import squeeze
from broker.errors import BadMessage
from tests.fuzzing import mutate
from tests.fuzzing.decoders import check_reason
from tests.fuzzing.engine import Target
from workers.kept import Kept

NAMES = ("none", "fp16", "bf16", "int8", "qsgd:7", "qsgd:127", "topk:0.01", "topk:0.25", "sign", "powersgd:2")
SQUEEZES = 128  # added to a name's number: the lossless stage follows
TORN = 64  # added to that: what was changed are the squeezed bytes themselves
MODEL: tensors.Arrays = {
    "w": np.linspace(-1, 1, 40 * 30, dtype=np.float32).reshape(40, 30),
    "half": np.ones(70, np.float16),
    "wide": np.ones((3, 3)),
    "n": np.arange(5),
    "scalar": np.zeros((), np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
DELTA = {name: (values / 7).astype(values.dtype) for name, values in MODEL.items()}


def check_coded(data: bytes) -> None:
    """The first byte names the codec, the rest is a body: it is refused, or gives arrays like the model's."""
    number, body = (data[0], data[1:]) if data else (0, b"")
    name = NAMES[(number % TORN) % len(NAMES)]
    if number >= SQUEEZES:
        name, body = f"{name}+zstd", body if number & TORN else bytes(squeeze(body))
    try:
        arrays = dict(packing(name).unpack(body, MODEL))
    except BadMessage as bad:
        check_reason(bad)
        raise
    tensors.check_like(arrays, MODEL)


def codecs() -> Target:
    seeds = []
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        body = bytes(packing(name).pack(DELTA, {}, rng).body)
        seeds += [bytes([added + number]) + body for added in (0, SQUEEZES)]
        squeezed = bytes(packing(f"{name}+zstd").pack(DELTA, {}, rng).body)
        seeds.append(bytes([SQUEEZES + TORN + number]) + squeezed)
    return Target(check_coded, tuple(seeds), _after_the_name, (BadMessage,))


def _after_the_name(data: bytes, dice: mutate.Random) -> bytes:
    """Mostly what is in the file; now and then another codec's name before it."""
    number = dice.randrange(256) if dice.random() < 0.1 else (data[0] if data else 0)
    way = (
        mutate.raw(mutate.TOKENS) if number & TORN else mutate.either(mutate.safetensors, mutate.raw(mutate.TOKENS))
    )
    return bytes([number]) + way(data[1:], dice)


def check_residual(data: bytes) -> None:
    """Whatever lies there is what was written, or it is set aside."""
    found = Kept.from_bytes(data)
    assert Kept.from_bytes(found.to_bytes()) == found
    tensors.decode(found.blob)


def residuals() -> Target:
    whole = Kept("run-1", 3, tensors.encode(DELTA)).to_bytes()
    none = Kept("run-1", 0, tensors.encode({})).to_bytes()
    return Target(check_residual, (whole, none), mutate.raw(mutate.TOKENS), (BadMessage,))


STEPS = (EXACT, "fp16", "bf16", "int8", "int8+zstd", "topk:0.1")  # the last owes something: it is refused


def check_difference(data: bytes) -> None:
    """The first byte names the codec, the rest is a body: it is refused, or leads to arrays like the model's."""
    number, body = (data[0], data[1:]) if data else (0, b"")
    if number >= SQUEEZES:
        body = bytes(squeeze(body))
    try:
        arrays = advanced(STEPS[number % len(STEPS)], MODEL, body)
    except BadMessage as bad:
        check_reason(bad)
        raise
    tensors.check_like(arrays, MODEL)


def differences() -> Target:
    wanted = {name: np.add(values, DELTA[name], dtype=values.dtype) for name, values in MODEL.items()}
    seeds = [bytes([number]) + bytes(difference(name, MODEL, wanted)[1]) for number, name in enumerate(STEPS[:-1])]
    number = next(number for number in range(SQUEEZES, 256) if number % len(STEPS) == STEPS.index(EXACT))
    seeds.append(bytes([number]) + tensors.encode(DELTA))  # what is changed is squeezed afterwards
    return Target(check_difference, tuple(seeds), _after_the_name, (BadMessage,))
