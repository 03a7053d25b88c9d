"""A torch task with LoRA adapters, at sites of different ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broker.errors import ConfigError
from broker.lora import of_rank, pairs
from examples.lora_digits import TASK
from fluffle import find_task, simulate
from fluffle.shards import load_model
from tests.unit.test_assignment import told
from workers.assignment import Assignment, Holding
from workers.task import TrainConfig

torch.set_num_threads(1)

NAME = "examples.lora_digits:TASK"


def run(directory: Path, **more: Any) -> dict[str, Any]:
    chosen = {"run.dir": str(directory), "strategy.name": "lora-stack", "study.lora_ranks": "4,8,16"}
    return simulate(NAME, {**chosen, "round.participants": 3, "stop.rounds": 2, **more}).summary


def test_three_ranks_learn_together_and_equal_seeds_give_equal_bits(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    assert one["metrics"]["accuracy"] > 0.3
    assert one["updates"]["accepted"] == 6
    assert run(tmp_path / "other")["model_sha256"] == one["model_sha256"]
    model = load_model(tmp_path / "one" / "model.safetensors")
    assert {model[pair.a].shape[0] for pair in pairs(model)} == {16}


def test_what_is_frozen_is_the_same_whatever_the_rank_and_does_not_travel() -> None:
    small, large = TASK.of_rank(4).bind(TASK.load()), TASK.bind(TASK.load())
    for name, values in large.module.named_buffers():
        assert torch.equal(values, dict(small.module.named_buffers())[name])
    assert all("lora_" in name for name in large.initial())
    cut = of_rank(large.initial(), 4)
    assert {name: v.shape for name, v in small.initial().items()} == {name: v.shape for name, v in cut.items()}
    assert small.train(cut, TrainConfig(1, 7, {"max_steps": 2})).effective_steps == 2


def test_a_participant_of_lower_rank_begins_with_its_part_of_the_product() -> None:
    """Its module multiplies by ALPHA / 4, and the outputs are those of the global model's first four directions."""
    rng = np.random.default_rng(0)
    whole = {name: rng.normal(size=v.shape).astype(np.float32) / 4 for name, v in TASK.bind().initial().items()}
    cut = {
        name: np.where(np.arange(16)[(slice(None), None) if "lora_A" in name else (None, slice(None))] < 4, v, 0)
        for name, v in whole.items()
    }
    held_out = TASK.load()
    expected = TASK.bind(held_out=held_out).evaluate({name: v.astype(np.float32) for name, v in cut.items()})
    found = TASK.of_rank(4).bind(held_out=held_out).evaluate(of_rank(whole, 4))
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)


def test_a_site_binds_its_task_with_its_rank_and_a_task_without_ranks_refuses() -> None:
    found = Assignment(Holding("p01", NAME, lora_rank=8))(told())
    assert {v.shape[0] for name, v in found.initial().items() if "lora_A" in name} == {8}
    with pytest.raises(ConfigError, match="takes no rank"):
        find_task("digits").of_rank(8)


def test_ranks_of_a_simulation_are_for_the_embedded_broker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.lora_rank"):
        run(tmp_path, **{"broker.url": "amqp://localhost"})
    with pytest.raises(ConfigError, match="'four' is no rank"):
        run(tmp_path, **{"study.lora_ranks": "four"})
