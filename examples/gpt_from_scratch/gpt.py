"""A small GPT that learns Shakespeare's plays character by character.

From the project's folder: fluffle simulate examples.gpt_from_scratch.gpt:TASK --strategy diloco
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluffle import TaskDefinition
from workers.tasks.shakespeare import CHARACTERS, SYMBOLS, WINDOW, load

WIDTH, HEADS, LAYERS = 32, 4, 2


def distances() -> Tensor:
    """What each head adds to its scores (HEADS, T, T): less the further back, and nothing from what comes later
    (ALiBi: Press et al., 2022). The heads' slopes are 1/4, 1/16, 1/64 and 1/256."""
    positions = torch.arange(WINDOW)
    back = (positions[:, None] - positions).float()
    slopes = 2.0 ** (-8 / HEADS * torch.arange(1, HEADS + 1))
    return (-slopes[:, None, None] * back).masked_fill(back < 0, -torch.inf)


class Block(nn.Module):
    """Attention to what came before, then a layer for each position; both add to what is there (pre-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.distances: Tensor
        self.register_buffer("distances", distances(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.joined(self._attend(self.attention(self.norm_1(x))))
        narrow: Tensor = self.narrow(F.gelu(self.wide(self.norm_2(x))))
        return x + narrow

    def _attend(self, projected: Tensor) -> Tensor:
        examples, length, _ = projected.shape
        split = projected.reshape(examples, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = split
        found = F.scaled_dot_product_attention(query, key, value, self.distances[:, :length, :length])
        return found.transpose(1, 2).reshape(examples, length, WIDTH)


class GPT(nn.Module):
    """As GPT-2, but small and with distances for positions: 2 layers, 4 heads, 32 wide, no dropout.

    From (n, T) characters, T at most 80, to scores (n, 96, T) of the character after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.scores = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.norm(self.blocks(self.embedding(x.long()))))
        return scores.transpose(1, 2)


TASK = TaskDefinition(
    name="gpt-from-scratch",
    summary="next character of a play, a GPT of 31,712 parameters",
    model=GPT,
    load=load,
    preprocess=CHARACTERS,
    held_out=0.02,
    defaults={
        "optimiser": "adamw", "lr": 5e-3, "beta_2": 0.99, "weight_decay": 0.1, "batch_size": 8, "local_epochs": 1,
        "max_steps": 100,
    },
)  # fmt: skip
