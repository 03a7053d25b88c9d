"""What a language model says: text after a prompt, for a look at what was learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from broker.errors import ConfigError, StateError, TaskError
from workers.hf.base import Model
from workers.hf.definition import HfTask
from workers.modules import seeded
from workers.task import Arrays


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is drawn: at most `tokens`, each from the model's own distribution, which a `temperature` below 1
    sharpens; at 0 the likeliest. Raises ConfigError for what cannot work."""

    tokens: int = 60
    temperature: float = 0.8
    seed: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"tokens = {self.tokens} must be 1 or more, and temperature = {self.temperature:g} 0 or more"
            )

    def options(self) -> Mapping[str, Any]:
        """For `generate` of transformers."""
        drawn = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.temperature else {}
        return {"max_new_tokens": self.tokens, "do_sample": bool(self.temperature), **drawn}


def generate(task: HfTask, arrays: Arrays, prompt: str, sampling: Sampling) -> str:
    """What follows the prompt, until the model ends it; without a prompt it begins a text. The same seed gives the
    same text on the same kind of CPU.

    Raises ConfigError for a task that is no language model, or a text longer than the model takes; StateError if
    the arrays are not the task's.
    """
    if task.kind != "causal":
        raise ConfigError(
            f"task {task.name!r} is no language model, so it generates nothing: use `fluffle predict`"
        )
    model = task.model()
    with model.lock, seeded(sampling.seed, model.device), torch.inference_mode():
        try:
            model.load(arrays)
        except TaskError as error:
            raise StateError(f"the model is not one of task {task.name!r}: {error}") from None
        return _continued(model, prompt, sampling)


def _continued(model: Model, prompt: str, sampling: Sampling) -> str:
    module: Any = model.module.eval()
    ids = _begun(model, prompt).to(model.device)
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + sampling.tokens > limit:
        raise ConfigError(
            f"a prompt of {ids.shape[1]} tokens and {sampling.tokens} more are above the {limit} that the model "
            "takes: shorten one of them"
        )
    found = module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=model.tokenizer.pad_token_id,
        **sampling.options(),
    )
    before, whole = (str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in (ids[0], found[0]))
    return whole.removeprefix(before)  # many a tokenizer drops the space before what is decoded alone


def _begun(model: Model, prompt: str) -> torch.Tensor:
    """The prompt's tokens (1, n); if it has none, the end of the text before it, as in training."""
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = model.tokenizer.eos_token_id
    if not ids and end is None:
        raise ConfigError("the model knows no end of text to begin after: give a prompt")
    return torch.tensor([ids or [end]])
