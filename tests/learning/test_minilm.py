"""MiniLM with LoRA at four participants with very different mails, each a process: what the example claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from yarl import URL

pytest.importorskip("transformers", reason="needs large models: pip install 'fluffle[llm]'")
pytest.importorskip("peft", reason="needs large models: pip install 'fluffle[llm]'")

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from broker.errors import DataError
from fluffle.cli import cli
from fluffle.learning import held_out
from tests.rabbit_node import PARTICIPANTS, Rabbit, password
from workers.downloads import minilm_folder, read_mails
from workers.tasks.spam import SPAM

PARTICIPANTS_HERE = ("--participants", "4", "--partition", "dirichlet:0.3", "--rounds", "8")
STEPS = 16  # of a participant in a round
WHOLE_MODEL_BYTES = 4 * 22_714_756  # float32


def fluffle(*args: str) -> Result:
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    return done


def result(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return found


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FLUFFLE_DATA_DIR", raising=False)  # what this user fetched
    try:
        read_mails()
        return minilm_folder()
    except DataError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
@pytest.mark.xdist_group("processes")
@pytest.mark.timeout(3600)
def test_the_federation_beats_each_participant_and_its_adapter_loads_elsewhere(
    rabbit: Rabbit, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secrets = tmp_path / "secrets.toml"
    secrets.write_text("".join(f'{user} = "{password(user)}"\n' for user in ["aggregator", *PARTICIPANTS]))
    secrets.chmod(0o600)
    url = str(URL.build(scheme="amqp", host=rabbit.url.host or "", port=rabbit.url.port))
    over = (
        "--broker",
        url,
        "--secrets",
        str(secrets),
        "--set",
        f"broker.federation={rabbit.topology().federation}",
    )
    print(fluffle("simulate", "spam-lora", *PARTICIPANTS_HERE, *over, "--run-dir", "spam").output)
    pooled = ("--set", f"train.max_steps={4 * STEPS}")
    print(fluffle("central", "spam-lora", *PARTICIPANTS_HERE, *pooled, "--run-dir", "pooled").output)
    print(fluffle("local", "spam-lora", *PARTICIPANTS_HERE, "--run-dir", "alone").output)
    print(fluffle("runs", "show", "spam").output, fluffle("runs", "show", "pooled").output)
    federated, together, alone = (result(folder) for folder in ("spam", "pooled", "alone"))
    accuracy = federated["metrics"]["accuracy"]
    assert federated["updates"]["accepted"] == 32
    assert accuracy >= together["metrics"]["accuracy"] - 0.03
    assert accuracy >= max(one["metrics"]["accuracy"] for one in alone["participants"])
    assert 300 * federated["bytes"]["up"] < 32 * WHOLE_MODEL_BYTES
    fluffle("export", "spam", "merged", "--format", "merged")
    fluffle("export", "spam", "adapter", "--format", "peft")
    mails = held_out(SPAM)
    for folder in ("merged", "adapter"):
        right = predicted(folder, base, mails.x.tolist()) == mails.y
        print(folder, float(right.mean()))
        assert float(right.mean()) == pytest.approx(accuracy, abs=1e-9)


def predicted(folder: str, base: Path, texts: list[str]) -> Any:
    """By plain transformers and peft."""
    from peft import PeftModel

    if folder == "merged":
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    batch = tokens(texts, truncation=True, max_length=SPAM.max_length, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return np.asarray(model.eval()(**batch).logits.argmax(dim=1))
