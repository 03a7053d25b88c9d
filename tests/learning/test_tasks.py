"""The shipped tasks on real data: named, loaded, and learned by federated averaging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from inprocess import fedavg, mean_of, measure

from broker.errors import ConfigError, FluffleError
from fluffle.baselines import BaselineSettings, train_central, train_local
from workers.data import Dataset
from workers.partition import Plan, Shares, share_out
from workers.task import TrainConfig
from workers.tasks import CATALOGUE, find_task
from workers.tasks.heart import COLUMNS
from workers.torch_task import TaskDefinition

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def shipped_data_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUFFLE_DATA_DIR", str(tmp_path))


def shared(definition: TaskDefinition, plan: Plan, most: int | None = None) -> Shares:
    data = definition.load()
    chosen = np.random.default_rng(0).permutation(len(data))[:most]
    return share_out(data.take(np.sort(chosen)), plan)


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, workers.tasks as t; assert t.CATALOGUE; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


LARGE = (pytest.mark.slow, pytest.mark.timeout(600))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LARGE if CATALOGUE[name].needs else ()) for name in CATALOGUE]
)
def test_the_catalogue_tells_the_truth_and_every_task_takes_a_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = find_task(name)
    assert (definition.name, definition.summary) == (name, CATALOGUE[name].summary)
    definition.check({})
    if needs := CATALOGUE[name].needs:
        monkeypatch.delenv("FLUFFLE_DATA_DIR", raising=False)  # what this user fetched
        try:
            definition.load()
            definition.bind()
        except FluffleError as missing:
            pytest.skip(f"{missing} (it needs: {needs})")
    data = definition.load()
    assert data.source
    few = data.take(np.arange(0, len(data), len(data) // (8 if needs else 40)))
    task = definition.bind(few, few)
    trained = task.train(task.initial(), TrainConfig(2, 1, {"max_steps": 2} if CATALOGUE[name].needs_torch else {}))
    measured = task.evaluate(trained.arrays)
    assert measured.metrics["loss"] > 0
    assert measured.num_examples == task.num_examples  # of a language model, blocks


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mnist-logreg", 7850),
        ("mnist-2nn", 199_210),
        ("mnist-cnn", 1_663_370),
        ("digits", 9610),
        ("diabetes", 11),
        ("shakespeare-lstm", 215_904),
        ("shakespeare-transformer", 117_600),
    ],
)
def test_models_have_the_size_of_their_paper(name: str, parameters: int) -> None:
    assert sum(array.size for array in find_task(name).bind().initial().values()) == parameters


def test_an_unknown_task_is_refused_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"no task 'mnist-longreg', did you mean 'mnist-logreg'\?"):
        find_task("mnist-longreg")
    with pytest.raises(ConfigError, match=r"importing 'no_such_package' failed with ModuleNotFoundError"):
        find_task("no_such_package:TASK")
    with pytest.raises(ConfigError, match=r"has no task named 'LOGRE', did you mean 'LOGREG'\?; it has: LOGREG"):
        find_task("workers.tasks.mnist:LOGRE")


MINE = """
from torch import nn
from workers.data import Dataset
from workers.torch_task import TaskDefinition
import numpy as np

def load():
    x = np.random.default_rng(0).normal(size=(200, 3))
    return Dataset(x, (x.sum(axis=1) > 0).astype(int), source="made up")

SUMS = TaskDefinition(
    name="sums", model=lambda: nn.Linear(3, 2), load=load, defaults={"lr": 0.5, "batch_size": 16}
)
"""


def test_a_users_own_task_is_fifteen_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_task.py").write_text(MINE)
    (tmp_path / "my_broken_task.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    sums = find_task("my_task:SUMS")
    shares = shared(sums, Plan(4))
    assert measure(sums, shares, fedavg(sums, shares, rounds=5))["accuracy"] > 0.9
    with pytest.raises(ConfigError, match=r"failed with ZeroDivisionError"):
        find_task("my_broken_task:SUMS")


def test_heart_knows_what_was_not_measured() -> None:
    heart = find_task("heart").load()
    assert heart.group is not None
    by_hospital = {str(name): heart.take(heart.group == name) for name in np.unique(heart.group)}
    assert {name: len(part) for name, part in by_hospital.items()} == {
        "Cleveland": 304,
        "Hungary": 293,
        "Switzerland": 123,
        "VA Long Beach": 200,
    }
    chol, flag = COLUMNS.index("chol"), COLUMNS.index("chol missing")
    assert np.isnan(by_hospital["Switzerland"].x[:, chol]).all()
    assert not np.isnan(by_hospital["Cleveland"].x[:, chol]).any()
    assert np.array_equal(np.isnan(heart.x[:, chol]), heart.x[:, flag] == 1)
    assert not np.isinf(heart.x).any()
    assert set(np.unique(heart.y)) == {0, 1}


# What federated learning promises


@pytest.mark.slow  # test_simulate.py claims it of the whole pipeline
def test_mnist_logreg_of_ten_participants_is_as_good_as_pooled() -> None:
    logreg = find_task("mnist-logreg")
    shares = share_out(logreg.load(), Plan(10, "iid"))
    federated = measure(logreg, shares, fedavg(logreg, shares, rounds=20))
    central = train_central(logreg, shares, BaselineSettings(rounds=20)).metrics
    assert abs(federated["accuracy"] - central["accuracy"]) < 0.02
    assert federated["accuracy"] > 0.87


@pytest.mark.slow  # test_simulate.py claims it of the whole pipeline
def test_federated_heart_beats_every_hospital_alone_and_comes_near_pooled() -> None:
    heart = find_task("heart")
    federated, central, alone = [], [], []
    for seed in range(1, 11):  # ten test sets: one has 185 patients, too few to tell 0.82 from 0.80
        shares = share_out(heart.load(), Plan(4, "natural", seed, 0.2, split_seed=seed))
        settings = BaselineSettings(10, seed)
        federated.append(measure(heart, shares, fedavg(heart, shares, 10, seed)))
        central.append(train_central(heart, shares, settings).metrics)
        alone.append([hospital.metrics for hospital in train_local(heart, shares, settings).participants])
    for metric, better in (("accuracy", 1), ("loss", -1)):
        ours = fmean(m[metric] for m in federated)
        assert abs(ours - fmean(m[metric] for m in central)) < 0.02
        for hospital in range(4):
            assert better * (ours - fmean(run[hospital][metric] for run in alone)) > 0


def test_gradients_of_full_batches_are_central_gradient_descent() -> None:
    digits = find_task("digits")
    shares = share_out(digits.load(), Plan(5, "dirichlet:0.3"))
    tasks = [digits.bind(shard.train, participant=shard.name) for shard in shares.shards]
    pooled = digits.bind(shares.train)
    ours = theirs = pooled.initial()
    recipe = {"lr": 0.5, "batch_size": 0, "local_epochs": 1, "l2": 0.01}
    for number in range(1, 31):
        step = mean_of([task.train(ours, TrainConfig(number, 1, recipe, wants="gradient")) for task in tasks])
        ours = {name: (array - np.float32(0.5) * step[name]).astype(np.float32) for name, array in ours.items()}
        theirs = pooled.train(theirs, TrainConfig(number, 2, recipe)).arrays
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5)
    assert measure(digits, shares, ours)["accuracy"] > 0.6


@pytest.mark.parametrize(
    ("name", "metric", "worst"),
    [pytest.param("digits", "accuracy", 0.95, marks=pytest.mark.slow), ("diabetes", "rmse", -63.0)],
    ids=["digits", "diabetes"],
)
def test_small_tasks_learn_and_beat_training_alone(name: str, metric: str, worst: float) -> None:
    definition = find_task(name)
    shares = shared(definition, Plan(10))
    sign = -1 if metric == "rmse" else 1
    federated = sign * measure(definition, shares, fedavg(definition, shares, rounds=10))[metric]
    alone = train_local(definition, shares, BaselineSettings(rounds=10)).summary[metric]["mean"]
    assert federated > worst
    assert federated > sign * alone


def test_skewed_labels_still_learn() -> None:
    logreg = find_task("mnist-logreg")
    shares = shared(logreg, Plan(5, "dirichlet:0.3"), most=3000)
    assert measure(logreg, shares, fedavg(logreg, shares, rounds=10))["accuracy"] > 0.8


def test_federated_evaluation_is_central_evaluation() -> None:
    digits = find_task("digits")
    shares = shared(digits, Plan(7, "dirichlet:1"))
    model = digits.bind().initial()
    parts = [digits.bind(s.train, s.held_out, s.name).evaluate(model) for s in shares.shards]
    together = digits.bind(held_out=shares.held_out).evaluate(model)
    assert sum(part.num_examples for part in parts) == together.num_examples
    for metric in ("loss", "accuracy"):  # macro metrics are no means over examples
        mean = np.average([p.metrics[metric] for p in parts], weights=[p.num_examples for p in parts])
        assert mean == pytest.approx(together.metrics[metric])
    assert together.confusion is not None
    assert np.array_equal(sum(part.confusion for part in parts), together.confusion)


def test_data_sets_name_their_source() -> None:
    shipped = [name for name, entry in CATALOGUE.items() if not entry.needs]
    assert all(isinstance(find_task(name).load(), Dataset) and find_task(name).load().source for name in shipped)
