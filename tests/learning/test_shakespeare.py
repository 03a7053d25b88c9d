"""Next characters: cut without overlap, held out by time, learned, and side by side where that is possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import fedavg, measure

from broker.errors import DataError
from fluffle.learning import predict
from workers.data import Dataset, held_out_mask
from workers.partition import Plan, Shares, share_out
from workers.preprocess import Preprocess, prepare
from workers.recipe import recipe
from workers.stacked import Member, Unstackable, Work, train_side_by_side, try_out
from workers.task import TrainConfig
from workers.tasks import bard, find_task, shakespeare
from workers.tasks.shakespeare import SYMBOLS, WINDOW, CharLSTM, CharTransformer, cut, load, symbols_of, text_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def speakers() -> Dataset:
    return load()


@pytest.fixture(scope="module")
def four(speakers: Dataset) -> Shares:
    """The speakers of one play, dealt out to four."""
    chosen = np.char.startswith(speakers.group, "tempest ")
    return share_out(speakers.take(chosen), Plan(4, "natural"))


def test_every_character_is_the_target_of_one_window() -> None:
    symbols = symbols_of("To be, or not to be:\nthat is the question. " * 10)
    x, y = cut(symbols)
    assert x.shape == y.shape == (5, WINDOW)
    assert np.array_equal(x.ravel(), symbols[:400])
    assert np.array_equal(y.ravel(), symbols[1:401])
    with pytest.raises(DataError, match="80 characters is too short: a window takes 81"):
        cut(symbols[:80])


def test_symbols_are_the_printable_characters() -> None:
    text = "\n" + "".join(map(chr, range(32, 127)))
    assert symbols_of(text).tolist() == list(range(SYMBOLS))
    assert text_of(symbols_of(text)) == text
    assert text_of(symbols_of("caf\u00e9\t\x7f")) == "caf?\n~"


def test_there_are_423_speakers_in_single_bytes(speakers: Dataset) -> None:
    assert (speakers.x.dtype, speakers.y.dtype, speakers.x.shape) == (np.uint8, np.uint8, (43_242, WINDOW))
    assert speakers.group is not None
    assert len(np.unique(speakers.group)) == 423
    assert speakers.x.max() < SYMBOLS


def test_the_end_of_each_speakers_text_is_held_out(speakers: Dataset) -> None:
    mask = held_out_mask(speakers, 0.2, seed=1)
    assert speakers.group is not None
    for name in ("tempest PROSPERO", "tempest ARIEL"):
        own = mask[speakers.group == name]
        assert own.sum() == round(0.2 * len(own))
        assert not own[: len(own) - own.sum()].any()
    shares = share_out(speakers, Plan(423, "natural"))
    assert "tempest-ariel" in {shard.name for shard in shares.shards}
    assert sum(len(shard.held_out) for shard in shares.shards) == mask.sum() == len(shares.held_out)


@pytest.mark.parametrize("model", [CharLSTM, CharTransformer])
def test_no_model_sees_what_comes_later(model: type[torch.nn.Module]) -> None:
    x = torch.randint(SYMBOLS, (2, WINDOW), dtype=torch.uint8)
    changed = x.clone()
    changed[:, 50:] = 7
    with torch.inference_mode():
        one = model()
        before, after = one(x), one(changed)
    assert before.shape == (2, SYMBOLS, WINDOW)
    torch.testing.assert_close(before[:, :, :50], after[:, :, :50])
    assert not torch.allclose(before[:, :, 50:], after[:, :, 50:])


@pytest.mark.parametrize("name", ["shakespeare-lstm", "shakespeare-transformer"])
def test_federated_averaging_learns_characters(name: str, four: Shares) -> None:
    definition = find_task(name)
    few = replace(four, held_out=four.held_out.take(np.arange(0, len(four.held_out), 8)))
    before = measure(definition, few, definition.bind().initial())
    after = measure(definition, few, fedavg(definition, few, rounds=2, train={"max_steps": 3}))
    assert before["loss"] > 4.4  # ln 96 = 4.56
    assert after["loss"] < 4.2
    assert after["accuracy"] > 0.1


def test_the_transformer_trains_side_by_side_and_the_lstm_does_not(four: Shares) -> None:
    chosen = recipe({"lr": 0.1, "batch_size": 8, "max_steps": 3})
    definition = find_task("shakespeare-transformer")
    tasks = [definition.bind(shard.train) for shard in four.shards]
    tasks.sort(key=lambda task: -task.num_examples)
    start = tasks[0].initial()
    members = [Member(task, seed) for seed, task in enumerate(tasks)]
    together = train_side_by_side(try_out(tasks[0], chosen), members, Work(start, chosen))
    settings = {"lr": 0.1, "momentum": 0.0, "batch_size": 8, "max_steps": 3}
    for member, outcome in zip(members, together, strict=True):
        alone = member.task.train(start, TrainConfig(1, member.seed, settings))
        assert not isinstance(outcome, Exception)
        assert outcome.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
        for array, own in alone.arrays.items():
            np.testing.assert_allclose(outcome.arrays[array], own, atol=1e-4)
    with pytest.raises(Unstackable):
        try_out(find_task("shakespeare-lstm").bind(four.shards[0].train), chosen)


def test_a_prediction_is_the_character_after_the_window(four: Shares) -> None:
    definition = find_task("shakespeare-lstm")
    found = predict(definition, definition.bind().initial(), four.held_out.take(np.arange(3)))
    assert [one.row for one in found] == [0, 1, 2]
    assert all(0 <= one.value < SYMBOLS and 0 < (one.probability or 0) < 0.1 for one in found)


def test_symbols_out_of_range_are_refused() -> None:
    data = Dataset(np.array([[0, 1], [2, 96]]), np.zeros((2, 2), int), name="text")
    with pytest.raises(DataError, match=r"whole numbers from 0 to 95 \(preprocess.symbols\)"):
        prepare(data, Preprocess(symbols=96))
    assert prepare(data, Preprocess(symbols=97))[0].x.dtype == np.uint8
    with pytest.raises(DataError, match="symbols are not scaled"):
        Preprocess(symbols=3, bounds=(0.0, 1.0))


def test_a_site_brings_its_own_text(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Shall I compare thee to a summer's day?\n" * 20)
    own = load(str(tmp_path / "own.txt"))
    assert (len(own), own.group, own.in_time) == (9, None, True)
    assert text_of(own.x[0]) == "Shall I compare thee to a summer's day?\n" * 2
    with pytest.raises(DataError, match=r"none.txt: cannot be read as text"):
        load(str(tmp_path / "none.txt"))


def test_whole_speakers_are_held_out_whose_name_nobody_else_has() -> None:
    task, data = find_task("shakespeare-lora"), bard.load()
    names = np.array([name.split(" ", 1)[1].upper() for name, _ in shakespeare.speakers()])
    plan = Plan(4, "natural", held_out=task.held_out, split_seed=task.seed)
    shares = share_out(replace(data, x=names), plan)
    assert len(shares.held_out) == 23
    assert set(shares.held_out.x).isdisjoint(shares.train.x)
    assert all(shard.train.group is not None and len(set(shard.train.group)) == 9 for shard in shares.shards)
    assert all(text.count("\n") > 5 and len(text) <= 1000 for text in data.x)
