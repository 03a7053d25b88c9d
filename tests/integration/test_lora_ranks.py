"""Participants of rank 4, 8 and 16 in one run: each sends what it holds, and nothing else is taken."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator.job import Job
from aggregator.settings import RunSettings
from broker import tensors
from broker.head import HeadRecord
from broker.lora import of_rank
from broker.memory import MemoryBroker
from broker.messages import UpdateReady
from broker.tensors import Arrays
from broker.topology import Topology
from fluffle.chaos.task import Pull
from tests.federation import Federation, names, settings
from workers.journal import MemoryJournal
from workers.link import WorkerSettings
from workers.task import Evaluation, TrainConfig, TrainResult
from workers.trainer import Sizes
from workers.worker import Site, Worker, always

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
OUT, INTO, RANK, ROUNDS = 20, 18, 16, 3
RANKS = {"p01": 4, "p02": 8, "p03": 16}
LORA = {"strategy": {"name": "lora-stack"}}


class Lora(Pull):
    """Takes steps down ||s B A - W||^2 / 2, W being the same for all, from what it holds of the model."""

    def __init__(self, name: str, rank: int = RANK) -> None:
        super().__init__(name)
        self.rank = rank
        self.target = np.random.default_rng(1).normal(size=(OUT, INTO))

    def initial(self) -> Arrays:
        rng = np.random.default_rng(2)
        a = rng.normal(scale=0.3, size=(RANK, INTO)).astype(np.float32)
        return {A: a, B: np.zeros((OUT, RANK), np.float32), "bias": np.zeros(3, np.float32)}

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        assert {name: v.shape for name, v in arrays.items()} == {
            name: v.shape for name, v in of_rank(self.initial(), self.rank).items()
        }
        a, b, scale = arrays[A].astype(float), arrays[B].astype(float), RANK / self.rank
        for _ in range(20):
            wrong = scale * b @ a - self.target
            b, a = b - 0.02 * wrong @ a.T, a - 0.02 * b.T @ wrong
        found = {A: a.astype(np.float32), B: b.astype(np.float32), "bias": arrays["bias"] + np.float32(1)}
        return TrainResult(found, self.num_examples)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        scale = RANK / len(arrays[A])
        return Evaluation({"loss": float(np.square(scale * arrays[B] @ arrays[A] - self.target).mean())}, 10)


class Mixed(Federation):
    def job(self, run: RunSettings, **options: object) -> Job:
        return replace(super().job(run, **options), initial=Lora("p00").initial)

    def worker(self, name: str, *_: object, **__: object) -> Worker:
        waits = WorkerSettings(self.heartbeat_s, patience_s=5.0, retry_s=0.2, sizes=self.sizes)
        rank = RANKS[name]
        site = Site(name, always(Lora(name, rank)), self.journals.setdefault(name, MemoryJournal()), lora_rank=rank)
        return Worker(site, self.broker, self.topology, waits)


def federation(directory: Path, inline_bytes: int = 256 << 10) -> Mixed:
    broker = MemoryBroker(Topology("default").access)
    return Mixed(broker, directory, names(3), heartbeat_s=0.2, sizes=Sizes(inline_bytes=inline_bytes))


async def model_of(directory: Path, head: HeadRecord) -> Arrays:
    assert head.model
    path = directory / "checkpoints" / f"{head.model.sha256}.safetensors"
    return tensors.decode(await asyncio.to_thread(path.read_bytes))


async def test_all_ranks_learn_in_one_run_and_the_way_changes_no_bit(tmp_path: Path) -> None:
    run = settings(3, ROUNDS, evaluation={"mode": "federated"}, **LORA)
    head = await federation(tmp_path / "inline").run(run)
    model = await model_of(tmp_path / "inline", head)
    assert model[A].shape == (RANK, INTO)
    np.testing.assert_allclose(model["bias"], ROUNDS)
    before, after = (Lora("p00").evaluate(arrays).metrics["loss"] for arrays in (Lora("p00").initial(), model))
    assert after < before / 4
    for codec in ("none+zstd", "none"):
        place = tmp_path / codec
        streamed = settings(
            3, ROUNDS, evaluation={"mode": "federated"}, broker={"inline_bytes": 0}, codec={"up": codec}, **LORA
        )
        again = await federation(place, inline_bytes=0).run(streamed)
        assert tensors.encode(await model_of(place, again)) == tensors.encode(model)


@pytest.mark.parametrize(("told", "why"), [(4, "has shape"), (0, "has shape"), (17, "adapters of rank 17")])
async def test_arrays_of_another_rank_than_told_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int, why: str
) -> None:
    """p02 sends rank 8, and says something else; the round closes without it."""

    def lying(**fields: object) -> UpdateReady:
        return UpdateReady(
            **{**fields, "lora_rank": told if fields["participant"] == "p02" else fields["lora_rank"]}
        )

    monkeypatch.setattr("workers.trainer.UpdateReady", lying)
    joined = federation(tmp_path)
    run = settings(3, 1, round={"quorum": 2, "deadline_s": 1.5}, **LORA)
    head = await joined.run(run)
    assert head.round == 1
    ledger = await joined.ledger()
    assert {d.participant for d in ledger if d.verdict == "counted"} == {"p01", "p03"}
    refused = [d for d in ledger if d.verdict == "refused"]
    assert refused
    assert all(d.participant == "p02" and why in d.reason for d in refused)


async def test_lower_ranks_are_refused_by_another_strategy(tmp_path: Path) -> None:
    joined = federation(tmp_path)
    head = await joined.run(settings(3, 1, round={"quorum": 1, "deadline_s": 1.5}))
    assert head.round == 1
    assert {d.participant for d in await joined.ledger() if d.verdict == "counted"} == {"p03"}
