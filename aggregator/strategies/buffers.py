"""Which of a model's tensors are parameters, that a strategy's step may move, and which are only averaged."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from broker.tensors import Arrays


def parameters(model: Arrays, buffers: Collection[str]) -> frozenset[str]:
    """The names of the parameters: what is floating-point and no buffer.

    A tensor is a buffer if one of the patterns in `buffers` matches its name: BatchNorm's variance
    `layer1.bn.running_var` is one because of `*running_var`. Buffers and integers are statistics and counters;
    their new value is the weighted mean of the participants' values, whatever the strategy does with parameters.
    """
    return frozenset(
        name
        for name, values in model.items()
        if values.dtype.kind == "f" and not any(fnmatchcase(name, pattern) for pattern in buffers)
    )
