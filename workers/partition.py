"""Sharing one data set out among participants, as experiments need it. Pure: the same seed, the same shards.

`iid` mixes well; `dirichlet:ALPHA` skews the labels (Hsu, Qi and Brown 2019; small ALPHA, strong skew);
`quantity:ALPHA` skews the sizes and mixes the labels (Li, Diao, Chen and He 2022); `shards:K` sorts by label and
deals K pieces to each (McMahan et al. 2017); `natural` keeps each group whole: with as many participants as groups
each is one, with fewer whole groups are dealt out, the largest first, each to whoever has least by then.

Held-out examples are chosen first, by a seed of their own, then all examples are dealt out: a participant
evaluates on the held-out examples among its own, and the union of those is the test set for central
evaluation. So nobody trains on a test example, and federated, central and local training see the same data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from broker.errors import ConfigError, DataError
from broker.topology import PARTICIPANT
from workers.data import Dataset, Indices, Mask, held_out_mask, rows_by_name

FORMS = (
    "iid, dirichlet:ALPHA (ALPHA > 0, such as dirichlet:0.5), quantity:ALPHA (ALPHA > 0, such as quantity:0.5), "
    "shards:K (K >= 1, such as shards:2), natural"
)
LEAST_EXAMPLES = 10
DIRICHLET_TRIES = 1000
THIN = 2  # tells which examples are left out from how the others are dealt
DEAL = 1  # keeps dealing apart from holding out: under one seed both would draw the same permutation
FLOAT = r"\d+(?:\.\d+)?(?:e-?\d+)?"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a data set is shared out. `seed` deals the examples; `held_out` and `split_seed` choose the test set.

    `imbalance` above 1 thins the classes of the training examples first: the first class has so many times as many
    as the last, and those between fall off exponentially (Cao et al., 2019). The test set stays as it is.
    """

    participants: int = 10
    partition: str = "iid"
    seed: int = 42
    held_out: float = 0.2
    split_seed: int = 42
    imbalance: float = 1.0


@dataclass(frozen=True, slots=True)
class Shard:
    """What one participant has: examples to train on, and examples to evaluate on."""

    name: str
    train: Dataset
    held_out: Dataset


@dataclass(frozen=True, slots=True)
class Shares:
    """A data set shared out. `train` and `held_out` are the unions of the shards' (in the data's own order)."""

    train: Dataset
    held_out: Dataset
    shards: tuple[Shard, ...]


def share_out(dataset: Dataset, plan: Plan) -> Shares:
    """Everybody's training and held-out examples. Raises ConfigError or DataError with the remedy."""
    mask = held_out_mask(dataset, plan.held_out, plan.split_seed)
    if plan.imbalance != 1:
        kept = mask | thinned(dataset, ~mask, plan.imbalance, np.random.default_rng([THIN, plan.seed]))
        dataset, mask = dataset.take(kept), mask[kept]
    owners = _assign(dataset, plan.partition, plan.participants, plan.seed)
    shards = tuple(
        Shard(name, dataset.take(rows[~mask[rows]]), dataset.take(rows[mask[rows]]))
        for name, rows in zip(shard_names(dataset, plan.partition, plan.participants), owners, strict=True)
    )
    for shard in shards:
        if not len(shard.train) or (plan.held_out > 0 and not len(shard.held_out)):
            raise DataError(
                f"data set {dataset.name!r}: {plan.partition} leaves {shard.name} {len(shard.train)} training and "
                f"{len(shard.held_out)} held-out examples: use fewer participants, less skew or another seed"
            )
    return Shares(dataset.take(~mask), dataset.take(mask), shards)


def thinned(dataset: Dataset, among: Mask, factor: float, rng: Generator) -> Mask:
    """Which of these examples stay so that class i of k has factor^(-i / (k - 1)) times those of the first, and as
    many as there can be. Raises ConfigError for measured targets or a factor below 1, DataError for one class."""
    if not np.issubdtype(dataset.y.dtype, np.integer) or not 1 <= factor < float("inf"):
        raise ConfigError(
            f"data.imbalance = {factor:g} for data set {dataset.name!r}: use 1 or more, for class labels only"
        )
    by_class = [np.flatnonzero(among & (dataset.y == label)) for label in np.unique(dataset.y[among])]
    if len(by_class) < 2:
        raise DataError(f"data set {dataset.name!r} has one class only: set data.imbalance = 1")
    share = factor ** -(np.arange(len(by_class)) / (len(by_class) - 1))
    most = min(len(rows) / part for rows, part in zip(by_class, share, strict=True))
    stays = np.zeros(len(dataset), dtype=np.bool_)
    for rows, part in zip(by_class, share, strict=True):
        stays[rng.permutation(rows)[: max(1, round(most * part))]] = True
    return stays


def partition(dataset: Dataset, spec: str, participants: int, seed: int) -> list[Dataset]:
    """Every example in exactly one of `participants` shards, each in the data's own order.

    Raises ConfigError for a form that is unknown or impossible here, DataError if a shard would be too small.
    """
    return [dataset.take(rows) for rows in _assign(dataset, spec, participants, seed)]


def participant_names(participants: int) -> list[str]:
    """`p01`, `p02`, ... wide enough to sort."""
    width = max(2, len(str(participants)))
    return [f"p{number:0{width}d}" for number in range(1, participants + 1)]


def shard_names(dataset: Dataset, spec: str, participants: int) -> list[str]:
    """Who the shards belong to: the groups' names if each participant is one group, numbers otherwise."""
    names = _group_names(dataset) if spec == "natural" else []
    return names if len(names) == participants else participant_names(participants)


def _assign(dataset: Dataset, spec: str, participants: int, seed: int) -> list[Indices]:
    if participants < 1:
        raise ConfigError(f"participants = {participants}: at least one is needed")
    deal = _parse(spec)
    if len(dataset) < participants:
        raise DataError(
            f"data set {dataset.name!r} has {len(dataset)} examples for {participants} participants: use fewer"
        )
    rng = np.random.default_rng([DEAL, seed])
    return [np.sort(rows) for rows in deal(dataset, participants, rng)]


Deal = Callable[[Dataset, int, Generator], Sequence[Indices]]


def _parse(spec: str) -> Deal:
    if spec == "iid":
        return _iid
    if spec == "natural":
        return _natural
    if (match := re.fullmatch(f"dirichlet:({FLOAT})", spec)) and 0 < (alpha := float(match[1])) < float("inf"):
        return lambda dataset, n, rng: _dirichlet(dataset, n, rng, alpha)
    if (match := re.fullmatch(f"quantity:({FLOAT})", spec)) and 0 < (alpha := float(match[1])) < float("inf"):
        return lambda dataset, n, rng: _quantity(dataset, n, rng, alpha)
    if (match := re.fullmatch(r"shards:(\d{1,6})", spec)) and (each := int(match[1])):
        return lambda dataset, n, rng: _shards(dataset, n, rng, each)
    raise ConfigError(f"partition {spec!r} is not one of: {FORMS}")


def _iid(dataset: Dataset, participants: int, rng: Generator) -> list[Indices]:
    return np.array_split(rng.permutation(len(dataset)), participants)


def _shards(dataset: Dataset, participants: int, rng: Generator, each: int) -> list[Indices]:
    pieces = participants * each
    _demand_labels(dataset, f"shards:{each}")
    if pieces > len(dataset):
        raise ConfigError(
            f"partition shards:{each} for {participants} participants needs {pieces} pieces, but data set "
            f"{dataset.name!r} has {len(dataset)} examples: use fewer of either"
        )
    by_label = np.array_split(np.argsort(dataset.y, kind="stable"), pieces)
    hands = rng.permutation(pieces).reshape(participants, each)
    return [np.concatenate([by_label[piece] for piece in hand]) for hand in hands]


def _dirichlet(dataset: Dataset, participants: int, rng: Generator, alpha: float) -> list[Indices]:
    """Draws each class's proportions over the participants until everybody has enough examples."""
    _demand_labels(dataset, f"dirichlet:{alpha:g}")
    if not np.issubdtype(dataset.y.dtype, np.integer):
        raise ConfigError(
            f"partition dirichlet:{alpha:g} needs class labels, but the targets of data set {dataset.name!r} are "
            "measured numbers: use iid or shards:K"
        )
    least = min(LEAST_EXAMPLES, len(dataset) // participants)
    for _ in range(DIRICHLET_TRIES):
        owner = _draw_owners(dataset.y, participants, rng, alpha)
        if np.bincount(owner, minlength=participants).min() >= least:
            return [np.flatnonzero(owner == number) for number in range(participants)]
    raise DataError(
        f"data set {dataset.name!r}: in {DIRICHLET_TRIES} draws of dirichlet:{alpha:g} somebody among "
        f"{participants} participants got fewer than {least} examples: use fewer participants or a larger ALPHA"
    )


def _quantity(dataset: Dataset, participants: int, rng: Generator, alpha: float) -> list[Indices]:
    """Draws everybody's share until each has enough examples, and deals them well mixed."""
    least = min(LEAST_EXAMPLES, len(dataset) // participants)
    for _ in range(DIRICHLET_TRIES):
        ends = np.rint(np.cumsum(rng.dirichlet(np.full(participants, alpha))) * len(dataset)).astype(np.intp)
        if np.diff(ends, prepend=0).min() >= least:
            return np.split(rng.permutation(len(dataset)), ends[:-1])
    raise DataError(
        f"data set {dataset.name!r}: in {DIRICHLET_TRIES} draws of quantity:{alpha:g} somebody among "
        f"{participants} participants got fewer than {least} examples: use fewer participants or a larger ALPHA"
    )


def _demand_labels(dataset: Dataset, spec: str) -> None:
    if dataset.y.ndim != 1:
        raise ConfigError(
            f"partition {spec} needs one target for each example, but those of data set {dataset.name!r} are "
            f"sequences of {dataset.y.shape[1:]}: use iid or natural"
        )


def _draw_owners(labels: NDArray[np.integer], participants: int, rng: Generator, alpha: float) -> Indices:
    owner = np.empty(len(labels), dtype=np.intp)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(participants, alpha))) * len(rows)
        owner[rows] = np.searchsorted(ends[:-1], np.arange(len(rows)), side="right")
    return owner


def _natural(dataset: Dataset, participants: int, _: Generator) -> list[Indices]:
    names = _group_names(dataset)
    if len(names) < participants:
        raise ConfigError(
            f"partition natural: data set {dataset.name!r} has {len(names)} groups ({', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}), fewer than {participants}: ask for {len(names)} "
            "participants or fewer"
        )
    assert dataset.group is not None
    by_name = zip(np.unique(dataset.group).tolist(), rows_by_name(dataset.group), strict=True)
    groups = [rows for _, rows in sorted(by_name, key=lambda pair: _slug(pair[0]))]
    return groups if len(groups) == participants else _deal_out(groups, participants)


def _deal_out(groups: list[Indices], participants: int) -> list[Indices]:
    """Whole groups, the largest first (the first by name of equals), each to whoever has least by then."""
    hands: list[list[Indices]] = [[] for _ in range(participants)]
    held = np.zeros(participants, dtype=np.intp)
    for group in sorted(groups, key=len, reverse=True):
        hand = int(held.argmin())
        hands[hand].append(group)
        held[hand] += len(group)
    return [np.concatenate(hand) for hand in hands]


def _groups(dataset: Dataset) -> list[str]:
    if dataset.group is None:
        raise ConfigError(
            f"partition natural: data set {dataset.name!r} has no groups: use iid, dirichlet:ALPHA or shards:K"
        )
    return [str(name) for name in dataset.group]


def _group_names(dataset: Dataset) -> list[str]:
    """The groups as participants' names, sorted. Raises DataError if two groups would share one name."""
    groups = sorted(set(_groups(dataset)))
    names = sorted({_slug(name) for name in groups})
    if len(names) != len(groups) or not all(re.fullmatch(PARTICIPANT, name) for name in names):
        raise DataError(
            f"data set {dataset.name!r}: the groups {groups[:10]} do not make distinct names of a-z, 0-9 and '-' "
            "with 1 to 40 characters: rename them"
        )
    return names


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
