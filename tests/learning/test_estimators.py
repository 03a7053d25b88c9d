"""Estimators from sums: what scikit-learn finds in all data in one place, whatever the partition."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import cluster, decomposition
from sklearn.linear_model import LinearRegression
from sklearn.linear_model import Ridge as PooledRidge
from sklearn.naive_bayes import GaussianNB, MultinomialNB

from broker.errors import ConfigError, DataError, StateError, TaskError
from fluffle import PCA, EstimatorDefinition, GaussianBayes, KMeans, Ridge, find_task, learning, simulate
from workers.data import Dataset
from workers.partition import Plan, Shares, share_out
from workers.preprocess import Preprocess, Reference, prepare
from workers.task import Arrays, TrainConfig
from workers.tasks.tables import load_digits

EXACT = {"rtol": 1e-6, "atol": 1e-7}  # the aggregator's sums round at about 1e-9 of what is summed


def learned(definition: EstimatorDefinition, shares: Shares, rounds: int | None = None) -> Arrays:
    """By weighted means, in one process."""
    tasks = [definition.bind(shard.train, participant=shard.name) for shard in shares.shards]
    arrays = definition.bind().initial()
    for number in range(1, (rounds or definition.estimator.rounds) + 1):
        found = [task.train(arrays, TrainConfig(number, 1)) for task in tasks]
        weights = [one.num_examples for one in found]
        arrays = {name: np.average([one.arrays[name] for one in found], axis=0, weights=weights) for name in arrays}
    return arrays


def pooled(definition: EstimatorDefinition, shares: Shares) -> Dataset:
    return prepare(shares.train, definition.preprocess, np.float64)[0]


def run(name: str, directory: Path, **settings: Any) -> Arrays:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return simulate(name, {"run.dir": str(directory), "round.participants": 4, **dotted}).arrays


# Through aggregator, broker and workers


@pytest.mark.parametrize("partition", ["iid", "shards:2"])
def test_ridge_is_pooled_ridge(partition: str, tmp_path: Path) -> None:
    definition = find_task("diabetes-ridge")
    shares = share_out(definition.load(), Plan(4, partition))
    line = definition.estimator.fitted(run("diabetes-ridge", tmp_path / "run", data__partition=partition))
    data = pooled(definition, shares)
    expected = PooledRidge(alpha=0.01 * len(data)).fit(data.x, data.y)
    np.testing.assert_allclose(line.coefficients, expected.coef_, **EXACT)
    assert line.intercept == pytest.approx(expected.intercept_, rel=1e-7)


def test_naive_bayes_is_pooled_naive_bayes_though_most_have_two_digits(tmp_path: Path) -> None:
    definition = find_task("digits-bayes")
    data = pooled(definition, share_out(definition.load(), Plan(4)))
    logs = definition.estimator.fitted(run("digits-bayes", tmp_path / "run", data__partition="shards:2"))
    expected = MultinomialNB(alpha=1e-3 * len(data)).fit(data.x, data.y)
    np.testing.assert_allclose(logs, expected.feature_log_prob_, **EXACT)


def test_kmeans_is_lloyds_algorithm_on_all_data(tmp_path: Path) -> None:
    definition = find_task("digits-kmeans")
    data = pooled(definition, share_out(definition.load(), Plan(4)))
    two = run("digits-kmeans", tmp_path / "two", stop__rounds=2)
    more = run("digits-kmeans", tmp_path / "more", stop__rounds=6, data__partition="dirichlet:0.3")
    start = definition.estimator.fitted(two)  # after one step: all have an example now, or begin beside the largest
    expected = cluster.KMeans(10, init=start, n_init=1, max_iter=4, tol=0.0, algorithm="lloyd").fit(data.x)
    np.testing.assert_allclose(definition.estimator.fitted(more), expected.cluster_centers_, **EXACT)
    assert more["share"].sum() == pytest.approx(1)


def test_components_are_pooled_components(tmp_path: Path) -> None:
    definition = find_task("digits-pca")
    data = pooled(definition, share_out(definition.load(), Plan(4)))
    found = definition.estimator.fitted(run("digits-pca", tmp_path / "run", data__partition="shards:3"))
    expected = decomposition.PCA(10, svd_solver="full").fit(data.x)
    np.testing.assert_allclose(found.shares, expected.explained_variance_ratio_, **EXACT)
    signs = np.sign((found.directions * expected.components_).sum(axis=1))[:, None]
    np.testing.assert_allclose(found.directions, signs * expected.components_, rtol=0, atol=1e-6)


# Without


def test_gaussian_naive_bayes_is_scikit_learns() -> None:
    definition = EstimatorDefinition(
        name="g",
        estimator=GaussianBayes(64, 10, smoothing=1e-3),
        load=load_digits,
        preprocess=Preprocess(bounds=(0, 16)),
    )
    shares = share_out(load_digits(), Plan(5, "shards:2"))
    arrays, data = learned(definition, shares), pooled(definition, shares)
    expected = GaussianNB(var_smoothing=1e-3).fit(data.x, data.y)
    found = definition.predict(arrays, shares.held_out)
    held_out = prepare(shares.held_out, definition.preprocess, np.float64)[0]
    assert [one.value for one in found] == expected.predict(held_out.x).tolist()
    chances = expected.predict_proba(held_out.x).max(axis=1)
    np.testing.assert_allclose([one.probability for one in found], chances, rtol=1e-6)
    assert definition.bind(held_out=shares.held_out).evaluate(arrays).metrics["accuracy"] > 0.85


def test_without_a_penalty_it_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(60, 3))
    data = Dataset(x, x @ [1.0, -2.0, 0.5] + 7 + rng.normal(size=60))
    definition = EstimatorDefinition(name="ols", estimator=Ridge(3), load=lambda: data)
    shares = share_out(data, Plan(3))
    line, expected = (
        Ridge(3).fitted(learned(definition, shares)),
        LinearRegression().fit(shares.train.x, shares.train.y),
    )
    np.testing.assert_allclose(
        [*line.coefficients, line.intercept], [*expected.coef_, expected.intercept_], rtol=1e-8
    )


def test_a_cluster_that_nobody_is_in_begins_anew() -> None:
    x = np.concatenate([np.full((30, 2), -1.0), np.full((30, 2), 1.0)]) + np.random.default_rng(1).normal(
        0, 0.1, (60, 2)
    )
    data = Dataset(x, np.zeros(60))
    losses = []
    for seed in range(10):
        definition = EstimatorDefinition(name="k", estimator=KMeans(2, 2, seed), load=lambda: data)
        shares = share_out(data, Plan(2))
        arrays = learned(definition, shares, rounds=8)
        losses.append(definition.bind(held_out=shares.held_out).evaluate(arrays).metrics["loss"])
    assert max(losses) < 0.1


def test_a_class_that_nobody_has_is_never_predicted() -> None:
    data = Dataset(np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 0, 2, 2]))
    definition = EstimatorDefinition(name="g", estimator=GaussianBayes(1, 3), load=lambda: data)
    arrays = definition.bind(data).train(definition.bind().initial(), TrainConfig(1, 1)).arrays
    assert [one.value for one in definition.predict(arrays, data)] == [0, 0, 2, 2]
    assert np.isfinite(
        definition.bind(held_out=replace(data, y=np.array([1, 1, 1, 1]))).evaluate(arrays).metrics["loss"]
    )


def test_what_cannot_be_is_refused_with_the_remedy() -> None:
    data = Dataset(np.array([[1e4], [2.0]]), np.array([0.0, 1.0]), name="big", columns=("income",))
    definition = EstimatorDefinition(name="r", estimator=Ridge(1), load=lambda: data)
    with pytest.raises(DataError, match=r"'mean' has a mean of .* column 'income' .* \(preprocess.reference"):
        definition.bind(data).train(definition.bind().initial(), TrainConfig(1, 1))
    scaled = replace(definition, preprocess=Preprocess(reference=Reference((5e3,), (5e3,))))
    assert scaled.bind(data).train(scaled.bind().initial(), TrainConfig(1, 1)).num_examples == 2
    with pytest.raises(TaskError, match="no gradients: use strategy fedavg"):
        scaled.bind(data).train(scaled.bind().initial(), TrainConfig(1, 1, wants="gradient"))
    with pytest.raises(ConfigError, match=r"no training settings: leave train.lr out"):
        scaled.check({"lr": 0.1})
    with pytest.raises(DataError, match="without missing values"):
        replace(definition, preprocess=Preprocess(missing="keep")).bind(
            replace(data, x=np.array([[np.nan], [1.0]]))
        )
    task = replace(definition, estimator=GaussianBayes(1, 2)).bind(replace(data, y=np.array([0, 2])))
    with pytest.raises(DataError, match="classes from 0 to 1"):
        task.train(task.initial(), TrainConfig(1, 1))
    with pytest.raises(TaskError, match="do both sides run the same task"):
        scaled.bind(held_out=data).evaluate({"mean": np.zeros(1)})
    with pytest.raises(StateError, match="not one of task 'r'"):
        learning.predict(definition, {"mean": np.zeros(1)}, data)
    with pytest.raises(TaskError, match="PCA predicts nothing"):
        replace(definition, estimator=PCA(1, 1)).predict(PCA(1, 1).initial(), data)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy.name": "fedadam"},
        {"strategy.name": "fedsgd"},
        {"strategy.server_lr": 0.5},
        {"strategy.clip_norm": 1.0},
        {"round.weights": "equal"},
        {"round.policy": "buffered", "round.buffer": 2},
    ],
)
def test_strategies_that_do_not_average_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the mean of all answers of a round"):
        simulate("digits-pca", {"run.dir": str(tmp_path / "run"), **settings})


def test_a_robust_strategy_holds_against_a_liar(tmp_path: Path) -> None:
    bad = {"study.attack": "sign-flip:5", "study.attackers": 1, "run.dir": str(tmp_path / "run")}
    found = simulate("digits-bayes", {"round.participants": 5, "round.quorum": 4, "strategy.name": "median", **bad})
    assert found.summary["metrics"]["accuracy"] > 0.85


NO_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
from broker.messages import TrainRound
from fluffle.config import Config, RunSection
from fluffle.jobs import run_job
from workers.assignment import Assignment, Holding
from workers.task import TrainConfig

job = run_job(Config(task="digits-bayes", run=RunSection(id="run-1")))
told = TrainRound(
    run_id="run-1", epoch=1, seq=1, task=1, round=1, attempt=1, work="train", asked=("p01",), version=0, model=None,
    wants="delta", seed=42, learning_task="digits-bayes", data={"participants": 2, "partition": "iid"},
)
trained = Assignment(Holding("p01"))(told).train(job.initial(), TrainConfig(1, 1))
print(job.evaluate(trained.arrays)["accuracy"])
"""


def test_neither_worker_nor_aggregator_needs_torch() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.8
