"""Error feedback: what a biased codec loses of one update is added to the next.

owed = delta + residual; what travels is encode(owed); the new residual is owed - decode(what travels). So, whatever
the codec does, the sum of all that was decoded and the last residual are the sum of all deltas (Karimireddy et al.,
2019, equation 2), up to the rounding of these two additions.

A residual grows stale while its participant is not asked: for each round that it missed it is halved.
"""

from __future__ import annotations

import numpy as np

from broker.codecs.layout import is_float
from broker.errors import BadMessage
from broker.tensors import Arrays, Named

DECAY = 0.5  # for each round missed


def owed(delta: Named, residual: Arrays, missed: int = 0) -> Arrays:
    """delta + residual, in float32 at least; integers and what has no residual stay as they are."""
    factor = np.float32(DECAY**missed)
    return {name: _wide_sum(array, residual.get(name), factor) for name, array in delta.items()}


def _wide_sum(array: np.ndarray, left: np.ndarray | None, factor: np.float32) -> np.ndarray:
    if not is_float(array):
        return array
    wide = array.astype(np.result_type(array, np.float32), copy=False)
    return wide if left is None else wide + left * factor


def left_over(due: Arrays, decoded: Named) -> Arrays:
    """What of `due` was not in what travelled: the new residual."""
    return {
        name: np.subtract(array, decoded[name], dtype=array.dtype) for name, array in due.items() if is_float(array)
    }


def check_residual(residual: Arrays, delta: Arrays) -> None:
    """Raises BadMessage unless the residual is one of arrays with these names, shapes and dtypes."""
    like = {name: array for name, array in delta.items() if is_float(array)}
    if residual.keys() - like.keys():
        raise BadMessage(f"tensor {min(residual.keys() - like.keys())!r} is none of this model")
    for name, left in residual.items():
        if (left.shape, left.dtype) != (like[name].shape, np.result_type(like[name], np.float32)):
            raise BadMessage(f"tensor {name!r} is {left.dtype} {left.shape}, the model's is {like[name].shape}")
