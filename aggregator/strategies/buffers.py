"""Which of a model's tensors are parameters, that a strategy's step may move, and which are only averaged."""

from __future__ import annotations

from collections.abc import Collection

from broker.tensors import Arrays


def parameters(model: Arrays, buffers: Collection[str]) -> frozenset[str]:
    """The names of the parameters: what is floating-point and no buffer.

    A tensor is a buffer if `buffers` has its name, or what stands behind the last dot of it: BatchNorm's variance
    `layer1.bn.running_var` is one because of `running_var`. Buffers and integers are statistics and counters; their
    new value is the weighted mean of the participants' values, whatever the strategy does with parameters.
    """
    return frozenset(
        name
        for name, values in model.items()
        if values.dtype.kind == "f" and not {name, name.rpartition(".")[2]} & set(buffers)
    )
