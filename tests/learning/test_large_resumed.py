"""The training of a large model that was interrupted after any of its steps goes on with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.learning.test_large_models import LORA, classifier, language_model, reviews, saved
from tests.learning.test_resumed_descent import Killed, alike, told
from workers.hf.definition import HfTask
from workers.modules import use_threads
from workers.task import Arrays, Scalar, TrainConfig, TrainResult

STEPS: dict[str, Scalar] = {"max_steps": 5, "clip": 0.5, "schedule": "linear", "schedule_rounds": 3.0}
ADAMW: dict[str, Scalar] = {**STEPS, "optimiser": "adamw"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    use_threads()
    return saved(tmp_path_factory.mktemp("models"))


def undisturbed(task: HfTask, config: TrainConfig, seed: int = 1) -> TrainResult:
    bound = task.bind(reviews(seed=seed))
    return bound.train(bound.initial(), config)


@pytest.mark.parametrize(
    ("kind", "train", "wants"),
    [
        ("classifier", ADAMW, "delta"),
        ("classifier", {**STEPS, "optimiser": "sgd", "momentum": 0.9, "mu": 0.5, "micro_batch": 3}, "delta+loss"),
        ("causal", {**ADAMW, "batch_size": 2}, "delta"),
    ],
    ids=["AdamW, clipped, with dropout", "momentum, held back, in parts", "language model"],
)
def test_killed_at_each_save_it_ends_with_the_same_bits(
    folders: tuple[Path, Path], kind: str, train: dict[str, Scalar], wants: str
) -> None:
    task = classifier(folders[0]) if kind == "classifier" else language_model(folders[1])
    whole: list[Arrays] = []
    asked = replace(TrainConfig(2, 7, {"local_epochs": 2, **train}), wants=wants)
    expected = undisturbed(task, replace(told(whole, **train), wants=wants))
    assert alike(expected, undisturbed(task, asked)), "saving changes nothing"
    assert len(whole) == 5
    for step in range(1, len(whole) + 1):
        saves: list[Arrays] = []
        with pytest.raises(Killed):
            undisturbed(task, replace(told(saves, step, **train), wants=wants))
        again: list[Arrays] = []
        resumed = undisturbed(task, replace(told(again, resume=saves[-1], **train), wants=wants))
        assert alike(resumed, expected)
        assert len(again) == len(whole) - step, "no step is taken twice"


@pytest.mark.parametrize("prefix", ["model/", "optimiser/m/", "optimiser/v/", "optimiser/steps", "torch", "losses"])
def test_whatever_is_not_restored_is_noticed(folders: tuple[Path, Path], prefix: str) -> None:
    """It is left as the first step left it; or, of the losses, the last is forgotten."""
    task, saves = classifier(folders[0]), []
    expected = undisturbed(task, told(saves, **ADAMW))
    if prefix == "losses":
        broken = {**saves[3], "losses": saves[3]["losses"][:-1], "examples": saves[3]["examples"][:-1]}
    else:
        broken = {name: saves[0][name] if name.startswith(prefix) else v for name, v in saves[3].items()}
    assert alike(undisturbed(task, told([], resume=saves[3], **ADAMW)), expected)
    assert not alike(undisturbed(task, told([], resume=broken, **ADAMW)), expected)


def test_progress_of_another_training_is_dropped(folders: tuple[Path, Path]) -> None:
    task, saves = classifier(folders[0]), []
    undisturbed(task, told(saves, **ADAMW))
    others: list[tuple[HfTask, dict[str, Scalar], int]] = [
        (task, {**ADAMW, "clip": 0.4}, 1),
        (task, ADAMW, 2),
        (replace(task, name="other"), ADAMW, 1),
        (replace(task, max_length=3), ADAMW, 1),
    ]
    for other, train, seed in others:
        began_anew = undisturbed(other, told([], **train), seed)
        assert alike(undisturbed(other, told([], resume=saves[3], **train), seed), began_anew)


def test_examples_that_are_cut_elsewhere_are_other_examples(folders: tuple[Path, Path]) -> None:
    one, other = (classifier(folders[0], adapter=LORA, max_length=size).bind(reviews(4)).rows for size in (8, 5))
    assert [array.tolist() for array in one.to_arrays()] != [array.tolist() for array in other.to_arrays()]
    assert np.array_equal(one.targets, other.targets)
