"""Federated standardisation: exact pooled statistics, and no participant sees another's.

The statistics are buffers of the model, so they travel like every other array and need no protocol of their
own. Inputs are first brought to a magnitude of about 1 by a public `Reference` (see `preprocess.py`).

* Round 1 is the statistics round: each participant answers with its own moments in the buffers and leaves the
  parameters alone. FedAvg weighs by num_examples, and the mean of moments so weighted is the pooled moment.
* From round 2 on the buffers are used and returned as they came.

With n_i examples at participant i, of which some lack the value: `observed` = share of examples that have it,
`mean` and `mean_square` = sums of x and x^2 over those that have it, divided by n_i. All three average exactly;
the pooled mean is mean / observed and the pooled variance mean_square / observed - (mean / observed)^2.

It covers the participants that answered round 1, with step size 1 at the aggregator. A late answer to round 1
folded into a later round, or one that was clipped, noised or compressed, makes the statistics approximate.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from broker.errors import DataError

STATISTICS_ROUND = 1
LARGEST_MOMENT = 1000.0  # aggregators refuse values above 1024


class FederatedScaler(nn.Module):
    """First layer of a model on (n, features): standardises by the federated statistics; does nothing before them.

    A missing value (NaN) becomes the federated mean. A feature whose federated variance (in units of the
    reference's scale) is at most `min_variance` is switched off: it becomes 0 and the model keeps its shape.
    """

    mean: Tensor
    mean_square: Tensor
    observed: Tensor

    def __init__(self, features: int, min_variance: float = 1e-4) -> None:
        super().__init__()
        self.min_variance = min_variance
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("mean_square", torch.ones(features))
        self.register_buffer("observed", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        share = self.observed.clamp_min(1e-6)
        mean = self.mean / share
        variance = self.mean_square / share - mean.square()
        useful = variance > self.min_variance
        scale = torch.where(useful, variance, torch.inf).rsqrt()
        return torch.where(torch.isnan(x), 0.0, (x - mean) * scale)


def local_moments(x: NDArray[np.float32], columns: tuple[str, ...] = ()) -> dict[str, NDArray[np.float32]]:
    """One participant's buffers from its inputs (n, features), each (features,).

    Raises DataError naming the column if the public reference is so far off that the values could not travel.
    """
    there = ~np.isnan(x)
    values = np.where(there, x, 0.0).astype(np.float64)
    moments = {
        "mean": values.mean(axis=0),
        "mean_square": np.square(values).mean(axis=0),
        "observed": there.mean(axis=0),
    }
    far = np.flatnonzero(moments["mean_square"] > LARGEST_MOMENT)
    if len(far):
        column = repr(columns[far[0]]) if columns else f"number {far[0]}"
        raise DataError(
            f"column {column} has mean square {moments['mean_square'][far[0]]:.3g} after the public reference, "
            f"above {LARGEST_MOMENT:g}: correct preprocess.reference for it, or its values"
        )
    return {name: moment.astype(np.float32) for name, moment in moments.items()}
