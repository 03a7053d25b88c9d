"""Baselines: the participants' own training, on the same data, for as long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from broker import tensors
from broker.errors import StateError
from fluffle import simulate
from fluffle.baselines import BaselineSettings, Progress, train_central, train_local
from workers.partition import Plan, share_out
from workers.task import TrainConfig, train_seed
from workers.tasks import find_task

torch.set_num_threads(1)

DIGITS = find_task("digits")
SHARES = share_out(DIGITS.load(), Plan(participants=3, partition="shards:4"))
SETTINGS = BaselineSettings(rounds=3, seed=7, train={"lr": 0.1, "local_epochs": 1})


def test_central_training_pools_everything_but_the_test_set() -> None:
    heard: list[Progress] = []
    result = train_central(DIGITS, SHARES, SETTINGS, heard.append)
    assert result.num_examples == len(SHARES.train) == sum(len(shard.train) for shard in SHARES.shards)
    assert [(p.participant, p.round, p.rounds) for p in heard] == [("central", n, 3) for n in (1, 2, 3)]
    assert [p.metrics for p in heard] == list(result.history)
    assert result.metrics == result.history[-1]
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_central_training_is_the_task_itself() -> None:
    task = DIGITS.bind(SHARES.train, SHARES.held_out)
    arrays = task.initial()
    for number in (1, 2, 3):
        seed = train_seed(7, "central", number)
        arrays = task.train(arrays, TrainConfig(number, seed, SETTINGS.train)).arrays
    assert task.evaluate(arrays).metrics == train_central(DIGITS, SHARES, SETTINGS).metrics


def test_local_training_measures_each_participant_on_the_central_test_set() -> None:
    heard: list[Progress] = []
    result = train_local(DIGITS, SHARES, SETTINGS, heard.append)
    assert [p.participant for p in result.participants] == ["p01", "p02", "p03"]
    assert [p.num_examples for p in result.participants] == [len(shard.train) for shard in SHARES.shards]
    assert len(heard) == 9
    accuracies = [p.metrics["accuracy"] for p in result.participants]
    assert result.summary["accuracy"] == {
        "mean": np.mean(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
    }
    assert max(accuracies) < train_central(DIGITS, SHARES, SETTINGS).metrics["accuracy"]


def test_results_are_plain_data_and_repeat() -> None:
    once, again = (train_local(DIGITS, SHARES, SETTINGS).to_dict() for _ in range(2))
    assert json.loads(json.dumps(once)) == json.loads(json.dumps(again))
    assert set(once) == {"summary", "participants"}
    assert set(train_central(DIGITS, SHARES, SETTINGS).to_dict()) == {
        "participant",
        "num_examples",
        "metrics",
        "history",
    }


def test_training_goes_on_from_a_model_that_is_given(tmp_path: Path) -> None:
    """Pooled training of 2 and then 3 rounds' worth, and a simulation, both from the first one's model."""
    first = train_central(DIGITS, SHARES, SETTINGS)
    file = tmp_path / "first.safetensors"
    file.write_bytes(tensors.encode(first.arrays))
    again = train_central(DIGITS, SHARES, replace(SETTINGS, initial=first.arrays))
    assert again.metrics["loss"] < first.metrics["loss"]
    told = {"round.participants": 3, "stop.rounds": 1, "run.initial": str(file), "train.lr": 1e-9}
    found = simulate("digits", {**told, "run.dir": str(tmp_path / "run")}).summary
    assert found["metrics"]["loss"] == pytest.approx(first.metrics["loss"], rel=1e-4)
    with pytest.raises(StateError, match="not one of task 'mnist-logreg'"):
        simulate("mnist-logreg", {**told, "run.dir": str(tmp_path / "other")})
