"""Real weights: SmolLM2 learns Shakespeare, in short. Needs the extra and `fluffle data fetch smollm2`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs large models: pip install 'fluffle[llm]'")
pytest.importorskip("peft", reason="needs large models: pip install 'fluffle[llm]'")

from inprocess import fedavg, measure
from transformers import AutoModelForCausalLM, AutoTokenizer

from broker.errors import DataError
from workers.downloads import smollm2_folder
from workers.hf.base import identity
from workers.hf.export import write_merged
from workers.hf.generate import Sampling, generate
from workers.modules import use_threads
from workers.partition import Plan, Shares, share_out
from workers.tasks import find_task
from workers.tasks.bard import load

WEIGHTS = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
VERSE = "What say you, sir?\nI'll go 12 miles,  and 'twas in 1599.\n"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FLUFFLE_DATA_DIR", raising=False)  # what this user fetched
    use_threads()
    try:
        return smollm2_folder()
    except DataError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_weights_are_the_same_wherever_they_were_written_out(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS


@pytest.mark.slow
def test_the_tokenizer_takes_digits_alone_and_gives_back_what_it_took(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(VERSE)["input_ids"]
    assert tokenizer.decode(ids) == VERSE
    assert tokenizer.convert_ids_to_tokens(tokenizer("two  12")["input_ids"]) == ["two", "ĠĠ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("so<|im_end|>")["input_ids"][-1] == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_perplexity_on_unseen_speakers_falls_and_what_was_learned_merges(folder: Path, tmp_path: Path) -> None:
    task = find_task("shakespeare-lora")
    shares = share_out(load(), Plan(4, "natural", held_out=task.held_out, split_seed=task.seed))
    few = Shares(shares.train, shares.held_out.take(np.arange(0, 23, 12)), shares.shards[:2])
    before = measure(task, few, task.bind().initial())
    arrays = fedavg(task, few, rounds=1, train={"max_steps": 3})
    after = measure(task, few, arrays)
    assert after["perplexity"] < 0.9 * before["perplexity"]
    write_merged(task, arrays, tmp_path / "merged")
    model, words = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    asked = words("What say you", return_tensors="pt")
    found = model.eval().generate(**asked, max_new_tokens=8, do_sample=False)
    mine = generate(task, arrays, "What say you", Sampling(tokens=8, temperature=0))
    assert words.decode(found[0]) == "What say you" + mine
    assert identity(folder) != identity(tmp_path / "merged")
