"""Averages of low-rank products against the exact ones, computed anew; each mistake that is easily made, once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregator.intake import Intake
from aggregator.settings import (
    CodecSettings,
    EvaluationSettings,
    PersonalSettings,
    RoundSettings,
    StrategySettings,
    check_together,
)
from aggregator.strategies import make_strategy
from aggregator.strategies.contribution import Contribution
from aggregator.strategies.lora import Sum, factored
from aggregator.strategies.lora_stack import LoraStack
from broker import codecs, tensors
from broker.errors import BadMessage, ConfigError
from broker.lora import largest_rank, of_rank, pairs
from broker.messages import UpdateReady
from broker.tensors import Arrays

OUT, INTO, RANK, ALPHA = 24, 30, 16, 8.0
RANKS, WEIGHTS = (4, 8, 16), (10, 30, 60)
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def model(seed: int = 0, rank: int = RANK, dtype: type = np.float64) -> Arrays:
    """A global model as a round leaves it: rows of A orthogonal, and the most important first."""
    rng = np.random.default_rng(seed)
    found = factored(rng.normal(size=(OUT, rank)), rng.normal(size=(rank, INTO)), rank, 0.6)
    return {A: found.a.astype(dtype), B: found.b.astype(dtype), "head": rng.normal(size=3).astype(dtype)}


def product(arrays: Arrays) -> NDArray[np.float64]:
    """(alpha / r) B A: what the adapters add to the frozen weight."""
    return ALPHA / len(arrays[A]) * (arrays[B] @ arrays[A])


def trained(base: Arrays, rank: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (v + 0.3 * rng.normal(size=v.shape)).astype(v.dtype) for name, v in of_rank(base, rank).items()}


class Crowd(NamedTuple):
    base: Arrays
    updates: list[Arrays]

    def exact(self) -> NDArray[np.float64]:
        """sum_i p_i (P_i + P - what i was given of P), of whatever rank."""
        terms = [
            weight * (product(update) + product(self.base) - product(of_rank(self.base, rank)))
            for rank, weight, update in zip(RANKS, WEIGHTS, self.updates, strict=True)
        ]
        return sum(terms) / sum(WEIGHTS)  # type: ignore[no-any-return]


@pytest.fixture
def crowd() -> Crowd:
    base = model()
    return Crowd(base, [trained(base, rank, 10 + rank) for rank in RANKS])


def strategy() -> LoraStack:
    made = make_strategy(StrategySettings(name="lora-stack"), RoundSettings(participants=3))
    assert isinstance(made, LoraStack)
    return made


def combined(crowd: Crowd, order: Sequence[int] = (0, 1, 2)) -> Arrays:
    stack = strategy()
    stack.start(crowd.base, {})
    for i in order:
        stack.add(crowd.updates[i], Contribution(WEIGHTS[i], f"p{i}"))
    return stack.finish()


def error(found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def best(exact: NDArray[np.float64], rank: int = RANK) -> NDArray[np.float64]:
    u, sizes, v = np.linalg.svd(exact)
    return (u[:, :rank] * sizes[:rank]) @ v[:rank]  # type: ignore[no-any-return]


# -- the strategy against the formula -----------------------------------------------------------------------------


def test_it_is_the_best_approximation_of_the_exact_mean(crowd: Crowd) -> None:
    np.testing.assert_allclose(product(combined(crowd)), best(crowd.exact()), atol=1e-10)


def test_with_room_for_all_ranks_nothing_is_lost() -> None:
    """4 + 8 of the 16: what rank 4 and 8 learn beside the first 8 fits."""
    base = model()
    base = {**base, B: base[B] * (np.arange(RANK) < 4)}  # of rank 4, and the rest is free
    crowd = Crowd(base, [trained(base, 4, 1), trained(base, 8, 2), of_rank(base, 16)])
    np.testing.assert_allclose(product(combined(crowd)), crowd.exact(), atol=1e-10)


def test_whoever_learned_nothing_changes_nothing(crowd: Crowd) -> None:
    still = Crowd(crowd.base, [of_rank(crowd.base, rank) for rank in RANKS])
    np.testing.assert_allclose(product(combined(still)), product(crowd.base), atol=1e-12)


def test_other_tensors_get_the_weighted_mean(crowd: Crowd) -> None:
    mean = np.average([update["head"] for update in crowd.updates], axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(combined(crowd)["head"], mean, atol=1e-9)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_in_whatever_order_the_bits_are_the_same(crowd: Crowd, order: Sequence[int]) -> None:
    expected = combined(crowd)
    assert tensors.encode(combined(crowd, order)) == tensors.encode(expected)


def test_it_may_write_into_the_model_itself() -> None:
    base = model(dtype=np.float32)
    crowd = Crowd(base, [trained(base, rank, rank) for rank in RANKS])
    expected, stack = combined(crowd), strategy()
    out = {name: values.copy() for name, values in base.items()}
    stack.start(out, {})
    for i, update in enumerate(crowd.updates):
        stack.add(update, Contribution(WEIGHTS[i], f"p{i}"))
    assert tensors.encode(stack.finish(out)) == tensors.encode(expected)


def test_the_first_round_departs_from_b_of_zero_and_no_direction_dies() -> None:
    rng = np.random.default_rng(5)
    base: Arrays = {A: rng.normal(size=(RANK, INTO)), B: np.zeros((OUT, RANK)), "head": np.zeros(3)}
    update = {**of_rank(base, 4), B: rng.normal(size=(OUT, 4))}
    new = combined(Crowd(base, [update, of_rank(base, 8), of_rank(base, 16)]))
    assert np.linalg.norm(new[A], axis=1).min() == pytest.approx(np.linalg.norm(base[A], axis=1).min())
    assert np.linalg.matrix_rank(new[B]) == 4


# -- other ways, and how wrong they are ---------------------------------------------------------------------------


def padded(update: Arrays) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = update[A], update[B]
    return np.pad(b, ((0, 0), (0, RANK - len(a)))), np.pad(a, ((0, RANK - len(a)), (0, 0)))


def zero_padded(updates: Sequence[Arrays], weights: Sequence[float]) -> NDArray[np.float64]:
    """HetLoRA without its pruning (Cho et al., 2024): B and A are padded and averaged apart."""
    scaled = [(ALPHA / len(update[A]) * padded(update)[0], padded(update)[1]) for update in updates]
    b, a = (np.average([pair[i] for pair in scaled], axis=0, weights=weights) for i in (0, 1))
    return b @ a  # type: ignore[no-any-return]


def mean_product(updates: Sequence[Arrays], weights: Sequence[float]) -> NDArray[np.float64]:
    return np.average([product(update) for update in updates], axis=0, weights=weights)  # type: ignore[no-any-return]


def stacked_to(rank: int, updates: Sequence[Arrays], weights: Sequence[float]) -> NDArray[np.float64]:
    total = Sum(OUT, INTO)
    for update, weight in zip(updates, weights, strict=True):
        total.add(update[B], update[A], weight / sum(weights) * ALPHA / len(update[A]))
    found = factored(*total.factors(), rank)
    return found.b @ found.a


def test_averaging_factors_is_wrong_and_stacking_is_exact() -> None:
    """Errors are relative to the exact mean change. With `pytest -s` they are printed (docs/lora-ranks.md)."""
    base, weights = model(), (1.0, 1.0, 1.0)
    for ranks in ((4, 8, 16), (16, 16, 16)):
        updates = [trained(base, rank, 20 + i) for i, rank in enumerate(ranks)]
        exact = mean_product(updates, weights)
        change = float(np.linalg.norm(exact - product(base)))
        naive = float(np.linalg.norm(zero_padded(updates, weights) - exact)) / change
        errors = [
            float(np.linalg.norm(stacked_to(rank, updates, weights) - exact)) / change for rank in (4, 8, 16, OUT)
        ]
        print(
            f"\n{ranks}: factors averaged {naive:.3f}; stacked, to 4, 8, 16, {OUT}:", *(f"{e:.1e}" for e in errors)
        )
        for rank in (4, 8, 16, OUT):
            assert error(stacked_to(rank, updates, weights), best(exact, rank)) < 1e-12
        assert errors[-1] < 1e-12
        assert errors[2] < naive / 2


@examples(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 1000), st.booleans())
def test_the_sum_is_exact_however_many_terms_and_its_memory_bounded(
    ranks: list[int], seed: int, wide: bool
) -> None:
    rng = np.random.default_rng(seed)
    out, into = (6, 9) if wide else (9, 6)
    total, exact = Sum(out, into), np.zeros((out, into))
    for rank in ranks:
        b, a, weight = rng.normal(size=(out, rank)), rng.normal(size=(rank, into)), rng.normal()
        total.add(b, a, weight)
        exact += weight * b @ a
        assert total.factors()[1].shape[0] <= 2 * 6
    b, a = total.factors()
    np.testing.assert_allclose(b @ a, exact, atol=1e-9)
    whole = factored(b, a, 6)
    np.testing.assert_allclose(whole.b @ whole.a, exact, atol=1e-9)
    part = factored(b, a, 2, 3.0)
    assert part.lost == pytest.approx(np.linalg.norm(exact - part.b @ part.a), abs=1e-9)
    assert part.norm == pytest.approx(np.linalg.norm(exact), abs=1e-9)
    if sum(ranks) > 1:
        squares = np.maximum(9.0, np.linalg.svd(exact, compute_uv=False)[:2])
        np.testing.assert_allclose(part.a @ part.a.T, np.diag(squares), atol=1e-7)
    assert (part.a[[0], np.abs(part.a).argmax(axis=1)[:1]] > 0).all()


# -- broken copies ------------------------------------------------------------------------------------------------


def _no_scale(stack: LoraStack) -> None:
    class Plain(Sum):
        def add(self, b: Any, a: Any, weight: Any) -> None:
            super().add(b, a, weight if isinstance(weight, np.ndarray) else weight * b.shape[1] / RANK)

    stack.sum_of = Plain


def _twice(stack: LoraStack) -> None:
    class Twice(Sum):
        def add(self, b: Any, a: Any, weight: Any) -> None:
            super().add(b, a * (1.0 if isinstance(weight, np.ndarray) else weight), weight)

    stack.sum_of = Twice


def _forgets_the_rest(stack: LoraStack) -> None:
    class Forgets(Sum):
        def add(self, b: Any, a: Any, weight: Any) -> None:
            super().add(b, a, 0 * weight if isinstance(weight, np.ndarray) else weight)

    stack.sum_of = Forgets


@pytest.mark.parametrize("breaks", [_no_scale, _twice, _forgets_the_rest])
def test_a_wrong_weight_is_noticed(crowd: Crowd, breaks: Callable[[LoraStack], None]) -> None:
    """Without alpha / r_i; with p_i in B and in A; without what a participant was not given."""
    stack = strategy()
    breaks(stack)
    stack.start(crowd.base, {})
    for i, update in enumerate(crowd.updates):
        stack.add(update, Contribution(WEIGHTS[i], f"p{i}"))
    assert error(product(stack.finish()), best(crowd.exact())) > 0.05


def test_a_transposed_pair_is_refused() -> None:
    base = model()
    with pytest.raises(ConfigError, match=r"are no pair: \(r, in\) and \(out, r\)"):
        pairs({A: base[A].T, B: base[B].T})


def test_sums_in_the_order_of_arrival_would_have_other_bits(crowd: Crowd) -> None:
    found = []
    for order in itertools.permutations(range(3)):
        total = Sum(OUT, INTO)
        for i in order:
            total.add(crowd.updates[i][B], crowd.updates[i][A], WEIGHTS[i])
        found.append(factored(*total.factors(), RANK).b.tobytes())
    assert len(set(found)) > 1


def test_of_rank_is_the_best_of_that_rank_in_its_own_scale() -> None:
    base = model()
    for rank in (4, 8):
        np.testing.assert_allclose(product(of_rank(base, rank)), best(product(base), rank), atol=1e-12)
    assert of_rank(base, 16)[B] is base[B]
    assert largest_rank(base) == 16


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"x.lora_A.weight": np.zeros((2, 3))},
        {"x.lora_A.weight": np.zeros((2, 3)), "x.lora_B.weight": np.zeros((4, 3))},
        {"x.lora_A.weight": np.zeros((2, 3, 1, 1)), "x.lora_B.weight": np.zeros((4, 2, 1, 1))},
        {"x.lora_embedding_A": np.zeros((2, 3)), "x.lora_embedding_B": np.zeros((4, 2))},
        {"x.lora_A.weight": np.zeros((2, 3), int), "x.lora_B.weight": np.zeros((4, 2), int)},
        {"x.lora_magnitude_vector": np.zeros(3)},
    ],
)
def test_adapters_that_are_none(wrong: Arrays) -> None:
    with pytest.raises(ConfigError):
        pairs(wrong)


def test_a_model_without_adapters() -> None:
    with pytest.raises(ConfigError, match="use fedavg"):
        strategy().start({"w": np.zeros(3)}, {})


def test_values_that_are_not_finite_and_stale_models(crowd: Crowd) -> None:
    stack = strategy()
    stack.start(crowd.base, {})
    bad = {**crowd.updates[0], B: np.full((OUT, 4), np.nan)}
    with pytest.raises(BadMessage, match="not finite"):
        stack.add(bad, Contribution(1, "p0"))
    with pytest.raises(BadMessage, match="stale"):
        stack.add(crowd.updates[0], Contribution(1, "p0", damping=0.5))


@pytest.mark.parametrize(
    ("strategy", "rounds", "codec", "personal"),
    [
        ({"server_lr": 0.5}, {}, {}, {}),
        ({"clip_norm": 1.0}, {}, {}, {}),
        ({}, {"late": "fold"}, {}, {}),
        ({}, {}, {"up": "int8"}, {}),
        ({}, {}, {}, {"ditto": 0.1}),
        ({}, {}, {}, {"local": "head"}),
    ],
)
def test_settings_that_do_not_go_with_it(
    strategy: dict[str, Any], rounds: dict[str, Any], codec: dict[str, Any], personal: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="lora-stack"):
        check_together(
            RoundSettings(participants=3, **rounds), EvaluationSettings(),
            StrategySettings(name="lora-stack", **strategy), CodecSettings(**codec), PersonalSettings(**personal),
        )  # fmt: skip


def intake(name: str = "lora-stack") -> Intake:
    parts: Any = SimpleNamespace(
        reader=None, writer=None, topology=None, store=None,
        settings=SimpleNamespace(
            broker=None, codec=SimpleNamespace(allowed=()), strategy=SimpleNamespace(name=name)
        ),
    )  # fmt: skip
    found = Intake(parts, scratch=None)  # type: ignore[arg-type]
    found.expect(model(dtype=np.float32), "model")
    return found


def update(rank: int) -> UpdateReady:
    return UpdateReady(
        participant="p01", run_id="run-1", epoch=1, task=1, base_sha256="a" * 64, num_examples=1, lora_rank=rank
    )


@pytest.mark.parametrize("rank", [1, 4, 15, 16])
@pytest.mark.parametrize("codec", ["none", "fp16", "none+zstd"])
def test_what_comes_in_has_the_shapes_of_the_rank_that_it_tells(rank: int, codec: str) -> None:
    base = model(dtype=np.float32)
    like = intake()._like_of(update(rank))
    packing = codecs.packing(codec)
    for sent in (1, 3, 4, 15, 16):
        body = packing.pack(of_rank(base, sent), {}, np.random.default_rng(0)).body
        if sent == rank:
            found = packing.unpack(body, like)
            assert {name: found[name].shape for name in like} == {
                n: v.shape for n, v in of_rank(base, rank).items()
            }
        else:
            with pytest.raises(BadMessage):
                dict(packing.unpack(body, like))


def test_a_rank_that_nobody_can_have_and_one_in_another_run() -> None:
    for rank, strategy_name in ((17, "lora-stack"), (1 << 16, "lora-stack"), (4, "fedavg")):
        with pytest.raises(BadMessage, match=f"adapters of rank {rank}"):
            intake(strategy_name)._like_of(update(rank))
    assert intake("fedavg")._like_of(update(0)).keys() == model().keys()
