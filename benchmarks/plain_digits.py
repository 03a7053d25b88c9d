"""Federated averaging on `digits` as one would write it in one loop: the reference of `benchmarks/training.py`.

    python -m benchmarks.plain_digits
    python -m benchmarks.plain_digits digits.csv.gz

Ten participants, SGD 0.1, batches of 32, one epoch, 20 rounds, the accuracy after each on the fifth held out. The
data comes from scikit-learn, or from that file, without importing scikit-learn, which takes a second.
"""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

PARTICIPANTS, ROUNDS, BATCH, LR, HELD_OUT = 10, 20, 32, 0.1, 0.2


def load(file: str = "") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if file:
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x, y


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(42)
    rng = np.random.default_rng(42)
    x, y = load(*sys.argv[1:])
    inputs, targets = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    order = rng.permutation(len(x))
    held_out, train = np.split(order, [int(HELD_OUT * len(x))])
    shards = np.array_split(train, PARTICIPANTS)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    history = []
    for _ in range(ROUNDS):
        start = copy.deepcopy(model.state_dict())
        mean = {name: torch.zeros_like(value) for name, value in start.items()}
        for shard in shards:
            model.load_state_dict(start)
            for batch in torch.split(torch.from_numpy(rng.permutation(shard)), BATCH):
                model.zero_grad()
                F.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.sub_(parameter.grad, alpha=LR)
            for name, value in model.state_dict().items():
                mean[name].add_(value, alpha=len(shard) / len(train))
        model.load_state_dict(mean)
        with torch.inference_mode():
            outputs = model(inputs[held_out])
            history.append((outputs.argmax(dim=1) == targets[held_out]).double().mean().item())
    print(json.dumps({"accuracy": history[-1]}))


if __name__ == "__main__":
    main()
