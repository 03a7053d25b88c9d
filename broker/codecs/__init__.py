"""Codecs: how the arrays of an update are made smaller before they travel.

A codec is a pair that is declared together: the participant's half encodes, the aggregator's half decodes. Its
encoded form is named arrays again, so it travels as a safetensors file, and everything that is checked about
those is checked. A name says all that both halves must agree on: `int8`, `qsgd:127`, `topk:0.01`, and with the
lossless stage `int8+zstd`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from broker import tensors
from broker.codecs.bf16 import Bf16
from broker.codecs.feedback import left_over, owed
from broker.codecs.fp16 import Fp16
from broker.codecs.int8 import Int8
from broker.codecs.layout import Layout, Made
from broker.codecs.lossless import squeeze, unsqueeze
from broker.codecs.plain import Plain
from broker.codecs.powersgd import MOST_RANK, PowerSgd
from broker.codecs.qsgd import MOST_LEVELS, Qsgd
from broker.codecs.sign import Sign
from broker.codecs.topk import HIGHEST_RATIO, TopK
from broker.errors import ConfigError
from broker.tensors import Arrays, Buffer, Named

NONE = "none"
BESIDE = "control/"
NOTHING: Arrays = {}
LADDER = ("none", "bf16+zstd", "int8+zstd", "qsgd:7+zstd", "topk:0.01+zstd")  # for `auto`: the most faithful first
SQUEEZED = "+zstd"
SPARE_BYTES = 1 << 20  # manifests may be written differently, and small codes need their scales


class Codec(Protocol):
    """Both halves. `feedback`: it is biased, so what it loses must be added to the next update. `share`: of the
    model's bytes, about so much is left."""

    feedback: bool
    share: float

    def encode(self, layout: Layout, arrays: Named, rng: np.random.Generator) -> Arrays:
        """The participant's half. `arrays` are like `layout.like`, floats perhaps wider. Raises TaskError if a
        value is not finite."""

    def decode(self, layout: Layout, encoded: Arrays) -> Named:
        """The aggregator's half: arrays with the names, shapes and dtypes of `layout.like`. Raises BadMessage
        for anything but an encoded form of such arrays."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An update as it travels, and what of it is owed to the next one (empty without error feedback)."""

    body: Buffer
    residual: Arrays


@dataclass(frozen=True, slots=True)
class Packing:
    """A codec, and whether the lossless stage follows."""

    name: str
    codec: Codec
    squeezed: bool

    def pack(
        self,
        delta: Arrays | Made,
        residual: Arrays,
        rng: np.random.Generator,
        missed: int = 0,
        beside: Named = NOTHING,
    ) -> Packed:
        """The bytes of an update. `residual`: what the updates before owe, `missed` rounds ago. Without one, and
        without error feedback, each tensor is asked for only once. `beside`: arrays that no codec may round; their
        names begin with BESIDE.

        Raises TaskError if a value is not finite.
        """
        layout = Layout(delta.like if isinstance(delta, Made) else delta)
        with np.errstate(over="ignore"):  # what overflows is found not to be finite
            if residual or self.codec.feedback:
                due = owed(delta, residual, missed)
                encoded = self.codec.encode(layout, due, rng)
                left = left_over(due, self._decoded(layout, encoded)) if self.codec.feedback else {}
            else:
                encoded, left = self.codec.encode(layout, delta, rng), {}
        blob = tensors.encode({**encoded, **beside})
        return Packed(squeeze(blob) if self.squeezed else blob, left)

    def unpack(self, body: Buffer, like: Arrays) -> Named:
        """The arrays of an update to the model `like`, some of them decoded when they are asked for. Raises
        BadMessage, perhaps only then."""
        return self.unpack_both(body, like, NOTHING)[0]

    def unpack_both(self, body: Buffer, like: Arrays, beside: Arrays) -> tuple[Named, Arrays]:
        """As `unpack`, and the arrays like `beside` that travelled with them. Raises BadMessage if one misses."""
        if self.squeezed:
            most = sum(array.nbytes for array in (*like.values(), *beside.values()))
            body = unsqueeze(body, most + SPARE_BYTES)
        encoded = tensors.decode(body)
        uncoded = {name: encoded.pop(name) for name in beside if name in encoded}
        tensors.check_like(uncoded, beside)
        return self._decoded(Layout(like), encoded), uncoded

    def _decoded(self, layout: Layout, encoded: Arrays) -> Named:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by the sum's bounds
            return self.codec.decode(layout, encoded)


@lru_cache(64)
def packing(name: str) -> Packing:
    """The codec of that name. Raises ConfigError for one that is unknown here."""
    base = name.removesuffix(SQUEEZED)
    kind, colon, parameter = base.partition(":")
    if kind not in CODECS or bool(colon) != (kind in PARAMETERS) or len(name) > 40:
        raise ConfigError(
            f"codec {name[:40]!r} is unknown: there are {', '.join(SPELLINGS)}, each also with {SQUEEZED}"
        )
    return Packing(name, CODECS[kind](parameter), base != name)


def is_known(name: str) -> bool:
    try:
        packing(name)
    except ConfigError:
        return False
    return True


def _levels(text: str) -> Qsgd:
    return Qsgd(_whole(text, MOST_LEVELS, "qsgd:LEVELS"))


def _rank(text: str) -> PowerSgd:
    return PowerSgd(_whole(text, MOST_RANK, "powersgd:RANK"))


def _ratio(text: str) -> TopK:
    ratio = float(text) if re.fullmatch(r"0\.\d{1,9}", text) else 0.0
    if not 0 < ratio <= HIGHEST_RATIO:
        raise ConfigError(
            f"codec topk:{text[:20]}: the ratio is a decimal above 0, at most {HIGHEST_RATIO}: topk:0.01"
        )
    return TopK(ratio)


def _whole(text: str, most: int, spelling: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,2}", text) or int(text) > most:
        raise ConfigError(f"codec {spelling} needs a whole number from 1 to {most}, not {text[:20]!r}")
    return int(text)


PARAMETERS: Mapping[str, str] = {"qsgd": "LEVELS", "topk": "RATIO", "powersgd": "RANK"}
CODECS: Mapping[str, Callable[[str], Codec]] = {
    NONE: lambda _: Plain(),
    "fp16": lambda _: Fp16(),
    "bf16": lambda _: Bf16(),
    "int8": lambda _: Int8(),
    "qsgd": _levels,
    "topk": _ratio,
    "sign": lambda _: Sign(),
    "powersgd": _rank,
}
SPELLINGS = tuple(f"{name}:{PARAMETERS[name]}" if name in PARAMETERS else name for name in CODECS)
