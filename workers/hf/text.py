"""Texts as a model takes them: tokens, padded batches for classifiers, packed blocks for language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker.errors import DataError
from workers.data import Dataset
from workers.task import Arrays

IGNORED = -100  # the label of a token that no loss counts
IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
LATER = ("token_type_ids",)  # further inputs that some models want
Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Examples:
    """`columns`: for each input of the model the tokens of each example, of any length. `targets` (n,): classes, or
    for a language model how many tokens of each example the loss counts."""

    columns: Mapping[str, Sequence[Tokens]]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to_arrays(self) -> Iterator[NDArray[np.int64]]:
        """Everything, one array after the other."""
        yield self.targets.numpy()
        for _, rows in sorted(self.columns.items()):
            yield np.array([len(row) for row in rows], np.int64)
            yield from rows

    def taken(self, rows: Tensor) -> Arrays:
        """These examples, as a few arrays."""
        chosen = rows.tolist()
        found = {"targets": self.targets[rows].numpy()}
        for name, tokens in self.columns.items():
            some = [tokens[row] for row in chosen]
            found[f"tokens/{name}"] = np.concatenate([np.empty(0, np.int64), *some])
            found[f"lengths/{name}"] = np.array([len(row) for row in some], np.int64)
        return found

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Examples:
        """What `taken` gave."""
        columns = {
            name.removeprefix("lengths/"): np.split(
                arrays[name.replace("lengths/", "tokens/")], np.cumsum(lengths)[:-1]
            )
            for name, lengths in arrays.items()
            if name.startswith("lengths/")
        }
        return cls(columns, torch.from_numpy(arrays["targets"]))

    def batch(self, rows: Tensor, padding: int) -> dict[str, Tensor]:
        """These examples, each column (n, longest) int64, and which tokens are there."""
        chosen = rows.tolist()
        fill = {IDS: padding, LABELS: IGNORED}
        found = {
            name: _padded([tokens[row] for row in chosen], fill.get(name, 0))
            for name, tokens in self.columns.items()
        }
        return found | {MASK: _padded([np.ones_like(self.columns[IDS][row]) for row in chosen], 0)}


@dataclass(frozen=True, slots=True)
class TextReport:
    """What was made of one participant's texts. `full`: texts that fill `max_length` tokens, and
    were cut at it unless they fit exactly."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    full: int = 0

    def to_dict(self) -> dict[str, int]:
        return {"rows": self.rows, "examples": self.examples, "tokens": self.tokens, "full": self.full}


def nothing() -> tuple[Examples, TextReport]:
    return Examples({IDS: []}, torch.empty(0, dtype=torch.int64)), TextReport()


def classified(data: Dataset, tokenizer: Any, max_length: int) -> tuple[Examples, TextReport]:
    """Texts (n,), or pairs of texts (n, 2), cut at `max_length` tokens. Raises DataError if they are none."""
    texts = _texts(data)
    if not len(texts):
        return nothing()
    parts = [column.tolist() for column in texts.T]
    made = tokenizer(*parts, truncation=True, max_length=max_length)
    columns = {name: [np.array(row, np.int64) for row in made[name]] for name in (IDS, *LATER) if name in made}
    tokens = sum(map(len, columns[IDS]))
    report = TextReport(len(data), len(data), tokens, sum(len(row) == max_length for row in columns[IDS]))
    return Examples(columns, torch.from_numpy(data.y.astype(np.int64))), report


def packed(data: Dataset, tokenizer: Any, max_length: int) -> tuple[Examples, TextReport]:
    """Texts (n,) one after the other, an end-of-text token behind each, cut into blocks of `max_length` tokens. Of
    pairs (n, 2), a prompt and what is to follow, the loss counts what follows only. The last block may be shorter.

    Raises DataError if they are no texts.
    """
    texts = _texts(data)
    if not len(texts):
        return nothing()
    ids, labels = _joined(texts, tokenizer)
    starts = range(0, len(ids), max_length)
    blocks = {
        name: [values[at : at + max_length] for at in starts] for name, values in ((IDS, ids), (LABELS, labels))
    }
    counted = [int((block[1:] != IGNORED).sum()) for block in blocks[LABELS]]
    some = [number for number, count in enumerate(counted) if count]  # from others nothing is learned
    columns = {name: [column[number] for number in some] for name, column in blocks.items()}
    report = TextReport(len(data), len(some), len(ids), 0)
    return Examples(columns, torch.tensor([counted[number] for number in some], dtype=torch.int64)), report


def _joined(texts: NDArray[Any], tokenizer: Any) -> tuple[Tokens, Tokens]:
    """The tokens of all, and their labels: themselves, or IGNORED."""
    columns = [tokenizer(column.tolist(), add_special_tokens=False, verbose=False)[IDS] for column in texts.T]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [[*chain.from_iterable(parts), *end] for parts in zip(*columns, strict=True)]
    prompts = [len(parts[0]) if len(parts) > 1 else 0 for parts in zip(*columns, strict=True)]
    labels = [[IGNORED] * prompt + row[prompt:] for row, prompt in zip(ids, prompts, strict=True)]
    return tuple(np.fromiter(chain.from_iterable(rows), np.int64) for rows in (ids, labels))  # type: ignore[return-value]


def _texts(data: Dataset) -> NDArray[Any]:
    """(n, 1) or (n, 2)."""
    texts = data.x.reshape(len(data), -1)
    if len(data) and (texts.shape[1] > 2 or not all(isinstance(text, str) for text in texts.ravel())):
        raise DataError(f"data set {data.name!r}: this task wants texts (n,) or pairs of texts (n, 2) as x")
    return texts


def _padded(rows: Sequence[Tokens], fill: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)
