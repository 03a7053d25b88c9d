"""Sharing out: nothing lost, nothing twice, the same for the same seed, and impossible wishes refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import ConfigError, DataError
from broker.topology import PARTICIPANT
from workers.data import Dataset
from workers.partition import Plan, participant_names, partition, shard_names, share_out, thinned


def labelled(n: int, classes: int = 10) -> Dataset:
    """Each input is its own number, so that it can be found again."""
    labels = np.random.default_rng(0).integers(classes, size=n)
    return Dataset(x=np.arange(n).reshape(n, 1), y=labels, name="toy")


def grouped(*sizes: int) -> Dataset:
    names = np.concatenate([[f"Site {number} (North)"] * size for number, size in enumerate(sizes)])
    return Dataset(x=np.arange(len(names)).reshape(-1, 1), y=np.zeros(len(names), int), group=names)


SPECS = st.sampled_from(["iid", "shards:1", "shards:3"]) | st.tuples(
    st.sampled_from(["dirichlet", "quantity"]), st.floats(0.1, 100)
).map(lambda skewed: f"{skewed[0]}:{skewed[1]:.3f}")


@settings(deadline=None)
@given(n=st.integers(150, 400), participants=st.integers(1, 8), spec=SPECS, seed=st.integers(0, 1000))
def test_every_example_goes_to_exactly_one_participant(n: int, participants: int, spec: str, seed: int) -> None:
    try:
        parts = partition(labelled(n), spec, participants, seed)
    except DataError:  # sizes may differ too much to leave everybody ten, and it says so
        assert spec.startswith("quantity")
        assert participants > 2
        return
    assert len(parts) == participants
    assert sorted(int(x) for part in parts for x in part.x[:, 0]) == list(range(n))
    again = partition(labelled(n), spec, participants, seed)
    assert all(np.array_equal(a.x, b.x) for a, b in zip(parts, again, strict=True))
    assert min(map(len, parts)) >= 10


@settings(deadline=None)
@given(participants=st.integers(1, 8), seed=st.integers(0, 1000), split_seed=st.integers(0, 1000), spec=SPECS)
def test_nobody_trains_on_a_test_example(participants: int, seed: int, split_seed: int, spec: str) -> None:
    plan = Plan(participants, spec, seed, 0.2, split_seed)
    try:
        shares = share_out(labelled(400), plan)
    except DataError:  # strong skew may leave somebody without held-out examples, and says so
        assert spec.startswith(("dirichlet", "quantity"))
        return
    train, held_out = set(shares.train.x[:, 0]), set(shares.held_out.x[:, 0])
    assert (len(train), len(held_out), len(train & held_out)) == (320, 80, 0)
    assert sorted(x for shard in shares.shards for x in shard.train.x[:, 0]) == sorted(train)
    assert sorted(x for shard in shares.shards for x in shard.held_out.x[:, 0]) == sorted(held_out)


def test_the_test_set_does_not_depend_on_who_takes_part() -> None:
    few = share_out(labelled(400), Plan(2, "iid", seed=1))
    many = share_out(labelled(400), Plan(8, "shards:2", seed=2))
    assert np.array_equal(few.held_out.x, many.held_out.x)


def test_iid_shards_are_even_and_depend_on_the_seed() -> None:
    parts = partition(labelled(103), "iid", 10, 42)
    assert {len(part) for part in parts} == {10, 11}
    assert not np.array_equal(parts[0].x, partition(labelled(103), "iid", 10, 43)[0].x)


def test_small_alpha_skews_labels_more() -> None:
    def largest_class_share(spec: str) -> float:
        parts = partition(labelled(5000), spec, 10, 3)
        return float(np.mean([np.bincount(part.y).max() / len(part) for part in parts]))

    assert largest_class_share("dirichlet:0.1") > 0.4
    assert largest_class_share("dirichlet:1000") < 0.15


def test_quantity_skews_sizes_and_not_labels() -> None:
    def spread(spec: str) -> float:
        return float(
            np.mean([np.std([len(part) for part in partition(labelled(5000), spec, 10, s)]) for s in range(20)])
        )

    alpha, total = 2.0, 10 * 2.0
    expected = 5000 * np.sqrt(0.1 * 0.9 / (total + 1))  # of one share in a Dirichlet draw
    assert spread(f"quantity:{alpha}") == pytest.approx(expected, rel=0.15)
    assert spread("quantity:100") < 200 < spread("quantity:0.5")
    for part in partition(labelled(50_000), "quantity:2", 5, 3):
        np.testing.assert_allclose(np.bincount(part.y) / len(part), 0.1, atol=0.02)
    measured = Dataset(np.zeros((40, 1)), np.linspace(0, 1, 40))
    assert sum(map(len, partition(measured, "quantity:5", 2, 0))) == 40
    with pytest.raises(DataError, match="larger ALPHA"):
        partition(labelled(120), "quantity:0.001", 10, 0)


@given(factor=st.floats(1, 100), classes=st.integers(2, 8), seed=st.integers(0, 50))
def test_a_long_tail_falls_off_exponentially(factor: float, classes: int, seed: int) -> None:
    data, among = labelled(2000, classes), np.arange(2000) % 5 != 0
    stays = thinned(data, among, factor, np.random.default_rng(seed))
    assert not (stays & ~among).any()
    before, after = np.bincount(data.y[among]), np.bincount(data.y[stays])
    wanted = factor ** -(np.arange(classes) / (classes - 1))
    np.testing.assert_allclose(after, after[0] * wanted, atol=1)
    assert (after == before).any(), "as many as there can be"


def test_the_first_class_may_be_the_small_one() -> None:
    data = Dataset(np.arange(110).reshape(-1, 1), np.repeat([0, 1], [10, 100]))
    stays = thinned(data, np.ones(110, bool), 5, np.random.default_rng(0))
    assert np.bincount(data.y[stays]).tolist() == [10, 2]


def test_thinning_leaves_the_test_set_alone() -> None:
    plain, thin = share_out(labelled(400), Plan(3)), share_out(labelled(400), Plan(3, imbalance=10.0))
    assert np.array_equal(plain.held_out.x, thin.held_out.x)
    assert set(thin.train.x[:, 0]) < set(plain.train.x[:, 0])
    assert sorted(x for shard in thin.shards for x in shard.train.x[:, 0]) == sorted(thin.train.x[:, 0])
    again, other = (
        share_out(labelled(400), Plan(3, imbalance=10.0)),
        share_out(labelled(400), Plan(3, seed=1, imbalance=10.0)),
    )
    assert np.array_equal(thin.train.x, again.train.x)
    assert not np.array_equal(thin.train.x, other.train.x)
    measured = Dataset(np.zeros((40, 1)), np.linspace(0, 1, 40))
    for data, factor in ((measured, 2.0), (labelled(40), 0.5), (labelled(40), float("inf"))):
        with pytest.raises(ConfigError, match=r"data\.imbalance = .* use 1 or more, for class labels only"):
            share_out(data, Plan(2, imbalance=factor))
    with pytest.raises(DataError, match="one class only"):
        share_out(labelled(40, classes=1), Plan(2, imbalance=2.0))


def test_shards_give_few_labels() -> None:
    parts = partition(labelled(5000), "shards:2", 10, 3)
    assert max(len(np.unique(part.y)) for part in parts) <= 4


def test_natural_keeps_groups_whole_and_names_them() -> None:
    data = grouped(20, 30, 50)
    shares = share_out(data, Plan(3, "natural"))
    assert [shard.name for shard in shares.shards] == ["site-0-north", "site-1-north", "site-2-north"]
    assert [(len(s.train), len(s.held_out)) for s in shares.shards] == [(16, 4), (24, 6), (40, 10)]


def test_natural_deals_out_whole_groups_to_fewer_participants() -> None:
    data = grouped(20, 30, 50, 10, 40)
    shares = share_out(data, Plan(2, "natural"))
    owners = [set(s.train.group.tolist()) | set(s.held_out.group.tolist()) for s in shares.shards]
    assert [shard.name for shard in shares.shards] == ["p01", "p02"]
    assert [sorted(name[5] for name in names) for names in owners] == [["0", "2", "3"], ["1", "4"]]
    assert len(shares.held_out) == len(share_out(data, Plan(5, "natural")).held_out)


def test_labels_are_skewed_only_where_each_example_has_one() -> None:
    sequences = Dataset(np.zeros((100, 5)), np.zeros((100, 5), int))
    for spec in ("shards:2", "dirichlet:1"):
        with pytest.raises(ConfigError, match=r"sequences of \(5,\): use iid or natural"):
            partition(sequences, spec, 4, 0)


def test_natural_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no groups: use iid"):
        partition(labelled(50), "natural", 3, 0)
    with pytest.raises(ConfigError, match=r"2 groups .* fewer than 3: ask for 2 participants"):
        partition(grouped(20, 20), "natural", 3, 0)
    clash = Dataset(np.zeros((2, 1)), np.zeros(2), group=np.array(["A b", "a-B"]))
    with pytest.raises(DataError, match="distinct names"):
        partition(clash, "natural", 2, 0)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "IID",
        "dirichlet",
        "dirichlet:0",
        "dirichlet:-1",
        "dirichlet:nan",
        "quantity:0",
        "shards:0",
        "shards:2.5",
        "iid:3",
    ],
)
def test_an_unknown_form_is_refused_with_the_valid_ones(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one of: iid, dirichlet:ALPHA .* natural"):
        partition(labelled(50), spec, 3, 0)


def test_impossible_sizes_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match="5 examples for 6 participants"):
        partition(labelled(5), "iid", 6, 0)
    with pytest.raises(ConfigError, match="at least one"):
        partition(labelled(5), "iid", 0, 0)
    with pytest.raises(ConfigError, match="needs 60 pieces"):
        partition(labelled(50), "shards:10", 6, 0)
    with pytest.raises(DataError, match="larger ALPHA"):
        partition(labelled(120, classes=2), "dirichlet:0.001", 10, 0)


def test_measured_targets_have_no_label_skew_but_can_be_sorted() -> None:
    measured = Dataset(np.zeros((40, 1)), np.linspace(0, 1, 40))
    with pytest.raises(ConfigError, match="measured numbers: use iid"):
        partition(measured, "dirichlet:1", 4, 0)
    assert [len(part) for part in partition(measured, "shards:2", 4, 0)] == [10] * 4


def test_a_participant_without_held_out_examples_is_refused() -> None:
    with pytest.raises(DataError, match=r"leaves p\d+ \d training and 0 held-out examples: use fewer"):
        share_out(labelled(20), Plan(10, "iid"))
    assert len(share_out(labelled(20), Plan(10, "iid", held_out=0.0)).held_out) == 0


@given(st.integers(1, 1200))
def test_names_are_valid_distinct_and_sorted(participants: int) -> None:
    names = participant_names(participants)
    assert names == sorted(set(names))
    assert all(re.fullmatch(PARTICIPANT, name) for name in names)
    assert shard_names(labelled(10), "iid", participants) == names
