"""Which codec a worker uses: the most faithful that its link and processor carry without holding up the round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from broker.codecs import NONE, Packing, is_known, packing

UNKNOWN_LINK = 1e6  # bytes a second, until an upload was measured
UNKNOWN_ENCODER = 100e6  # bytes of the model a second
LEAST_BYTES = 64 << 10  # of an upload that tells how fast the link is: shorter ones tell how far it is
NEWEST = 0.5  # weight of the newest measurement
HOPE = 1.25  # with each upload too short to tell, the link may have become better
PATIENCE_S, PATIENCE_SHARE = 1.0, 0.1  # an upload may take so long, or that share of the training


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker has seen so far: bytes a second that were confirmed, seconds of the last training, and how many
    bytes of a model a second each codec encoded."""

    link: float = UNKNOWN_LINK
    trained_s: float = 0.0
    encoders: Mapping[str, float] = field(default_factory=dict)

    def after_upload(self, size_bytes: int, seconds: float) -> Measured:
        if size_bytes < LEAST_BYTES or seconds <= 0:
            return replace(self, link=self.link * HOPE)
        return replace(self, link=self.link + NEWEST * (size_bytes / seconds - self.link))

    def after_work(self, codec: str, model_bytes: int, trained_s: float, encoded_s: float) -> Measured:
        speed = model_bytes / max(encoded_s, 1e-6)
        return replace(self, trained_s=trained_s, encoders={**self.encoders, codec: speed})


def choose(allowed: Sequence[str], model_bytes: int, seen: Measured) -> Packing:
    """The first of the allowed codecs whose update is ready and sent in time; if none is, the quickest.

    They are named with the most faithful first. Those that this worker does not know are left out; who knows none
    of them sends arrays as they are.
    """
    known = [packing(name) for name in allowed if is_known(name)] or [packing(NONE)]
    patience_s = max(PATIENCE_S, PATIENCE_SHARE * seen.trained_s)
    in_time = (one for one in known if seconds_of(one, model_bytes, seen) <= patience_s)
    return next(in_time, min(known, key=lambda one: seconds_of(one, model_bytes, seen)))


def seconds_of(codec: Packing, model_bytes: int, seen: Measured) -> float:
    """How long encoding and sending take, as far as can be told."""
    encode_s = model_bytes / seen.encoders.get(codec.name, UNKNOWN_ENCODER) if codec.name != NONE else 0.0
    return encode_s + codec.codec.share * model_bytes / seen.link
