"""The example `examples/gpt_from_scratch`: what it compares with, and that its numbers are those of its sweep."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from examples.gpt_from_scratch.gpt import GPT, TASK
from examples.gpt_from_scratch.report import HERE, runs_of, table
from fluffle.learning import task_defaults
from fluffle.sweep import load_sweep
from workers.data import Dataset
from workers.modules import arrays_of, load_arrays
from workers.optimisers import optimiser
from workers.task import TrainConfig

STEPS, PARTICIPANTS, EACH = 3, 8, 4


def text() -> Dataset:
    """Windows of characters that mean nothing."""
    symbols = np.random.default_rng(5).integers(0, 96, (PARTICIPANTS * EACH, 81)).astype(np.uint8)
    return Dataset(symbols[:, :-1], symbols[:, 1:], name="noise")


def test_pooled_training_is_synchronous_data_parallel_training_with_an_exchange_at_every_step() -> None:
    """The mean of eight participants' gradients, applied by one AdamW, is AdamW on batches eight times as large."""
    whole, start = text(), TASK.bind().initial()
    settings = {"batch_size": 0, "max_steps": STEPS, "local_epochs": STEPS}
    pooled = TASK.bind(whole, whole)
    expected = pooled.train(start, TrainConfig(1, 7, settings)).arrays
    parts = [TASK.bind(whole.take(np.arange(EACH) + EACH * place)) for place in range(PARTICIPANTS)]
    net = GPT()
    load_arrays(net, start)
    steps = optimiser(TASK.recipe({}), net, {})
    for _ in range(STEPS):
        sent = [part.train(arrays_of(net), TrainConfig(1, 7, settings, "gradient")).arrays for part in parts]
        for name, parameter in net.named_parameters():
            parameter.grad = torch.from_numpy(np.mean([gradients[name] for gradients in sent], axis=0))
        steps.step(net)
    found = arrays_of(net)
    for name, values in expected.items():
        if not name.endswith(
            "attention.bias"
        ):  # a key's does not change what is attended to: its gradient is noise
            np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)
    loss = pooled.evaluate(expected).metrics["loss"]
    assert pooled.evaluate(found).metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert loss < pooled.evaluate(start).metrics["loss"] - 0.01


def test_a_character_is_told_from_what_came_before_alone() -> None:
    net, windows = GPT().eval(), torch.from_numpy(text().x[:2])
    changed = windows.clone()
    changed[:, 40:] = 7
    with torch.inference_mode():
        assert torch.equal(net(windows)[:, :, :40], net(changed)[:, :, :40])
        assert not torch.equal(net(windows)[:, :, 40:], net(changed)[:, :, 40:])


def test_the_results_are_those_of_the_sweep_and_the_page_tells_them() -> None:
    sweep = load_sweep(HERE / "sweep.toml", defaults=cache(task_defaults))
    told = json.loads((HERE / "results.json").read_text("utf-8"))
    assert [cell["digest"] for cell in told["cells"]] == [cell.digest for cell in sweep.cells]
    assert not told["failed"]
    assert table(runs_of(HERE / "results.json")) in (HERE / "README.md").read_text("utf-8")
