"""Federated training through aggregator, broker and workers, against what it must equal or come near to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from torch import nn

from aggregator.strategies.buffers import parameters
from broker.errors import ConfigError, TaskError
from broker.messages import Scalar
from broker.tensors import Arrays
from fluffle import Result, find_task, resume, simulate
from fluffle.baselines import BaselineSettings, train_central, train_local
from fluffle.config import load_config
from fluffle.layers import from_toml
from fluffle.learning import load_data
from fluffle.shards import load_model
from workers.modules import buffer_patterns
from workers.partition import Plan, share_out


def run(task: str, directory: Path, **settings: Scalar) -> Result:
    """A simulation; `train__lr=0.1` sets train.lr."""
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return simulate(task, {"run.dir": str(directory), **dotted})


def test_mnist_comes_within_two_points_of_pooled_training(tmp_path: Path) -> None:
    result = run("mnist-logreg", tmp_path / "run", round__participants=10, stop__rounds=20)
    definition = find_task("mnist-logreg")
    shares = share_out(load_data(definition), Plan(10))
    pooled = train_central(definition, shares, BaselineSettings(20))
    assert result.summary["metrics"]["accuracy"] > pooled.metrics["accuracy"] - 0.02
    assert result.summary["updates"] == {"accepted": 200, "late": 0, "rejected": 0, "duplicate": 0}
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000


def test_heart_beats_every_hospital_alone_and_is_near_the_pooled_model(tmp_path: Path) -> None:
    definition, seeds, rounds = find_task("heart"), range(1, 7), 10
    federated, pooled, alone = [], [], []
    for seed in seeds:
        shares = share_out(load_data(definition), Plan(4, "natural", seed))
        settings = BaselineSettings(rounds, seed)
        found = run("heart", tmp_path / f"{seed}", run__seed=seed, stop__rounds=rounds).summary["metrics"]
        federated.append(found["loss"])
        pooled.append(train_central(definition, shares, settings).metrics["loss"])
        each = [participant.metrics for participant in train_local(definition, shares, settings).participants]
        alone.append([metrics["loss"] for metrics in each])
        assert found["accuracy"] >= fmean(metrics["accuracy"] for metrics in each)
    for hospital in zip(*alone, strict=True):
        assert fmean(federated) < fmean(hospital)
    assert fmean(federated) < fmean(pooled) + 0.02


def test_diabetes_trains_with_the_squared_error(tmp_path: Path) -> None:
    history = run("diabetes", tmp_path / "run", round__participants=5, stop__rounds=15).summary["history"]
    assert history[-1]["metrics"]["rmse"] < min(62.0, history[0]["metrics"]["rmse"])


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5"])
def test_fedsgd_on_full_batches_is_gradient_descent_step_by_step(tmp_path: Path, partition: str) -> None:
    rounds, lr = 8, 0.5
    result = run(
        "digits", tmp_path / "run", round__participants=6, stop__rounds=rounds, strategy__name="fedsgd",
        strategy__server_lr=lr, train__batch_size=0, train__l2=0.0, data__partition=partition,
    )  # fmt: skip
    arrays, losses = gradient_descent(rounds, lr)
    for name, expected in arrays.items():
        np.testing.assert_allclose(result.arrays[name], expected, atol=2e-6)
    told = [row["metrics"]["train_loss"] for row in result.summary["history"]]
    np.testing.assert_allclose(told, losses, rtol=1e-5)


def gradient_descent(steps: int, lr: float) -> tuple[Arrays, list[float]]:
    """Plain torch on all training data of `digits`: the arrays after, and the loss before each step."""
    definition = find_task("digits")
    task = definition.bind(share_out(load_data(definition), Plan(6)).train)
    x, y = task.rows.x, task.rows.y
    module = definition.model()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in task.initial().items()})
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(module(x), y)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= lr * gradient
        losses.append(loss.item())
    return {name: value.numpy() for name, value in module.state_dict().items()}, losses


def test_equal_seeds_give_equal_bits_and_other_seeds_others(tmp_path: Path) -> None:
    digests = [
        run("digits", tmp_path / f"{i}", stop__rounds=2, run__seed=seed).summary["model_sha256"]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("strategy", [pytest.param("fedavg", marks=pytest.mark.slow), "fedyogi"])
def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path, strategy: str) -> None:
    whole = run("digits", tmp_path / "whole", stop__rounds=4, strategy__name=strategy)
    run("digits", tmp_path / "cut", stop__rounds=2, strategy__name=strategy)
    resumed = resume(tmp_path / "cut", {"stop.rounds": 4})
    assert resumed.summary["model_sha256"] == whole.summary["model_sha256"]
    assert [row["round"] for row in resumed.summary["history"]] == [1, 2, 3, 4]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


NORMED = replace(find_task("digits"), name="normed", model=normed)


def test_an_optimiser_moves_no_buffer_that_the_tasks_module_has(tmp_path: Path) -> None:
    """With such a step Adam would make variances negative within a round or two, and evaluation not finite."""
    result = run(
        f"{__name__}:NORMED", tmp_path / "run", stop__rounds=4, strategy__name="fedadam", strategy__server_lr=0.3,
        train__batch_size=0,
    )  # fmt: skip
    assert load_config(from_toml(tmp_path / "run" / "run.toml")).strategy.buffer_patterns == {
        "*.running_mean", "*.running_var", "*.num_batches_tracked"
    }  # fmt: skip
    assert (result.arrays["1.running_var"] > 0).all()
    assert result.arrays["1.num_batches_tracked"] > 0
    *_, newest = sorted((tmp_path / "run" / "checkpoints").glob("v*.json"))
    state = load_model(newest.parent / json.loads(newest.read_bytes())["state_file"])
    assert {name.partition("/")[2] for name in state} == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    }


def test_a_buffer_that_is_called_like_a_parameter_is_named_whole() -> None:
    module = nn.ModuleDict({"scale": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    module["norm"].register_buffer("weight_seen", torch.zeros(2))
    module.register_buffer("bias", torch.zeros(2))
    module["norm"].register_buffer("spare", torch.zeros(2))
    module["scale"].spare = nn.Parameter(torch.zeros(2))
    found = buffer_patterns(module)
    common = ["*.num_batches_tracked", "*.running_mean", "*.running_var", "*.weight_seen"]
    assert found == [*common, "bias", "norm.spare"]
    moved = parameters({name: value.numpy() for name, value in module.state_dict().items()}, found)
    assert moved == {name for name, _ in module.named_parameters()}


def test_with_fednova_every_update_of_the_shipped_helper_counts(tmp_path: Path) -> None:
    """Uneven shares and a limit on steps: other numbers of steps at every participant."""
    result = run(
        "digits", tmp_path / "run", stop__rounds=3, strategy__name="fednova", data__partition="dirichlet:0.3",
        train__max_steps=9, train__momentum=0.5, train__mu=0.01, train__lr=0.1,
    )  # fmt: skip
    assert result.summary["updates"] == {"accepted": 30, "late": 0, "rejected": 0, "duplicate": 0}
    losses = [row["metrics"]["loss"] for row in result.summary["history"]]
    assert losses == sorted(losses, reverse=True)


def test_a_task_that_fails_everywhere_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"everybody failed in round 1: .*(not finite|lower train.lr)"):
        run("digits", tmp_path / "run", round__participants=3, train__lr=1e5)


def test_a_metric_that_nobody_measures_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'acc', which task 'digits' does not measure"):
        run("digits", tmp_path / "run", stop__target_metric="acc:0.5")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "lost", "fewer"), [("int8+zstd", 0.01, 4), ("topk:0.01+zstd", 0.025, 35)])
def test_codecs_lose_little_and_save_much(tmp_path: Path, codec: str, lost: float, fewer: float) -> None:
    """With 359 examples to measure on, one is 0.003; `benchmarks/codecs.py` looks closer."""
    plain = run("digits", tmp_path / "plain", round__participants=5, stop__rounds=30).summary
    coded = run("digits", tmp_path / "coded", round__participants=5, stop__rounds=30, codec__up=codec).summary
    assert coded["metrics"]["accuracy"] >= plain["metrics"]["accuracy"] - lost
    assert coded["updates"] == plain["updates"]
    assert coded["bytes"]["up"] * fewer < plain["bytes"]["up"]


def test_the_worst_participants_judge_versions_and_each_has_its_own_metric(tmp_path: Path) -> None:
    told: dict[str, Scalar] = {
        "data__partition": "dirichlet:0.5", "data__imbalance": 5.0, "round__participants": 4, "stop__rounds": 4,
        "evaluation__mode": "federated", "train__sampling": "balanced",
    }  # fmt: skip
    result = run("digits", tmp_path / "run", evaluation__metric="loss_worst_10", **told)
    worst = [row["metrics"]["loss_worst_10"] for row in result.summary["history"]]
    definition = find_task("digits")
    shares = share_out(load_data(definition), Plan(4, "dirichlet:0.5", imbalance=5.0))
    losses = [
        definition.bind(shard.train, shard.held_out).evaluate(result.arrays).metrics["loss"]
        for shard in shares.shards
    ]
    fair = result.summary["fairness"]
    assert fair["metric"] == "loss"
    assert [fair["mean"], fair["worst_10"], fair["std"], fair["min"]] == pytest.approx(
        [fmean(losses), max(losses), np.std(losses), min(losses)]
    )
    best = load_model(tmp_path / "run" / f"{'model' if worst[-1] == min(worst) else 'best'}.safetensors")
    best_losses = [
        definition.bind(shard.train, shard.held_out).evaluate(best).metrics["loss"] for shard in shares.shards
    ]
    assert max(best_losses) == pytest.approx(min(worst))
    assert "confusion" not in result.summary


def test_the_result_says_which_classes_are_taken_for_which(tmp_path: Path) -> None:
    result = run("digits", tmp_path / "run", round__participants=2, stop__rounds=1, evaluation__metric="recall_8")
    confusion = np.array(result.summary["confusion"])
    metrics = result.summary["metrics"]
    assert np.trace(confusion) / confusion.sum() == pytest.approx(metrics["accuracy"])
    assert confusion[8, 8] / confusion[8].sum() == pytest.approx(metrics["recall_8"])
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 1000
