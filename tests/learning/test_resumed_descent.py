"""A training that was interrupted after any of its steps goes on with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from broker import tensors
from tests.learning.test_torch_task import TOY, linear, points, same, with_norm
from workers import descent, torch_task
from workers.data import Dataset
from workers.task import Arrays, Scalar, TrainConfig, TrainResult
from workers.torch_task import TaskDefinition

torch.set_num_threads(1)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


class Killed(BaseException):
    """The process is gone."""


def told(saves: list[Arrays], dies_after: int = 0, resume: Arrays | None = None, **train: Scalar) -> TrainConfig:
    """A config under which every step is saved, as a file would keep it."""

    def save(arrays: Arrays) -> None:
        saves.append(tensors.decode(tensors.encode(arrays)))
        if len(saves) == dies_after:
            raise Killed

    steps = count(1)
    now = [0]

    def should_stop() -> bool:  # is asked before every step
        now[0] = next(steps)
        return False

    settings = {"local_epochs": 2, "save_seconds": 1e-9, **train}
    return TrainConfig(
        2, 7, settings, save=save, resume=resume or {}, clock=lambda: float(now[0]), should_stop=should_stop
    )


def undisturbed(definition: TaskDefinition, config: TrainConfig) -> TrainResult:
    return definition.bind(points()).train(definition.bind().initial(), config)


def alike(one: TrainResult, other: TrainResult) -> bool:
    numbers = [(r.metrics, r.effective_steps, r.step_sum, r.num_examples, r.start_loss) for r in (one, other)]
    return same(one.arrays, other.arrays) and same(one.state, other.state) and numbers[0] == numbers[1]


SEVEN: dict[str, Scalar] = {"max_steps": 7}
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Scalar]]] = {
    "plain": (linear, {}),
    "momentum": (linear, {"momentum": 0.9, **SEVEN}),
    "adamw": (linear, {"optimiser": "adamw", "lr": 0.01, **SEVEN}),
    "proximal": (linear, {"mu": 0.5, **SEVEN}),
    "dropout": (dropping, SEVEN),
    "batch norm": (with_norm, SEVEN),
    "mixup": (linear, {"mixup": 0.4, **SEVEN}),
    "sampling": (linear, {"sampling": "balanced", **SEVEN}),
    "full batch": (linear, {"batch_size": 0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_each_save_it_ends_with_the_same_bits(kind: str) -> None:
    model, train = KINDS[kind]
    definition = replace(TOY, model=model)
    whole: list[Arrays] = []
    extras = {"correction": {"weight": np.full((2, 4), 0.1, np.float32)}} if kind == "plain" else {}
    wants = {"wants": "delta+loss"} if kind == "dropout" else {}
    expected = undisturbed(definition, replace(told(whole, **train), **extras, **wants))
    assert same(
        expected.arrays, undisturbed(definition, TrainConfig(2, 7, {"local_epochs": 2, **train}, **extras)).arrays
    )
    for step in range(1, len(whole) + 1):
        saves: list[Arrays] = []
        with pytest.raises(Killed):
            undisturbed(definition, replace(told(saves, step, **train), **extras, **wants))
        again: list[Arrays] = []
        resumed = undisturbed(definition, replace(told(again, resume=saves[-1], **train), **extras, **wants))
        assert alike(resumed, expected)
        assert len(again) == len(whole) - step, "no step is taken twice"


def test_it_may_be_killed_again_and_again() -> None:
    expected = undisturbed(TOY, told([], momentum=0.9))
    saves: list[Arrays] = []
    for _ in range(5):
        with pytest.raises(Killed):
            undisturbed(TOY, told(saves, len(saves) + 2, saves[-1] if saves else {}, momentum=0.9))
    assert alike(undisturbed(TOY, told([], resume=saves[-1], momentum=0.9)), expected)


def test_the_adamw_state_of_the_round_before_is_not_taken_twice() -> None:
    train: dict[str, Scalar] = {"optimiser": "adamw", "lr": 0.01}
    state = undisturbed(TOY, told([], **train)).state
    expected = undisturbed(TOY, replace(told([], **train), state=state))
    saves: list[Arrays] = []
    with pytest.raises(Killed):
        undisturbed(TOY, replace(told(saves, 3, **train), state=state))
    assert alike(undisturbed(TOY, replace(told([], resume=saves[-1], **train), state=state)), expected)


BROKEN = {
    "the model": ("plain", "model/"),
    "velocity": ("momentum", "optimiser/"),
    "moments": ("adamw", "optimiser/m/"),
    "squares": ("adamw", "optimiser/v/"),
    "count of steps": ("adamw", "optimiser/steps"),
    "dropout's draws": ("dropout", "torch"),
    "mixup's draws": ("mixup", "lesson"),
    "running statistics": ("batch norm", "model/1.running_mean"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_is_not_restored_is_noticed(what: str) -> None:
    """It is left as the first step left it."""
    kind, prefix = BROKEN[what]
    model, train = KINDS[kind]
    definition = replace(TOY, model=model)
    saves: list[Arrays] = []
    expected = undisturbed(definition, told(saves, **train))
    broken = {name: saves[0][name] if name.startswith(prefix) else v for name, v in saves[3].items()}
    assert alike(undisturbed(definition, told([], resume=saves[3], **train)), expected)
    assert not alike(undisturbed(definition, told([], resume=broken, **train)), expected)


@pytest.mark.parametrize("wrong", [lambda losses: losses[:-1], lambda losses: 2 * losses])
def test_so_are_a_step_that_is_taken_twice_and_wrong_losses(wrong: Callable[[np.ndarray], np.ndarray]) -> None:
    saves: list[Arrays] = []
    expected = undisturbed(TOY, told(saves))
    losses = wrong(saves[3]["losses"])
    broken = {**saves[3], "losses": losses, "examples": saves[3]["examples"][: len(losses)]}
    assert not alike(undisturbed(TOY, told([], resume=broken)), expected)


def test_a_proximal_term_pulls_to_where_the_round_began() -> None:
    """And not to where it was interrupted."""
    train = KINDS["proximal"][1]
    saves: list[Arrays] = []
    expected = undisturbed(TOY, told(saves, **train))
    at = {name.removeprefix("model/"): v for name, v in saves[3].items() if name.startswith("model/")}
    wrong = replace(told([], resume=saves[3], **train), origin=at)
    assert not alike(undisturbed(TOY, wrong), expected)


@pytest.mark.parametrize(
    ("definition", "data", "train"),
    [
        (TOY, points(seed=1), {}),
        (TOY, replace(points(), y=1 - points().y), {}),
        (replace(TOY, name="other"), points(), {}),
        (replace(TOY, defaults={"lr": 0.4, "batch_size": 8}), points(), {}),
        (TOY, points(), {"momentum": 0.5}),
    ],
)
def test_progress_of_another_training_is_dropped(
    definition: TaskDefinition, data: Dataset, train: dict[str, Scalar]
) -> None:
    saves: list[Arrays] = []
    undisturbed(TOY, told(saves))
    task, start = definition.bind(data), definition.bind().initial()
    assert alike(task.train(start, told([], resume=saves[3], **train)), task.train(start, told([], **train)))


def test_saving_is_rare_by_default_and_never_more_than_a_twentieth_of_the_work() -> None:
    saved: list[float] = []
    now = [0.0]

    def save() -> None:
        saved.append(now[0])
        now[0] += 10.0

    seldom = descent.Seldom(60.0, lambda: now[0])
    while now[0] < 700.0:
        now[0] += 1.0
        seldom(now[0], save)
    assert saved == [60.0, 270.0, 480.0, 690.0]
    assert torch_task.recipe({}).save_seconds == 60.0
    never: list[float] = []
    descent.Seldom(0.0, lambda: 0.0)(1e9, lambda: never.append(0.0))
    assert not never
