"""Large models by Hugging Face, in small: two layers of 32, built here. Nothing is downloaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs large models: pip install 'fluffle[llm]'")
pytest.importorskip("peft", reason="needs large models: pip install 'fluffle[llm]'")

import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)  # fmt: skip

from broker.errors import ConfigError, DataError, StateError, TaskError
from fluffle import simulate
from fluffle.cli import cli
from workers.data import Dataset
from workers.hf.definition import HfTask
from workers.hf.export import write_adapter, write_merged
from workers.hf.generate import Sampling, generate
from workers.hf.recipe import choose
from workers.hf.text import IGNORED, LABELS, packed
from workers.modules import use_threads
from workers.recipe import Recipe
from workers.task import TrainConfig, WorkAbandoned

WORDS = ("good", "fine", "kind", "bad", "sad", "mean", "the", "day", "was")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]")
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "lora_dropout": 0.1}
SETTINGS = {"lr": 0.02, "batch_size": 8, "local_epochs": 2, "optimiser": "adamw"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    use_threads()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def saved(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A BERT and a GPT-2, as folders."""
    torch.manual_seed(seed)
    words = len(WORDS) + len(SPECIAL)
    bert = BertConfig(
        vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    gpt = GPT2Config(
        vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=4, eos_token_id=4
    )
    for name, model in (("bert", BertModel(bert)), ("gpt", GPT2LMHeadModel(gpt))):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder / "bert", folder / "gpt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved(tmp_path_factory.mktemp("models"))


def reviews(count: int = 48, seed: int = 1) -> Dataset:
    """Class 1 has a word of the first three, class 0 one of the next three."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    words = [WORDS[rng.integers(0, 3) + (0 if label else 3)] for label in y]
    x = np.array([f"the day was {word}" for word in words], dtype=object)
    return Dataset(x, y, name="reviews", source="made here")


def classifier(folder: Path, **changes: Any) -> HfTask:
    task = HfTask(
        name="reviews", base=folder, kind="classifier", load=reviews, adapter=LORA, max_length=8, defaults=SETTINGS
    )
    return replace(task, **changes)


def language_model(folder: Path, **changes: Any) -> HfTask:
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    task = HfTask(
        name="days", base=folder, kind="causal", load=reviews, adapter=adapter, max_length=16, defaults=SETTINGS
    )
    return replace(task, **changes)


def config(number: int = 1, **changes: Any) -> TrainConfig:
    return TrainConfig(number, 7, **changes)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def trained(
    task: HfTask, rounds: int = 6, **changes: Any
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """The arrays, and the metrics before and after."""
    bound = task.bind(reviews(), reviews(24, 2))
    arrays, state = bound.initial(), {}
    before = bound.evaluate(arrays).metrics
    for number in range(1, rounds + 1):
        result = bound.train(arrays, config(number, state=state, **changes))
        arrays, state = result.arrays, result.state
    return arrays, before, bound.evaluate(arrays).metrics


def test_adapters_learn_and_only_they_travel(folders: tuple[Path, Path]) -> None:
    arrays, before, after = trained(classifier(folders[0]))
    assert before["accuracy"] < 0.8 < after["accuracy"] > 0.95
    names = {name.rsplit(".", 2)[-2] for name in arrays if name.endswith("weight")}
    assert names == {"lora_A", "lora_B", "classifier"}
    assert any(name.endswith("query.lora_A.weight") for name in arrays)
    assert sum(values.size for values in arrays.values()) < 1000


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "use_dora": True},
        {"peft_type": "IA3", "target_modules": ["value", "output.dense"], "feedforward_modules": ["output.dense"]},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
        None,
    ],
    ids=["DoRA", "IA3", "prompts", "full"],
)
def test_each_way_to_train_moves_what_travels_and_nothing_else(folders: tuple[Path, Path], adapter: Any) -> None:
    task = classifier(folders[0], adapter=adapter)
    bound = task.bind(reviews(16), reviews(8))
    kept = {name: value.clone() for name, value in bound.model.module.state_dict().items()}
    result = bound.train(bound.initial(), config())
    moved = [name for name, value in bound.model.module.state_dict().items() if not torch.equal(value, kept[name])]
    assert 0 < len(moved) <= len(result.arrays) - 2
    assert not same(result.arrays, bound.initial())
    bound.model.load(bound.initial())
    after = bound.model.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in kept.items())


def test_what_a_pattern_freezes_does_not_travel(folders: tuple[Path, Path]) -> None:
    task = classifier(folders[0], adapter=None, frozen=("*.embeddings.*", "*.layer.0.*"))
    arrays = task.bind(reviews(8)).initial()
    assert any(".layer.1." in name for name in arrays)
    assert not any(".embeddings." in name or ".layer.0." in name for name in arrays)


def test_nothing_is_trained_from_another_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = classifier(saved(tmp_path, seed=1)[0])
    arrays = classifier(folders[0]).bind(reviews(8)).initial()
    bound = other.bind(reviews(8), reviews(8))
    for refused in (lambda: bound.train(arrays, config()), lambda: bound.evaluate(arrays)):
        with pytest.raises(TaskError, match=r"belong to base model \w{12}\.\.\., and here is .* get the same base"):
            refused()
    with pytest.raises(StateError, match="belong to base model"):
        other.predict(arrays, reviews(2))
    without = {name: values for name, values in arrays.items() if not name.startswith("base.")}
    with pytest.raises(TaskError, match="no base model"):
        bound.evaluate(without)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {**LORA, "lora_alpha": 8}},
        {"adapter": {**LORA, "r": 3}},
        {"adapter": {**LORA, "target_modules": ["query"]}},
        {"adapter": None},
        {"frozen": ("*classifier.bias",)},
        {"max_length": 9},
        {"seed": 1},
        {"classes": 3},
    ],
    ids=str,
)
def test_nothing_is_trained_for_another_task(folders: tuple[Path, Path], changes: Any) -> None:
    """Scaling and lengths change neither names nor shapes."""
    arrays = classifier(folders[0], **changes).bind().initial()
    with pytest.raises(
        TaskError, match=r"to this base model, but to a task with other settings .* get the same task"
    ):
        classifier(folders[0]).bind(reviews(8)).train(arrays, config())
    shuffled = {**LORA, "target_modules": ("value", "query")}
    bound = classifier(folders[0], adapter=shuffled, defaults={"lr": 1e-3}, load=lambda: reviews(4)).bind(
        reviews(8)
    )
    bound.train(classifier(folders[0]).bind().initial(), config())


def test_arrays_of_other_names_or_shapes_are_refused(folders: tuple[Path, Path]) -> None:
    bound = classifier(folders[0]).bind(reviews(8))
    arrays = bound.initial()
    name = next(name for name in arrays if "lora_A" in name)
    for wrong in ({**arrays, "more": arrays[name]}, {**arrays, name: arrays[name][:1]}):
        with pytest.raises(TaskError, match="do both sides have the same"):
            bound.train(wrong, config())
    with pytest.raises(TaskError, match="other settings"):
        bound.train({**arrays, "task.sha256." + "0" * 64: np.zeros((), np.float32)}, config())


def test_equal_seeds_give_equal_bits_and_others_do_not(folders: tuple[Path, Path]) -> None:
    first, second = (classifier(folders[0]).bind(reviews(16)) for _ in range(2))  # each loads the base anew
    assert same(first.initial(), second.initial())
    a, b = (bound.train(bound.initial(), config()).arrays for bound in (first, second))
    c = first.train(first.initial(), TrainConfig(1, 8)).arrays
    assert same(a, b)
    assert not same(a, c)


@pytest.mark.parametrize("make", [classifier, language_model])
def test_gradients_of_parts_add_up_to_that_of_the_batch(
    folders: tuple[Path, Path], make: Callable[..., HfTask]
) -> None:
    kind = make is language_model
    adapter = {**LORA, "lora_dropout": 0.0} if not kind else language_model(folders[1]).adapter
    bound = make(folders[kind], adapter=adapter).bind(reviews(13))
    bound.model.module.config.hidden_dropout_prob = 0.0
    for module in bound.model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start = {name: values + np.float32(0.01) for name, values in bound.initial().items()}
    whole, parts = (
        bound.train(start, config(wants="gradient", settings={"micro_batch": size})).arrays for size in (0, 3)
    )
    assert any(np.abs(values).max() > 1e-4 for values in whole.values())
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, atol=1e-6)


def test_a_language_model_learns_and_its_perplexity_is_that_of_its_loss(folders: tuple[Path, Path]) -> None:
    arrays, before, after = trained(language_model(folders[1], adapter=None), rounds=4)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert not any("lm_head" in name for name in arrays)  # tied to the embeddings, which travel once


def test_texts_are_packed_with_an_end_behind_each_and_prompts_are_not_counted() -> None:
    pairs = np.array([["the day was", "good"], ["was", "bad day"]], dtype=object)
    examples, report = packed(Dataset(pairs, np.zeros(2, int)), tokenizer(), 5)
    ids = [column.tolist() for column in examples.columns["input_ids"]]
    labels = [column.tolist() for column in examples.columns[LABELS]]
    assert ids == [[11, 12, 13, 5, 4], [13, 8, 12, 4]]
    assert labels == [[IGNORED] * 3 + [5, 4], [IGNORED, 8, 12, 4]]
    assert examples.targets.tolist() == [2, 3]
    assert (report.rows, report.examples, report.tokens) == (2, 2, 9)
    batch = examples.batch(torch.tensor([0, 1]), 0)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert batch[LABELS].tolist()[1][-1] == IGNORED


def test_padding_changes_nothing(folders: tuple[Path, Path]) -> None:
    data = Dataset(np.array(["good day", "the day was bad bad bad"], dtype=object), np.array([1, 0]))
    bound = classifier(folders[0]).bind(None, data)
    alone = [classifier(folders[0]).bind(None, data.take(np.array([row]))) for row in (0, 1)]
    loss = [each.evaluate(each.initial()).metrics["loss"] for each in alone]
    assert bound.evaluate(bound.initial()).metrics["loss"] == pytest.approx(np.mean(loss), abs=1e-6)


def test_budgets_end_training_and_steps_are_told_truly(folders: tuple[Path, Path]) -> None:
    bound = classifier(folders[0], defaults={"lr": 0.1, "batch_size": 4}).bind(reviews(32))
    start = bound.initial()
    assert bound.train(start, config()).effective_steps == 8
    assert bound.train(start, config(settings={"max_steps": 3})).effective_steps == 3
    ticks = iter(range(100))
    slow = bound.train(start, config(settings={"max_seconds": 2.0}, clock=lambda: float(next(ticks))))
    assert slow.effective_steps == 2
    warm = bound.train(start, config(settings={"warmup_rounds": 1.0}))
    assert warm.effective_steps == pytest.approx(4.0)
    assert warm.step_sum == pytest.approx(0.4)
    assert bound.train(start, config(settings={"clip": 1.0})).effective_steps == 0
    with pytest.raises(WorkAbandoned):
        bound.train(start, config(should_stop=lambda: True))


def test_a_clipped_step_is_no_longer_than_told(folders: tuple[Path, Path]) -> None:
    bound = classifier(folders[0], defaults={"lr": 1.0, "batch_size": 0}).bind(reviews(32))
    start = bound.initial()
    end = bound.train(start, config(settings={"clip": 1e-3})).arrays
    assert math.sqrt(sum(float(np.square(end[n] - start[n]).sum()) for n in start)) == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_depends_on_the_round_alone() -> None:
    tuning = Recipe(warmup_rounds=2, schedule="linear", schedule_rounds=6, max_steps=2)
    assert [tuning.scale(at) for at in (0, 1, 2, 4, 6, 9)] == [0, 0.5, 1, 0.5, 0, 0]
    assert tuning.scales(3, 100) == [tuning.scale(2.25), tuning.scale(2.75)]
    cosine = Recipe(schedule="cosine", schedule_rounds=4)
    assert [round(cosine.scale(at), 9) for at in (0, 2, 4)] == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "linear"}, "train.schedule_rounds"),
        ({"schedule": "step"}, "constant or linear or cosine"),
        ({"precision": "float16"}, "float32 or bfloat16"),
        ({"micro_batch": -1}, "0 or more"),
        ({"clip": "much"}, "no float"),
        ({"mixup": 0.2}, "does not go with text"),
        ({"lrr": 0.2}, "did you mean train.lr"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(settings)


@pytest.mark.parametrize(
    "settings", [{"checkpointing": True}, {"precision": "bfloat16"}, {"class_weights": "balanced"}]
)
def test_what_saves_memory_still_learns(folders: tuple[Path, Path], settings: Any) -> None:
    arrays, before, after = trained(classifier(folders[0]), rounds=4, settings=settings)
    assert after["loss"] < before["loss"]
    assert all(values.dtype == np.float32 for values in arrays.values())


def test_checkpointing_gives_the_same_gradients(folders: tuple[Path, Path]) -> None:
    bound = classifier(folders[0]).bind(reviews(16))
    a, b = (bound.train(bound.initial(), config(settings={"checkpointing": on})).arrays for on in (False, True))
    for name, values in a.items():
        np.testing.assert_allclose(b[name], values, atol=1e-5)


def test_wrong_data_is_refused(folders: tuple[Path, Path]) -> None:
    task = classifier(folders[0])
    with pytest.raises(DataError, match="wants texts"):
        task.bind(Dataset(np.zeros((3, 2)), np.zeros(3, int)))
    with pytest.raises(DataError, match="classes 0 to 2"):
        task.bind(replace(reviews(3), y=np.array([0, 1, 2])))
    with pytest.raises(DataError, match="no such folder"):
        classifier(folders[0] / "missing").bind()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_plain_transformers_and_peft_load_what_is_exported(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import peft

    task = classifier(folders[0])
    arrays, _, after = trained(task)
    write_adapter(task, arrays, tmp_path / "adapter")
    write_merged(task, arrays, tmp_path / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=2)
    loaded = [
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"),
    ]
    held_out = reviews(24, 2)
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = words(held_out.x.tolist(), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    mine = task.predict(arrays, held_out)
    for model in loaded:
        model.eval()
        with torch.inference_mode():
            found = model(**inputs).logits.softmax(dim=1).max(dim=1)
        assert found.indices.tolist() == [prediction.value for prediction in mine]
        np.testing.assert_allclose(found.values, [prediction.probability for prediction in mine], atol=1e-5)
        assert (found.indices.numpy() == held_out.y).mean() == pytest.approx(after["accuracy"])


def test_a_language_model_writes_what_it_learned(folders: tuple[Path, Path]) -> None:
    task = language_model(folders[1], adapter=None)
    arrays, _, _ = trained(task, rounds=12)
    likeliest = Sampling(tokens=8, temperature=0)
    assert generate(task, arrays, "the day was", likeliest).strip() in WORDS[:6]  # and then the text ends
    assert generate(task, arrays, "", likeliest).startswith("the day was")
    assert len(generate(task, arrays, "", Sampling(tokens=2, temperature=0)).split()) == 2
    drawn = [
        generate(task, arrays, "the day was", Sampling(tokens=8, seed=seed)) for seed in (*range(6), *range(6))
    ]
    assert drawn[:6] == drawn[6:]
    assert len(set(drawn)) > 1
    assert generate(task, task.bind().initial(), "the day was", likeliest).strip() not in WORDS[:6]


def test_what_cannot_be_written_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    task, other = language_model(folders[1]), language_model(saved(tmp_path, seed=1)[1])
    arrays = task.bind().initial()
    with pytest.raises(ConfigError, match="a prompt of 3 tokens and 30 more are above the 32 that the model takes"):
        generate(task, arrays, "the day was", Sampling(tokens=30))
    with pytest.raises(StateError, match=r"not one of task 'days'.*belong to base model"):
        generate(other, arrays, "the", Sampling())
    with pytest.raises(ConfigError, match="no language model"):
        generate(classifier(folders[0]), arrays, "the", Sampling())
    for wrong in ({"tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}):
        with pytest.raises(ConfigError, match="must be 1 or more, and temperature"):
            Sampling(**wrong)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_plain_transformers_and_peft_write_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import peft

    task = language_model(folders[1])
    arrays, _, _ = trained(task)
    write_adapter(task, arrays, tmp_path / "adapter")
    write_merged(task, arrays, tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = words("the day", add_special_tokens=False, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    base = AutoModelForCausalLM.from_pretrained(folders[1])
    loaded = [
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ]
    mine = generate(task, arrays, "the day", Sampling(tokens=6, temperature=0))
    assert mine != generate(task, task.bind().initial(), "the day", Sampling(tokens=6, temperature=0))
    for model in loaded:
        found = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert words.decode(found[0, 2:], skip_special_tokens=True) == mine.strip()


def test_the_command_writes_after_a_run_and_before_it(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("small_writer")
    module.__dict__["TASK"] = language_model(folders[1], adapter=None, load=lambda: reviews())
    monkeypatch.setitem(sys.modules, "small_writer", module)
    run, name = {"round.participants": 2, "stop.rounds": 12, "run.dir": str(tmp_path / "a")}, "small_writer:TASK"
    simulate(name, run)
    asked = ["--prompt", "the day", "--temperature", "0", "--tokens", "1"]

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["generate", *arguments, *asked])
        assert done.exit_code == 0, done.output
        return done.output

    assert said(str(tmp_path / "a")) == "the day was\n"
    assert said(str(tmp_path / "a" / "model.safetensors"), name) == "the day was\n"
    assert said(str(tmp_path / "a"), "--initial") != "the day was\n"
    done = CliRunner().invoke(cli, ["generate", str(tmp_path / "a"), "digits"])
    assert (done.exit_code, "task 'digits' is no language model" in done.output) == (2, True), done.output


def test_a_federation_trains_one_and_the_command_exports_it(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("small_large")
    module.__dict__["TASK"] = classifier(folders[0], load=lambda: reviews())
    monkeypatch.setitem(sys.modules, "small_large", module)
    run = {
        "round.participants": 3,
        "data.partition": "dirichlet:0.5",
        "stop.rounds": 2,
        "simulation.vectorise": True,
    }
    first, second = (
        simulate("small_large:TASK", {**run, "run.dir": str(tmp_path / name), "simulation.vectorise": name == "b"})
        for name in ("a", "b")
    )
    assert first.summary["model_sha256"] == second.summary["model_sha256"]
    assert first.summary["updates"]["accepted"] == 6
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "a"), str(tmp_path / "out"), "--format", "peft"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "a"), "--sample", "2"])
    assert done.output.startswith("row,prediction,probability,truth\n0,"), done.output
