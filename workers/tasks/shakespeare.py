"""Shakespeare: the next character, one speaker a participant (McMahan et al. 2017; LEAF, Caldas et al. 2018).

423 speakers of 36 plays, with at least 2,000 characters each. A speaker's text is cut into windows of 80 characters
that do not overlap (stride 80); what is left at its end, less than a window, is not used. A model predicts the next
character after each of the 80, so every character is the target of one window only. Held out are the last windows
of each speaker, as in LEAF's split by time.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from broker.errors import DataError
from workers.data import SHIPPED, Dataset
from workers.preprocess import Preprocess
from workers.torch_task import TaskDefinition

WINDOW = 80  # characters that a model sees, and the stride
SYMBOLS = 96  # the line break is 0, the printable characters of ASCII are 1 to 95
WIDTH, HEADS, LAYERS = 64, 4, 2  # of the transformer

Symbols = NDArray[np.uint8]


def load(place: str = "") -> Dataset:
    """`x` and `y` (n, 80) uint8: 80 characters, and for each the one after it. `group`: play and speaker.

    With `place`, one speaker's own text from that file. Raises DataError if it is too short, or no text.
    """
    source = place or "36 plays of Shakespeare, 423 speakers with at least 2,000 characters each (shipped)"
    texts = {"own": _own_text(Path(place))} if place else dict(speakers())
    windows = {name: cut(symbols_of(text)) for name, text in texts.items()}
    return Dataset(
        x=np.concatenate([x for x, _ in windows.values()]),
        y=np.concatenate([y for _, y in windows.values()]),
        name="shakespeare",
        source=source,
        group=None if place else np.repeat(list(windows), [len(x) for x, _ in windows.values()]),
        in_time=True,
    )


def symbols_of(text: str) -> Symbols:
    """One number for each character: line breaks and control characters 0, others that are not ASCII a '?'."""
    codes = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)
    return np.clip(codes, 31, 126) - np.uint8(31)


def text_of(symbols: NDArray[np.integer]) -> str:
    """The characters that these numbers stand for."""
    return "".join("\n" if symbol == 0 else chr(symbol + 31) for symbol in symbols.tolist())


def cut(symbols: Symbols) -> tuple[Symbols, Symbols]:
    """Windows (n, 80) one after the other, and the same a character further on."""
    used = (len(symbols) - 1) // WINDOW * WINDOW
    if used < WINDOW:
        raise DataError(f"a text of {len(symbols)} characters is too short: a window takes {WINDOW + 1}")
    return symbols[:used].reshape(-1, WINDOW), symbols[1 : used + 1].reshape(-1, WINDOW)


def speakers() -> Iterator[tuple[str, str]]:
    with gzip.open(SHIPPED / "shakespeare_speakers.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            speaker = json.loads(line)
            yield f"{speaker['play']} {speaker['speaker']}", speaker["text"]


def _own_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None


class CharLSTM(nn.Module):
    """As in McMahan et al. 2017: characters as 8 numbers each, two layers of LSTM, but of 128 units, not 256.

    From (n, T) to scores (n, 96, T) of the character after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 8)
        self.lstm = nn.LSTM(8, 128, num_layers=2, batch_first=True)
        self.scores = nn.Linear(128, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        seen, _ = self.lstm(self.embedding(x.long()))
        scores: Tensor = self.scores(seen)
        return scores.transpose(1, 2)


class Block(nn.Module):
    """Attention to what came before, then a layer for each position; both add to what is there (pre-norm).

    Written out, as `vmap` does not know torch's own causal attention on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_wide = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.joined(self._attend(self.attention(self.before_attention(x))))
        wide: Tensor = self.wide(self.before_wide(x))
        return x + wide

    def _attend(self, projected: Tensor) -> Tensor:
        examples, positions, _ = projected.shape
        split = projected.reshape(examples, positions, 3, HEADS, WIDTH // HEADS)
        query, key, value = (split[:, :, part].transpose(1, 2) for part in range(3))
        later = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        likeness = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        found = likeness.masked_fill(later, -torch.inf).softmax(dim=3) @ value
        return found.transpose(1, 2).reshape(examples, positions, WIDTH)


class CharTransformer(nn.Module):
    """A small causal transformer: learned positions (at most 80), 2 layers, 4 heads, 64 wide, no dropout.

    From (n, T) to scores (n, 96, T) of the character after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.scores = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        placed = self.embedding(x.long()) + self.positions(torch.arange(x.shape[1]))
        scores: Tensor = self.scores(self.norm(self.blocks(placed)))
        return scores.transpose(1, 2)


CHARACTERS = Preprocess(symbols=SYMBOLS)

LSTM = TaskDefinition(
    name="shakespeare-lstm",
    summary="next character of a play, 423 speakers, two layers of LSTM",
    model=CharLSTM,
    load=load,
    preprocess=CHARACTERS,
    defaults={"lr": 3.0, "batch_size": 10, "local_epochs": 1, "max_steps": 30},
)

TRANSFORMER = TaskDefinition(
    name="shakespeare-transformer",
    summary="next character of a play, 423 speakers, a small transformer",
    model=CharTransformer,
    load=load,
    preprocess=CHARACTERS,
    defaults={"lr": 0.1, "momentum": 0.9, "batch_size": 10, "local_epochs": 1, "max_steps": 30},
)
