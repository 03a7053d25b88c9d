"""PEFT's LoRA adapters of different ranks in one run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from aggregator.strategies.contribution import Contribution
from aggregator.strategies.lora_stack import LoraStack
from aggregator.sums import FixedPointSum
from broker.errors import ConfigError
from broker.lora import of_rank, pairs
from fluffle import simulate
from fluffle.shards import load_model
from tests.learning.test_large_models import classifier, config, reviews, saved
from workers.hf.definition import HfTask
from workers.hf.ranks import DEFAULT_RANK
from workers.modules import use_threads
from workers.task import Arrays

RANKS, ALPHA = (4, 8, 16), 32
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": ALPHA, "target_modules": ["query", "value"]}
PLAIN = {"lr": 0.05, "batch_size": 8, "local_epochs": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> HfTask:
    use_threads()
    return classifier(saved(tmp_path_factory.mktemp("models"))[0], adapter=LORA, defaults=PLAIN)


def randomly(task: HfTask) -> Arrays:
    """A model whose products are not zero, and whose rows do not all matter alike."""
    rng = np.random.default_rng(0)
    start = task.bind().initial()
    return {name: rng.normal(scale=0.2, size=v.shape).astype(v.dtype) if v.ndim else v for name, v in start.items()}


def product(arrays: Arrays, scale: float) -> dict[str, Any]:
    return {pair.a: scale * arrays[pair.b].astype(float) @ arrays[pair.a].astype(float) for pair in pairs(arrays)}


def test_a_participant_of_lower_rank_begins_with_its_part_of_the_product(task: HfTask) -> None:
    """Its module multiplies by lora_alpha / 4, and says what the global model's first four directions say."""
    whole = randomly(task)
    first = {
        name: np.where(np.arange(16)[(slice(None), None) if "lora_A" in name else (None, slice(None))] < 4, v, 0)
        if "lora_" in name
        else v
        for name, v in whole.items()
    }
    first = {name: v.astype(np.float32) for name, v in first.items()}
    expected = task.bind(held_out=reviews()).evaluate(first).metrics["loss"]
    small = task.of_rank(4).bind(held_out=reviews())
    assert small.evaluate(of_rank(whole, 4)).metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(task.bind(held_out=reviews()).evaluate(whole).metrics["loss"], rel=1e-3)


def test_what_is_not_an_adapter_is_the_same_whatever_the_rank(task: HfTask) -> None:
    large, small = task.bind().model, task.of_rank(4).bind().model
    for name, values in large.module.state_dict().items():
        if "lora_" not in name:
            assert np.array_equal(values, small.module.state_dict()[name]), name
    assert small is task.of_rank(4).bind().model, "it is loaded once"
    assert {name: v.shape for name, v in small.initial.items()} == {
        name: v.shape for name, v in of_rank(large.initial, 4).items()
    }


def test_the_products_of_all_ranks_are_averaged_exactly(task: HfTask, tmp_path: Path) -> None:
    """The sum has no higher rank than the model, so nothing is cut off: products are averaged, not factors."""
    ranks = (2, 3, 5)
    whole, strategy = randomly(task), LoraStack(FixedPointSum(8, 64), tmp_path)
    expected = {name: np.zeros_like(values) for name, values in product(whole, 1.0).items()}
    begins = dict(whole)
    for pair in pairs(whole):  # it has rank 6, of the 16 that there are
        begins[pair.a] = np.concatenate([whole[pair.a][:6], np.full((10, 32), 1e-3, np.float32)])
        begins[pair.b] = np.where(np.arange(16) < 6, whole[pair.b], 0).astype(np.float32)
    strategy.start(begins, {})
    for weight, rank in enumerate(ranks, 1):
        start = of_rank(begins, rank)
        result = task.of_rank(rank).bind(reviews(16, seed=rank)).train(start, config())
        strategy.add(result.arrays, Contribution(weight, f"p{rank:02}"))
        before, after = product(start, ALPHA / rank), product(result.arrays, ALPHA / rank)
        for name, values in product(begins, ALPHA / 16).items():
            expected[name] += weight / 6 * (values - before[name] + after[name])
        assert any(not np.allclose(before[name], after[name], atol=1e-4) for name in before)
    found = product(strategy.finish(), ALPHA / 16)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


def test_a_simulation_of_three_ranks_learns_and_repeats_itself(
    task: HfTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("small_ranks")
    module.__dict__["TASK"] = replace(task, load=lambda: reviews())
    monkeypatch.setitem(sys.modules, "small_ranks", module)
    settings = {
        "strategy.name": "lora-stack", "study.lora_ranks": "4,8,16", "round.participants": 3, "stop.rounds": 3,
    }  # fmt: skip
    one, other = (
        simulate("small_ranks:TASK", {**settings, "run.dir": str(tmp_path / name)}).summary for name in ("a", "b")
    )
    assert one["model_sha256"] == other["model_sha256"]
    assert one["updates"]["accepted"] == 9
    assert one["metrics"]["accuracy"] > 0.6
    model = load_model(tmp_path / "a" / "model.safetensors")
    assert {model[pair.a].shape[0] for pair in pairs(model)} == {16}


@pytest.mark.parametrize(
    ("adapter", "rank", "said"),
    [
        (None, 4, "trains no LoRA adapters"),
        ({"peft_type": "IA3", "target_modules": ["value"]}, 4, "trains no LoRA adapters"),
        ({**LORA, "use_dora": True}, 4, "adapters with use_dora have one rank"),
        ({**LORA, "use_rslora": True}, 4, "use_rslora"),
        ({**LORA, "init_lora_weights": "pissa"}, 4, "init_lora_weights"),
        (LORA, 17, "above the rank of the task's adapters, 16"),
        ({"peft_type": "LORA"}, 9, "adapters, 8"),
    ],
    ids=["none", "IA3", "DoRA", "rsLoRA", "PiSSA", "too high", "PEFT's own"],
)
def test_other_adapters_and_ranks_are_refused(adapter: Any, rank: int, said: str) -> None:
    refusing = HfTask(name="x", base="nowhere", kind="classifier", load=reviews, adapter=adapter)
    with pytest.raises(ConfigError, match=said):
        refusing.of_rank(rank)
    assert refusing.of_rank(0) == refusing


def test_modules_of_their_own_rank_are_cut_only_if_theirs_is_higher(task: HfTask) -> None:
    import peft

    assert peft.LoraConfig().r == DEFAULT_RANK
    uneven = replace(task, adapter={**LORA, "rank_pattern": {"value": 3}, "use_dora": False})
    whole, small = uneven.bind().initial(), uneven.of_rank(4).bind().initial()
    assert {name: v.shape for name, v in of_rank(whole, 4).items()} == {n: v.shape for n, v in small.items()}
    assert {small[pair.a].shape[0] for pair in pairs(small)} == {3, 4}
