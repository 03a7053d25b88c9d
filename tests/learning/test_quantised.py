"""A frozen base in 8 or 4 bits, under adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from broker.errors import ConfigError, TaskError
from tests.learning.test_large_models import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    classifier,
    config,
    reviews,
    same,
    saved,
    trained,
)
from workers.hf.export import write_merged
from workers.hf.quantised import BLOCK, NF4, WAYS, SmallEmbedding, SmallLinear, quantise, restore, size_bytes
from workers.modules import use_threads

FORMS = ("int8", "nf4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    use_threads()
    return saved(tmp_path_factory.mktemp("models"))


def frozen(into: int = 100, out: int = 7) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(into, out).requires_grad_(False)


def test_int8_is_off_by_at_most_half_a_step_of_its_row() -> None:
    weight = frozen().weight
    values, scale = WAYS["int8"].small(weight)
    assert values.dtype == torch.int8
    assert ((WAYS["int8"].whole(values, scale, 100) - weight).abs() <= scale / 2 + 1e-9).all()
    assert torch.equal(WAYS["int8"].whole(*WAYS["int8"].small(torch.zeros(2, 3)), 3), torch.zeros(2, 3))


def test_nf4_takes_the_nearest_of_its_sixteen_values_block_by_block() -> None:
    weight = frozen().weight
    values, scale = WAYS["nf4"].small(weight)
    assert values.shape == (7, BLOCK)  # 100 values are two blocks, and two of them are a byte
    assert values.dtype == torch.uint8
    found, table = WAYS["nf4"].whole(values, scale, 100), np.array(NF4, np.float32)
    for block, whole, one in (
        (weight[row, at : at + BLOCK].numpy(), found[row, at : at + BLOCK].numpy(), scale[row, at // BLOCK].item())
        for row in range(7)
        for at in (0, BLOCK)
    ):
        assert one == np.abs(block).max()
        nearest = table[np.abs(block[:, None] / one - table).argmin(axis=1)] * one
        np.testing.assert_allclose(whole, nearest, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_the_restored_layer(form: str) -> None:
    small, x = SmallLinear(frozen(), form), torch.randn(3, 5, 100, requires_grad=True)
    y = small(x)
    y.square().sum().backward()
    gradient, x.grad = x.grad, None
    again = small.restored()(x)
    again.square().sum().backward()
    torch.testing.assert_close(y, again)
    torch.testing.assert_close(gradient, x.grad)
    assert not list(small.parameters())
    table = SmallEmbedding(nn.Embedding(20, 70, padding_idx=0).requires_grad_(False), form)
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(table(ids), table.restored()(ids))


def test_nothing_float_is_kept_for_the_gradient() -> None:
    small, kept = SmallLinear(frozen(), "int8"), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with hooks:
        small(torch.randn(2, 100, requires_grad=True))
    assert kept == []
    with hooks:
        small.restored()(torch.randn(2, 100, requires_grad=True))
    assert (100, 7) in kept


@pytest.mark.parametrize("form", FORMS)
def test_what_is_frozen_becomes_small_and_adapters_learn_on_it(folders: tuple[Path, Path], form: Any) -> None:
    task = classifier(folders[0], quantised=form)
    plain, module = classifier(folders[0]).bind().model.module, task.bind().model.module
    left = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    assert all("lora_" in name or "modules_to_save" in name for name in left)
    assert not any(type(part) is nn.Embedding for part in module.modules())
    assert size_bytes(module) < (0.55 if form == "int8" else 0.45) * size_bytes(plain)
    arrays, before, after = trained(task)
    assert before["accuracy"] < 0.8 < after["accuracy"] > 0.95
    assert {name for name in arrays if "sha256" not in name} == {
        name for name in classifier(folders[0]).bind().initial() if "sha256" not in name
    }
    again, _, _ = trained(classifier(folders[0], quantised=form))
    assert same(arrays, again)


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"checkpointing": True}])
def test_it_goes_with_what_saves_memory(folders: tuple[Path, Path], settings: Any) -> None:
    _, before, after = trained(classifier(folders[0], quantised="int8"), rounds=4, settings=settings)
    assert after["loss"] < before["loss"]


def test_bits_are_part_of_what_everybody_must_share(folders: tuple[Path, Path]) -> None:
    arrays = classifier(folders[0], quantised="int8").bind().initial()
    for other in ("", "nf4"):
        with pytest.raises(TaskError, match="a task with other settings"):
            classifier(folders[0], quantised=other).bind(reviews(8)).train(arrays, config())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_merged_is_what_was_trained(folders: tuple[Path, Path], tmp_path: Path, form: Any) -> None:
    task = classifier(folders[0], quantised=form)
    arrays, _, _ = trained(task, rounds=3)
    write_merged(task, arrays, tmp_path)
    model, held_out = AutoModelForSequenceClassification.from_pretrained(tmp_path), reviews(24, 2)
    inputs = AutoTokenizer.from_pretrained(tmp_path)(held_out.x.tolist(), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    model.eval()
    with torch.inference_mode():
        found = model(**inputs).logits.softmax(dim=1).max(dim=1)
    mine = task.predict(arrays, held_out)
    assert found.indices.tolist() == [prediction.value for prediction in mine]
    np.testing.assert_allclose(found.values, [prediction.probability for prediction in mine], atol=1e-5)


def test_where_there_is_nothing_to_quantise_it_says_so(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="no frozen linear layer"):
        classifier(folders[0], adapter=None, quantised="int8").bind()
    with pytest.raises(ConfigError, match="must be one of int8, nf4"):
        classifier(folders[0], quantised="int3").bind()


def test_a_weight_that_others_have_too_stays_as_it_is() -> None:
    tied = nn.ModuleDict(
        {"words": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False), "more": nn.Linear(4, 4)}
    )
    tied["head"].weight = tied["words"].weight
    tied.requires_grad_(False)
    quantise(tied, "nf4")
    assert [type(part) for part in tied.values()] == [nn.Embedding, nn.Linear, SmallLinear]
    restore(tied)
    assert type(tied["more"]) is nn.Linear
