"""From one version of the global model to the next, for whoever has the one before.

Without loss (`xor+zstd`): the bits of both versions, exclusive or. With a codec that owes nothing (`fp16`, `bf16`,
`int8`, each also with the lossless stage): the step from one to the next, encoded; and then the next version *is*
the one before plus the decoded step, for everybody. What that rounds off is not kept: the next updates depart from
the model as it is. Both sides compute with operations that give the same bits on every kind of processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker import tensors
from broker.codecs import NONE, SPARE_BYTES, SQUEEZED, packing
from broker.codecs.lossless import squeeze, unsqueeze
from broker.errors import BadMessage, ConfigError
from broker.tensors import Arrays, Buffer, check_like

EXACT = "xor+zstd"
ROUNDING = ("fp16", "bf16", "int8")


def check_name(name: str) -> None:
    """Raises ConfigError unless it is how a difference can be encoded, or none."""
    if name not in (NONE, EXACT) and name.removesuffix(SQUEEZED) not in ROUNDING:
        known = ", ".join((NONE, EXACT, *ROUNDING))
        raise ConfigError(
            f"codec {name[:40]!r} is none for differences of models: there are {known}, the last three also with "
            f"{SQUEEZED}; others owe something, which nobody would keep"
        )


def difference(name: str, base: Arrays, wanted: Arrays) -> tuple[Arrays, Buffer]:
    """The version to commit, which is `wanted` or near it, and how whoever has `base` comes to it."""
    if name == EXACT:
        return wanted, squeeze(tensors.encode(_xor(base, wanted)))
    with np.errstate(over="ignore"):
        step = {name: np.subtract(array, base[name], dtype=array.dtype) for name, array in wanted.items()}
    body = packing(name).pack(step, {}, np.random.default_rng(0)).body  # none of these draws
    return advanced(name, base, body), body


def advanced(name: str, base: Arrays, body: Buffer) -> Arrays:
    """The version after `base`. Raises BadMessage if the body is no difference between such models."""
    try:
        check_name(name)
    except ConfigError as unknown:
        raise BadMessage(str(unknown)) from None
    if name == EXACT:
        bits = tensors.decode(unsqueeze(body, sum(array.nbytes for array in base.values()) + SPARE_BYTES))
        check_like(bits, base)
        return _xor(base, bits)
    step = packing(name).unpack(body, base)
    with np.errstate(over="ignore", invalid="ignore"):
        return {name: np.add(array, step[name], dtype=array.dtype) for name, array in base.items()}


def _xor(one: Arrays, other: Arrays) -> Arrays:
    return {name: (_bits(array) ^ _bits(other[name])).view(array.dtype) for name, array in one.items()}


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """Its bits as whole numbers; a scalar keeps its shape."""
    return np.ascontiguousarray(array).reshape(array.shape).view(f"u{array.itemsize}")
