"""The lossless stage: Zstandard (RFC 8878) over a safetensors file whose values are shuffled by bytes.

Within each tensor all first bytes come first, then all second ones, and so on: signs and exponents, which resemble
each other, lie side by side, as in Blosc's shuffle (Alted, 2010). The manifest, in front, stays as it is and says
how to undo that.
"""

from __future__ import annotations

import numpy as np
import zstandard

from broker.errors import BadMessage
from broker.tensors import DTYPES, Buffer, manifest_of

LEVEL = 3


def squeeze(blob: Buffer) -> bytes:
    """A safetensors file, smaller."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(_shuffled(blob, back=False))


def unsqueeze(squeezed: Buffer, most_bytes: int) -> bytearray:
    """What `squeeze` was given. Raises BadMessage, before memory is taken, if that is larger than `most_bytes`."""
    try:
        size = zstandard.get_frame_parameters(squeezed).content_size
        if not 0 <= size <= most_bytes:
            raise BadMessage(f"the update says that it unpacks to {size} bytes, of which {most_bytes} are allowed")
        blob = zstandard.ZstdDecompressor().decompress(squeezed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadMessage(f"the update is no Zstandard frame: {error}") from None
    return _shuffled(blob, back=True)


def _shuffled(blob: Buffer, *, back: bool) -> bytearray:
    shuffled = bytearray(blob)
    for spec in manifest_of(blob):
        width = DTYPES[spec.dtype].itemsize
        if width > 1:
            _shuffle(
                memoryview(blob)[spec.begin : spec.end], memoryview(shuffled)[spec.begin : spec.end], width, back
            )
    return shuffled


def _shuffle(one: memoryview, other: memoryview, width: int, back: bool) -> None:  # noqa: FBT001
    """Byte k of each value of `width` bytes lies in plane k."""
    values, planes = (other, one) if back else (one, other)
    by_value, by_plane = (
        np.frombuffer(values, np.uint8).reshape(-1, width),
        np.frombuffer(planes, np.uint8).reshape(width, -1),
    )
    for k in range(width):
        if back:
            by_value[:, k] = by_plane[k]
        else:
            by_plane[k] = by_value[:, k]
