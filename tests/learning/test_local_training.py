"""How the shipped helper trains for SCAFFOLD, Ditto, FedBN and DiLoCo, each against steps computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from broker import tensors
from broker.codecs import packing
from broker.errors import ConfigError
from broker.messages import Scalar, TrainRound, Where
from broker.tensors import Arrays
from workers import optimisers, own, torch_task
from workers.data import Dataset
from workers.modules import seeded
from workers.optimisers import AdamW
from workers.own import own_of
from workers.stacked import Unstackable
from workers.task import TrainConfig, TrainResult
from workers.together import Together
from workers.torch_task import TaskDefinition, TorchTask, batches
from workers.trainer import Errand, carry_out, train_config


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def data(rows: int = 20) -> Dataset:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    return Dataset(x, (x.sum(axis=1) + rng.normal(size=rows)).astype(np.float32), name="lines")


def definition(**defaults: Scalar) -> TaskDefinition:
    return TaskDefinition(
        name="lines", model=module, load=data, loss="mse", metric="rmse",
        defaults={"lr": 0.05, "batch_size": 6, "local_epochs": 2, **defaults},
    )  # fmt: skip


def task(**defaults: Scalar) -> TorchTask:
    return definition(**defaults).bind(data(), data())


def by_hand(
    start: Arrays,
    lr: float,
    change: Callable[[str, Tensor, Tensor], Tensor],
    steps: int | None = None,
    seed: int = 7,
) -> dict[str, Tensor]:
    """Parameters after w <- w - lr change(name, w, gradient) on the helper's batches."""
    net, own_task = module(), task()
    net.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in start.items()})
    net.train()
    with seeded(seed):
        for number, batch in enumerate(batches(20, own_task.definition.recipe({}), seed)):
            if number == steps:
                break
            net.zero_grad()
            nn.functional.mse_loss(net(own_task.rows.x[batch])[:, 0], own_task.rows.y[batch]).backward()
            with torch.no_grad():
                for name, w in net.named_parameters():
                    assert w.grad is not None
                    w -= lr * change(name, w, w.grad)
    return {name: w.detach() for name, w in net.named_parameters()}


def agrees(result: TrainResult | Arrays, expected: Mapping[str, Tensor]) -> None:
    arrays = result.arrays if isinstance(result, TrainResult) else result
    for name, values in expected.items():
        np.testing.assert_allclose(arrays[name], values.numpy(), rtol=1e-4, atol=5e-5)


# -- SCAFFOLD -----------------------------------------------------------------------------------------------------


def corrections(start: Arrays) -> Arrays:
    rng = np.random.default_rng(5)
    return {n: rng.normal(size=v.shape).astype(np.float32) for n, v in start.items() if v.dtype.kind == "f"}


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_schedule_counts_rounds_and_each_step_has_its_size(optimiser: str) -> None:
    """Round 2 of 4 with a warm-up of 1.5, 8 steps: the first half still rises, the second falls as a cosine."""
    start = task().initial()
    own_task = task(optimiser=optimiser, warmup_rounds=1.5, schedule="cosine", schedule_rounds=4)
    result = own_task.train(start, TrainConfig(2, 7))
    times = [1 + (step + 0.5) / 8 for step in range(8)]
    scales = [t / 1.5 if t < 1.5 else (1 + math.cos(math.pi * (t - 1.5) / 2.5)) / 2 for t in times]
    net = module()
    net.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in start.items()})
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    steps = kinds[optimiser](net.parameters(), lr=0.05)
    with seeded(7):
        for batch, scale in zip(batches(20, own_task.definition.recipe({}), 7), scales, strict=True):
            steps.param_groups[0]["lr"] = 0.05 * scale
            steps.zero_grad()
            nn.functional.mse_loss(net(own_task.rows.x[batch])[:, 0], own_task.rows.y[batch]).backward()
            steps.step()
    agrees(result, {name: w.detach() for name, w in net.named_parameters()})
    assert result.step_sum == pytest.approx(0.05 * sum(scales))
    assert result.effective_steps == pytest.approx(sum(scales) if optimiser == "sgd" else 0)


def check_correction() -> None:
    start = task().initial()
    told = corrections(start)
    result = task(max_steps=5).train(start, TrainConfig(1, 7, {}, "delta+control", correction=told))
    agrees(result, by_hand(start, 0.05, lambda name, w, g: g + torch.from_numpy(told[name]), steps=5))
    assert result.step_sum == pytest.approx(5 * 0.05), "steps that were made, not planned"
    assert result.buffers >= {"1.running_mean", "1.running_var"}
    assert not result.buffers & {name for name, _ in module().named_parameters()}


def test_the_correction_is_added_to_each_gradient_of_a_parameter() -> None:
    check_correction()


def test_in_a_statistics_round_no_gradient_was_taken() -> None:
    from workers.tasks import find_task

    heart = find_task("heart")
    bound = heart.bind(heart.load())
    result = bound.train(bound.initial(), TrainConfig(1, 7, {}, "delta+control"))
    assert result.step_sum == np.inf


# -- AdamW --------------------------------------------------------------------------------------------------------

ADAMW: dict[str, Scalar] = {
    "optimiser": "adamw", "lr": 0.01, "beta_1": 0.8, "beta_2": 0.95, "eps": 1e-6, "weight_decay": 0.1,
}  # fmt: skip


def check_adamw(rounds: int = 3) -> None:
    """Against torch.optim.AdamW, whose state lives on through three rounds; the model is replaced between them."""
    own_task, net = task(**ADAMW), module()
    reference = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    start, state = own_task.initial(), {}
    for number in range(1, rounds + 1):
        result = own_task.train(start, TrainConfig(number, number, {}, state=state))
        net.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in start.items()})
        net.train()
        for batch in batches(20, own_task.definition.recipe({}), number):
            reference.zero_grad()
            nn.functional.mse_loss(net(own_task.rows.x[batch])[:, 0], own_task.rows.y[batch]).backward()
            reference.step()
            own_steps = {n: w.detach().numpy().copy() for n, w in net.named_parameters()}
        for name, values in own_steps.items():
            np.testing.assert_allclose(result.arrays[name], values, rtol=2e-5, atol=1e-6)
        state = tensors.decode(tensors.encode(result.state))
        start = {n: (v + 0.1).astype(v.dtype) if v.dtype.kind == "f" else v for n, v in result.arrays.items()}


def test_adamw_steps_as_torchs_does_and_goes_on_from_round_to_round() -> None:
    check_adamw()


def no_bias_correction(self: AdamW, net: nn.Module, scale: float) -> None:
    self._steps = 10**6
    _adamw_step(self, net, scale)


def coupled_decay(self: AdamW, net: nn.Module, scale: float) -> None:
    """Adam with an L2 penalty."""
    chosen = self._chosen
    for _, w, g in optimisers._gradients(net):
        g.add_(w.detach(), alpha=chosen.weight_decay)
    self._chosen = replace(chosen, weight_decay=0.0)
    _adamw_step(self, net, scale)
    self._chosen = chosen


def anew(self: AdamW, chosen: Any, net: nn.Module, state: Arrays) -> None:
    _adamw_begin(self, chosen, net, {})


def step_count_lost(self: AdamW, chosen: Any, net: nn.Module, state: Arrays) -> None:
    _adamw_begin(self, chosen, net, state)
    self._steps = 0


_adamw_step, _adamw_begin = AdamW.step, AdamW.__init__


@pytest.mark.parametrize(
    ("place", "broken"),
    [("step", no_bias_correction), ("step", coupled_decay), ("__init__", anew), ("__init__", step_count_lost)],
    ids=["no bias correction", "decay in the gradient", "reset each round", "steps counted anew"],
)
def test_a_mistake_in_adamw_is_caught(place: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW, place, broken)
    with pytest.raises(AssertionError):
        check_adamw()


def test_a_state_of_another_model_is_forgotten() -> None:
    own_task = task(**ADAMW)
    start = own_task.initial()
    fresh = own_task.train(start, TrainConfig(1, 7, {}))
    for state in ({"steps": np.array(3)}, {**fresh.state, "m/0.bias": np.zeros(99, np.float32)}):
        again = own_task.train(start, TrainConfig(1, 7, {}, state=state))
        assert tensors.encode(again.arrays) == tensors.encode(fresh.arrays)
    assert fresh.effective_steps == 0, "nobody knows what its steps are worth: fednova refuses it"


@pytest.mark.parametrize(
    "wrong", [{"momentum": 0.9}, {"beta_1": 1.0}, {"eps": 0.0}, {"weight_decay": -1.0}, {"optimiser": "adam"}]
)
def test_settings_of_adamw_that_cannot_work(wrong: dict[str, Scalar]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        definition(**{**ADAMW, **wrong}).recipe({})


def test_what_is_for_each_alone_is_not_stacked() -> None:
    plain = TaskDefinition(name="plain", model=lambda: nn.Linear(4, 1), load=data, loss="mse", metric="rmse")
    tasks = {f"p{i}": plain.bind(data(), data()) for i in range(5)}
    with pytest.raises(Unstackable, match=r"train\.optimiser"):
        Together(tasks, plain.recipe(ADAMW), 5)


# -- Ditto and FedBN ----------------------------------------------------------------------------------------------


def worked(number: int, base: Arrays, kept: Arrays, **more: Any) -> tuple[Arrays, Arrays]:
    """What a round's update brings to the model `base`, and what is kept."""
    blob = tensors.encode(base)
    fields: dict[str, Any] = {
        "run_id": "run-1", "epoch": 1, "seq": 1, "task": number, "round": number, "attempt": 1, "work": "train",
        "asked": ("p1",), "version": number - 1, "model": Where(size_bytes=len(blob), sha256="0" * 64), **more,
    }  # fmt: skip
    told = TrainRound(**fields)
    errand = Errand(told, blob, "p1", packing("none"), own=own_of(told, kept, base, server={}))
    config = replace(train_config(told, "p1", lambda: False), seed=7)
    finished = carry_out(task(), errand, config)
    return tensors.decode(finished.held.blob), tensors.decode(finished.own.blob) if finished.own else {}


LAMBDA = 2.0


def shifted(arrays: Arrays, by: float) -> Arrays:
    """As if others had moved the global model."""
    return {name: np.asarray(values + by, values.dtype) for name, values in arrays.items()}


def not_held(task: TorchTask, told: TrainRound, base: Arrays, config: TrainConfig) -> Any:
    return lambda start: task.train(start, config).arrays


def half_lambda(task: TorchTask, told: TrainRound, base: Arrays, config: TrainConfig) -> Any:
    return _train_personal(task, told.model_copy(update={"ditto": told.ditto / 2}), base, config)


def own_start(net: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def check_ditto() -> None:
    """v <- v - eta (grad F(v) + lambda (v - w)), w the round's global model, v where it was; Delta is FedAvg's."""
    w = task().initial()
    v, kept = w, {}
    for number in (1, 2, 3):
        delta, kept = worked(number, w, kept, ditto=LAMBDA)
        plain, _ = worked(number, w, {})
        assert tensors.encode(delta) == tensors.encode(plain)
        held = {name: torch.from_numpy(values.copy()) for name, values in w.items()}
        expected = by_hand(v, 0.05, lambda name, own, g, held=held: g + LAMBDA * (own - held[name]))
        v = {name.removeprefix("ditto/"): values for name, values in kept.items()}
        agrees(v, expected)
        w = shifted(w, 0.3)


def test_ditto_does_what_the_paper_says() -> None:
    check_ditto()


_train_personal = own.train_personal


@pytest.mark.parametrize(
    ("place", "broken"),
    [
        ("workers.torch_task.origin", own_start),
        ("workers.own.Own.judged", lambda self, base: base),
        ("workers.trainer.train_personal", not_held),
        ("workers.trainer.train_personal", half_lambda),
    ],
    ids=["held to its own start", "begins at the global model", "not held at all", "lambda / 2"],
)  # fmt: skip
def test_a_mistake_in_ditto_is_caught(place: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, broken)
    with pytest.raises(AssertionError):
        check_ditto()


def check_fedbn() -> None:
    """Parameters and statistics of the norm layer stay: neither sent, nor overwritten by what comes."""
    w, kept = task().initial(), {}
    model, local = dict(w), [name for name in w if name.startswith("1.")]
    for number in (1, 2, 3):
        delta, kept = worked(number, w, kept, local=("1.*",))
        assert delta.keys() == {name for name in w if not name.startswith("1.")}
        result = task().train(model, TrainConfig(number, 7, {}))
        for name, values in result.arrays.items():
            here = kept[f"local/{name}"] if name in local else w[name] + delta[name]
            np.testing.assert_allclose(here, values, atol=1e-6)
        w = shifted(w, 1)
        model = {**w, **{name: kept[f"local/{name}"] for name in local}}
    assert model["1.num_batches_tracked"] == 3 * 8


def test_fedbn_keeps_the_norm_layer_with_its_statistics() -> None:
    check_fedbn()


@pytest.mark.parametrize(
    ("place", "broken"),
    [
        ("workers.own.Own.model", lambda self, base: base),
        ("workers.trainer.shared", lambda model, local: model),
        (
            "workers.own.is_local",
            lambda name, local: name.startswith("1.") and "running" not in name and "num" not in name,
        ),
    ],
    ids=["overwritten by the global model", "sent all the same", "statistics are forgotten"],
)
def test_a_mistake_in_fedbn_is_caught(place: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, broken)
    with pytest.raises((AssertionError, KeyError)):
        check_fedbn()


@pytest.mark.parametrize(
    "broken",
    [lambda net, told: None, lambda net, told: _correct(net, {n: -v for n, v in told.items()})],
    ids=["no correction", "wrong sign"],
)
def test_a_mistake_in_the_correction_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_task, "correct", broken)
    with pytest.raises(AssertionError):
        check_correction()


_correct = torch_task.correct
