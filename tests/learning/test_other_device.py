"""Training on another device than the CPU. There is none but torch's `lazy` one: it computes on the CPU, and as a
real one does it refuses what lies elsewhere. Its numbers are the CPU's within rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._lazy.ts_backend
import torch.nn.functional as F
from torch import nn

from tests.learning.test_resumed_descent import told
from tests.learning.test_torch_task import TOY, points, same
from workers.definition import BoundTask
from workers.lesson import Loss
from workers.modules import use_threads
from workers.task import Arrays, TrainConfig

LAZY = torch.device("lazy")


def in_double(loss: Loss) -> Loss:
    """The lazy device takes a loss times a Python number for one of float64, and wants such a gradient."""
    return lambda outputs, targets: loss(outputs, targets).double()


TASK = replace(TOY, loss=in_double(F.cross_entropy))


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    use_threads()
    torch._lazy.ts_backend.init()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes the lazy device the one that tasks find. It has no tensors of inference mode."""

    def move() -> None:
        monkeypatch.setattr("workers.torch_task.find", lambda _: LAZY)
        monkeypatch.setattr("workers.devices.find", lambda _: LAZY)
        monkeypatch.setattr(torch, "inference_mode", torch.no_grad)

    return move


def close(one: Arrays, other: Arrays, atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], atol=atol, err_msg=name)


def control(task: BoundTask) -> Arrays:
    return {name: np.full_like(v, 0.1) for name, v in task.initial().items()}


@pytest.mark.parametrize(
    "train",
    [
        {"momentum": 0.9, "mu": 0.3, "l2": 0.1, "max_steps": 3},
        {"optimiser": "adamw", "lr": 0.01, "mixup": 0.3, "max_steps": 3},
    ],
)
def test_a_module_trains_there_as_on_the_cpu(train: dict[str, Any], elsewhere: Callable[[], None]) -> None:
    here = TASK.bind(points(), points(seed=1))
    elsewhere()
    there = TASK.bind(points(), points(seed=1))
    assert there.device == LAZY
    assert same(here.initial(), there.initial())
    config = TrainConfig(2, 7, train, correction=control(here), wants="delta+loss")
    a, b = (task.train(task.initial(), config) for task in (here, there))
    close(a.arrays, b.arrays)
    close(a.state, b.state)
    assert not same(a.arrays, here.initial())
    assert a.start_loss == pytest.approx(b.start_loss, rel=1e-4)
    close(*(task.train(a.arrays, replace(config, state=a.state)).arrays for task in (here, there)))
    close(*(task.train(a.arrays, replace(config, wants="gradient")).arrays for task in (here, there)))
    assert here.evaluate(a.arrays).metrics == pytest.approx(there.evaluate(a.arrays).metrics, rel=1e-4)


def test_it_goes_on_there_from_its_last_save_but_not_from_that_of_another_device(
    elsewhere: Callable[[], None],
) -> None:
    train: dict[str, Any] = {"momentum": 0.9, "max_steps": 4}
    here, saves = TASK.bind(points()), []
    here.train(here.initial(), told(saves, **train))
    elsewhere()
    there, again = TASK.bind(points()), []
    whole = there.train(there.initial(), told(again, **train))
    for saved in (again[2], saves[2]):
        left: list[Arrays] = []
        close(there.train(there.initial(), told(left, resume=saved, **train)).arrays, whole.arrays)
        assert len(left) == (1 if saved is again[2] else 4)


@pytest.mark.slow
def test_a_large_model_trains_there_as_on_the_cpu(
    tmp_path: Path, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = pytest.importorskip("tests.learning.test_large_models", reason="needs fluffle[llm]")
    from workers.hf.task import _cross_entropy

    monkeypatch.setattr("workers.hf.task._cross_entropy", in_double(_cross_entropy))
    task = large.classifier(large.saved(tmp_path)[0], adapter={**large.LORA, "lora_dropout": 0.0})
    here = task.bind(large.reviews(8), large.reviews(8, 2))
    elsewhere()
    there = replace(task, device="cuda").bind(large.reviews(8), large.reviews(8, 2))
    assert there.model.device == LAZY
    assert {parameter.device.type for parameter in there.model.module.parameters()} == {"lazy"}
    for model in (here.model, there.model):
        for module in model.module.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.module.set_attn_implementation("eager")
    settings = {"clip": 0.5, "micro_batch": 4, "mu": 0.1, "lr": 1e-3, "max_steps": 1}
    config = TrainConfig(1, 7, settings, correction=control(here))
    a, b = (bound.train(bound.initial(), config) for bound in (here, there))
    close(a.arrays, b.arrays, atol=1e-4)
    assert not same(a.arrays, here.initial())
    assert here.evaluate(a.arrays).metrics == pytest.approx(there.evaluate(a.arrays).metrics, rel=1e-4)
    asked = large.reviews(5, 3)
    assert [p.value for p in here.predict(a.arrays, asked)] == [p.value for p in there.predict(a.arrays, asked)]
