"""A small GPT that learns Shakespeare's plays character by character.

From the project's folder: fluffle simulate examples.gpt_from_scratch.gpt:TASK --strategy diloco
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluffle import TaskDefinition
from workers.tasks.shakespeare import CHARACTERS, SYMBOLS, WINDOW, load

WIDTH, HEADS, LAYERS = 64, 4, 2


class Block(nn.Module):
    """Attention to what came before, then a layer for each position; both add to what is there (pre-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.joined(self._attend(self.attention(self.norm_1(x))))
        narrow: Tensor = self.narrow(F.gelu(self.wide(self.norm_2(x))))
        return x + narrow

    def _attend(self, projected: Tensor) -> Tensor:
        examples, positions, _ = projected.shape
        split = projected.reshape(examples, positions, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = split
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return found.transpose(1, 2).reshape(examples, positions, WIDTH)


class GPT(nn.Module):
    """As GPT-2, but small: learned positions, 2 layers, 4 heads, 64 wide, 117,600 parameters, no dropout.

    From (n, T) characters, T at most 80, to scores (n, 96, T) of the character after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.scores = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        placed = self.embedding(x.long()) + self.positions(torch.arange(x.shape[1]))
        scores: Tensor = self.scores(self.norm(self.blocks(placed)))
        return scores.transpose(1, 2)


TASK = TaskDefinition(
    name="gpt-from-scratch",
    summary="next character of a play, a GPT of 117,600 parameters",
    model=GPT,
    load=load,
    preprocess=CHARACTERS,
    held_out=0.04,
    defaults={
        "optimiser": "adamw", "lr": 3e-3, "beta_2": 0.99, "weight_decay": 0.1, "batch_size": 4, "local_epochs": 1,
        "max_steps": 100,
    },
)  # fmt: skip
