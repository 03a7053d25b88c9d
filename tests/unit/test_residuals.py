"""What a residual is of use for, and that a worker's update pays and owes what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from broker import tensors
from broker.codecs import packing
from broker.errors import BadMessage
from broker.messages import TrainRound, Where
from broker.tensors import Arrays
from workers.choice import Measured, choose
from workers.kept import Kept
from workers.task import Evaluation, TrainConfig, TrainResult
from workers.trainer import Errand, Finished, Sizes, carry_out, described, owed_by, train_config

MODEL = {"w": np.zeros((20, 30), np.float32), "b": np.zeros(7, np.float32), "n": np.zeros((), np.int64)}


@dataclass
class Adds:
    """Training adds the same numbers in every round."""

    name: str = "adds"
    num_examples: int = 10
    step: Arrays = field(
        default_factory=lambda: {
            "w": np.random.default_rng(1).normal(size=(20, 30)).astype(np.float32),
            "b": np.full(7, 1 / 3, np.float32),
            "n": np.ones((), np.int64),
        }
    )

    def initial(self) -> Arrays:
        return MODEL

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        return TrainResult({name: arrays[name] + self.step[name] for name in arrays}, 10)

    def evaluate(self, arrays: Arrays) -> Evaluation:
        return Evaluation({"loss": 1.0}, 10)


def told(
    number: int = 1, codecs: Sequence[str] = ("topk:0.01",), run_id: str = "run-1", **more: object
) -> TrainRound:
    blob = tensors.encode(MODEL)
    fields = {
        "run_id": run_id, "epoch": 1, "seq": 1, "task": number, "round": number, "attempt": 1, "work": "train",
        "asked": ("p01",), "version": number - 1, "codecs": tuple(codecs),
        "model": Where(where="inline", size_bytes=len(blob), sha256="0" * 64), **more,
    }  # fmt: skip
    return TrainRound(**fields)


def worked(order: TrainRound, residual: Kept | None = None, participant: str = "p01") -> Finished:
    packing = choose(order.codecs, 1, Measured())
    errand = Errand(order, tensors.encode(MODEL), participant, packing, residual)
    finished = carry_out(Adds(), errand, train_config(order, participant, lambda: False))
    return described(finished, order.model, Sizes())


def sent(finished: Finished) -> Arrays:
    return packing(finished.held.update.codec).unpack(finished.held.blob, MODEL)


def test_an_update_owes_what_its_codec_lost_and_the_next_pays() -> None:
    first = worked(told(1))
    assert first.held.update.codec == "topk:0.01"
    assert first.owes
    second = worked(told(2), first.owes)
    assert second.owes
    left = tensors.decode(second.owes.blob)
    for name in ("w", "b"):
        total = sent(first)[name] + sent(second)[name] + left[name]
        np.testing.assert_allclose(total, 2 * Adds().step[name], rtol=1e-5, atol=1e-6)


def test_the_same_order_gives_the_same_bits_whatever_the_attempt() -> None:
    for codec in ("qsgd:7", "powersgd:1+zstd", "sign"):
        first, again = worked(told(3, [codec])), worked(told(3, [codec], attempt=2))
        assert first.held.blob == again.held.blob
        assert (first.owes and first.owes.blob) == (again.owes and again.owes.blob)


def test_draws_differ_by_participant_and_round() -> None:
    bodies = {bytes(worked(told(n, ["qsgd:1"]), participant=p).held.blob) for n in (1, 2) for p in ("p01", "p02")}
    assert len(bodies) == 4


def test_without_feedback_nothing_is_owed_and_without_codec_the_bytes_are_the_old_ones() -> None:
    assert worked(told(1, ["int8"])).owes is None
    plain = worked(told(1, []))
    assert plain.owes is None
    assert plain.held.update.codec == "none"
    assert plain.held.blob == tensors.encode(Adds().step)


def test_whoever_pays_without_feedback_owes_nothing_any_more() -> None:
    owes = worked(told(1)).owes
    paid = worked(told(2, ["fp16"]), owes)
    assert paid.owes
    assert tensors.decode(paid.owes.blob) == {}
    np.testing.assert_allclose(sent(worked(told(1)))["w"] + sent(paid)["w"], 2 * Adds().step["w"], rtol=2e-3)


def test_an_evaluation_neither_pays_nor_owes() -> None:
    finished = worked(told(2, work="evaluate"), worked(told(1)).owes)
    assert finished.owes is None
    assert finished.held.update.codec == "none"


def test_the_first_known_codec_is_used_or_none() -> None:
    assert worked(told(1, ["gzip:9", "int8+zstd", "fp16"])).held.update.codec == "int8+zstd"
    assert worked(told(1, ["gzip:9"])).held.update.codec == "none"


def test_rounds_that_were_missed_halve_what_is_owed() -> None:
    owes = worked(told(1, ["sign"])).owes
    assert owes
    [left] = [array for name, array in tensors.decode(owes.blob).items() if name == "w"]
    late = worked(told(4, ["none"]), owes)
    np.testing.assert_allclose(sent(late)["w"], Adds().step["w"] + left / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("order", "why"),
    [(told(2, run_id="run-2"), "run 'run-1'"), (told(1), "went back"), (told(1, attempt=2), "went back")],
)
def test_a_residual_of_another_run_or_of_rounds_to_come_is_none(order: TrainRound, why: str) -> None:
    owes = worked(told(1)).owes
    assert owes
    with pytest.raises(BadMessage, match=why):
        owed_by(owes, order, MODEL)


def test_a_residual_of_another_shape_is_none() -> None:
    owes = worked(told(1)).owes
    assert owes
    assert owed_by(owes, told(2), MODEL)
    for name, array in (("w", np.zeros((30, 20), np.float32)), ("w", np.zeros((20, 30), np.int32))):
        with pytest.raises(BadMessage):
            owed_by(owes, told(2), MODEL | {name: array})
    with pytest.raises(BadMessage, match="none of this model"):
        owed_by(owes, told(2), {"other": MODEL["w"]})


def test_a_residual_comes_back_from_its_file() -> None:
    owes = worked(told(1)).owes
    assert owes
    assert Kept.from_bytes(owes.to_bytes()) == owes
