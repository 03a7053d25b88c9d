"""Remedies for unequal classes and few examples: their losses against closed forms, and in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from broker.errors import ConfigError, TaskError
from workers import lesson as lesson_module
from workers import torch_task
from workers.augment import Augment
from workers.data import Dataset
from workers.imbalance import class_weights
from workers.lesson import Lesson, weighted_cross_entropy
from workers.stacked import Unstackable, try_out
from workers.task import Arrays, Scalar, TrainConfig, TrainResult
from workers.torch_task import TaskDefinition, TorchTask

torch.set_num_threads(1)


def unequal(n: int = 60, seed: int = 0) -> Dataset:
    """Nine of ten are of class 0; the first coordinate tells them apart, with an overlap."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 10 == 0).astype(np.int64)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    x[:, 0] += 1.5 * y
    return Dataset(x, y, name="unequal")


TOY = TaskDefinition(name="toy", model=lambda: nn.Linear(4, 2), load=unequal, defaults={"lr": 0.5, "batch_size": 8})
IMAGES = replace(TOY, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def trained(task: TorchTask, seed: int = 7, wants: str = "delta", **train: Scalar) -> TrainResult:
    return task.train(task.initial(), TrainConfig(2, seed, train, wants=wants))  # type: ignore[arg-type]


def same(one: Arrays, other: Arrays) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


OUTPUTS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 4.0, 0.0], [9.0, 0.0, 0.0]])
TARGETS = torch.tensor([0, 2, 1, 1])


def check_losses() -> None:
    weights = torch.tensor([0.5, 2.0, 1.0])
    p = OUTPUTS.softmax(dim=1)[torch.arange(4), TARGETS]
    for gamma in (0.0, 0.5, 2.0):
        for given in (None, weights):
            own = torch.ones(4) if given is None else given[TARGETS]
            expected = (own * (1 - p) ** gamma * -p.log()).mean()
            found = lesson_module.weighted_cross_entropy(given, gamma)(OUTPUTS, TARGETS)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weighted_and_focal_losses_are_those_of_the_papers() -> None:
    check_losses()


def mean_by_weights(weights: Tensor | None, gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """As torch does it, which no longer weighs a batch of one class."""
    return lambda outputs, targets: F.cross_entropy(outputs, targets, weight=weights)


def of_the_wrong_classes(weights: Tensor | None, gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """1 - p becomes p: what is easy counts most."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(outputs, targets, reduction="none")
        return (each * torch.exp(-each) ** gamma * (1 if weights is None else weights[targets])).mean()

    return loss


@pytest.mark.parametrize("mistake", [mean_by_weights, of_the_wrong_classes])
def test_a_mistake_in_the_loss_is_caught(mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson_module, "weighted_cross_entropy", mistake)
    with pytest.raises(AssertionError):
        check_losses()


def test_the_focal_loss_has_a_gradient_where_nothing_is_doubted() -> None:
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    for gamma in (0.1, 1.0, 5.0):
        weighted_cross_entropy(None, gamma)(sure, torch.tensor([0])).backward()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


def test_a_full_batch_is_that_of_torch_with_the_weights_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = unequal()
    weights = torch.from_numpy(class_weights(data.y, "balanced"))

    def by_torch(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=weights)

    settings = {"batch_size": 0, "local_epochs": 3}
    found = trained(TOY.bind(data), class_weights="balanced", **settings)
    expected = trained(replace(TOY, loss=by_torch).bind(data), **settings)
    monkeypatch.setattr(torch_task, "CHUNK_ROWS", 7)
    in_parts = trained(TOY.bind(data), class_weights="balanced", **settings)
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, atol=1e-6)
        np.testing.assert_allclose(in_parts.arrays[name], array, atol=1e-6)
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)


def check_mixup() -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32))
    for alpha in (0.2, 1.0):
        y = torch.tensor([0, 1, 1, 0, 1, 0])
        shown, loss = lesson_module.Lesson(F.cross_entropy, np.random.default_rng(3), mixup=alpha)(x)
        rng = np.random.default_rng(3)
        share, other = rng.beta(alpha, alpha), rng.permutation(6)
        np.testing.assert_allclose(shown, share * x + (1 - share) * x[other], atol=1e-6)
        soft = share * F.one_hot(y, 2) + (1 - share) * F.one_hot(y[other], 2)
        outputs = shown[:, :2]
        assert loss(outputs, y).item() == pytest.approx(F.cross_entropy(outputs, soft.float()).item(), rel=1e-5)


def test_mixup_mixes_inputs_and_targets_alike() -> None:
    check_mixup()


def with_the_targets_as_they_were(self: Lesson, x: Tensor) -> tuple[Tensor, object]:
    shown, _ = mix(self, x)
    return shown, self.loss


def with_the_shares_exchanged(self: Lesson, x: Tensor) -> tuple[Tensor, object]:
    shown, loss = mix(self, x)
    return x + x[::1] - shown, loss


mix = Lesson.__call__


@pytest.mark.parametrize("mistake", [with_the_targets_as_they_were, with_the_shares_exchanged])
def test_a_mistake_in_mixup_is_caught(mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lesson, "__call__", mistake)
    with pytest.raises(AssertionError):
        check_mixup()


def test_mixed_squared_errors_pull_to_the_mixed_target() -> None:
    x, y = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), torch.arange(5.0)
    _, loss = Lesson(
        lambda outputs, targets: F.mse_loss(outputs[:, 0], targets), np.random.default_rng(2), mixup=1.0
    )(x)
    rng = np.random.default_rng(2)
    share, other = rng.beta(1.0, 1.0), rng.permutation(5)
    outputs = x.clone().requires_grad_()
    loss(outputs, y).backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    target = share * y + (1 - share) * y[other]
    np.testing.assert_allclose(outputs.grad[:, 0], 2 * (x[:, 0] - target) / 5, rtol=1e-5)


REMEDIES: list[dict[str, Scalar]] = [
    {"class_weights": "balanced"},
    {"class_weights": "effective:0.999"},
    {"sampling": "over"},
    {"sampling": "under"},
    {"sampling": "balanced"},
    {"focal_gamma": 2.0},
    {"mixup": 0.4},
    {"augment": "shift:1,rotate:5,noise:0.1,cutout:1"},
]


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: "-".join(map(str, remedy.values())))
def test_a_remedy_changes_training_by_its_seed_alone_and_not_the_weight(remedy: dict[str, Scalar]) -> None:
    data = replace(unequal(), x=unequal().x.reshape(-1, 2, 2))
    task, other = IMAGES.bind(data), IMAGES.bind(data)
    plain, found = trained(task), trained(task, **remedy)
    assert not same(plain.arrays, found.arrays)
    assert same(found.arrays, trained(other, **remedy).arrays)
    assert not same(found.arrays, trained(task, seed=8, **remedy).arrays)
    assert found.num_examples == 60  # the data's, whatever was drawn of it
    steps = {"over": 14, "under": 2}.get(str(remedy.get("sampling")), 8)  # of 8 in 2 * 54, 2 * 6 and 60 examples
    assert found.effective_steps == steps
    assert same(plain.arrays, trained(task).arrays)


def test_rare_classes_are_found_more_often() -> None:
    task = TOY.bind(unequal(300), unequal(300, seed=1))
    settings = {"local_epochs": 6, "lr": 0.1, "batch_size": 16}
    plain = task.evaluate(trained(task, **settings).arrays).metrics["macro_recall"]
    for remedy in REMEDIES[:5]:
        found = task.evaluate(trained(task, **settings, **remedy).arrays).metrics["macro_recall"]
        assert found > plain + 0.1, remedy


def test_remedies_that_do_not_fit_are_refused() -> None:
    measured = replace(TOY, loss="mse", metric="rmse", model=lambda: nn.Linear(4, 1))
    for remedy, message in (
        (
            {"class_weights": "balanced"},
            "train.class_weights needs classes and the loss 'cross-entropy': leave it out",
        ),
        ({"focal_gamma": 2.0}, "train.focal_gamma needs classes"),
        ({"sampling": "over"}, "train.sampling needs classes, and the targets are measured numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            measured.recipe(remedy)
    assert measured.recipe({"mixup": 0.2}).mixup == 0.2
    with pytest.raises(ConfigError, match=r"train.augment needs images, .* and examples have the shape \(4,\)"):
        trained(TOY.bind(unequal()), augment="shift:1")
    with pytest.raises(TaskError, match=r"train\.sampling chooses the examples of steps.*use train\.class_weights"):
        trained(TOY.bind(unequal()), wants="gradient", sampling="over")
    task = TOY.bind(unequal())
    for remedy in REMEDIES[:-1]:
        with pytest.raises(Unstackable, match=rf"train\.{next(iter(remedy))} is for each participant alone"):
            try_out(task, TOY.recipe(remedy))


def test_a_gradient_has_the_weights_too() -> None:
    task = TOY.bind(unequal())
    start = task.initial()
    gradient = trained(task, wants="gradient", class_weights="balanced").arrays
    stepped = trained(task, class_weights="balanced", batch_size=0, lr=1.0).arrays
    for name, array in gradient.items():
        np.testing.assert_allclose(start[name] - stepped[name], array, atol=1e-6)


def test_a_lesson_shows_augmented_images() -> None:
    images = torch.zeros(3, 4, 4)
    shown, _ = Lesson(F.cross_entropy, np.random.default_rng(0), Augment(noise=1.0))(images)
    assert shown.std() > 0.5
    assert not images.any()
