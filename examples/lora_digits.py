"""LoRA adapters on a frozen network: handwritten digits, and participants that can afford ranks 4, 8 and 16.

From the project's folder:
fluffle simulate examples.lora_digits:TASK --strategy lora-stack --set study.lora_ranks=4,8,16 --rounds 10
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fluffle import Dataset, TaskDefinition

ALPHA = 16.0  # the same for every rank
HIDDEN = 128


class LoraLinear(nn.Module):
    """y = W x + b + (ALPHA / rank) B A x (Hu et al., 2022), with the names that PEFT gives to A and B. W and b are
    frozen and the same everywhere, so they do not travel."""

    def __init__(self, into: int, out: int, rank: int) -> None:
        super().__init__()
        base = nn.Linear(into, out)  # drawn before anything that depends on the rank
        self.register_buffer("weight", base.weight.detach(), persistent=False)
        self.register_buffer("bias", base.bias.detach(), persistent=False)
        self.lora_A = nn.Linear(into, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def model(rank: int = 16) -> nn.Module:
    """The frozen weights have a seed of their own: or they would depend on how many adapters were drawn before."""
    layers: list[nn.Module] = []
    for number, (into, out) in enumerate([(64, HIDDEN), (HIDDEN, 10)]):
        torch.manual_seed(number)
        layers += [LoraLinear(into, out, rank), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load() -> Dataset:
    """`x` (1797, 64) in [0, 1], `y` (1797,)."""
    digits = load_digits()
    return Dataset(digits.data / digits.data.max(), digits.target, name="digits")


TASK = TaskDefinition(
    name="lora-digits", model=model, load=load, defaults={"lr": 0.05, "batch_size": 16, "local_epochs": 2}
)
