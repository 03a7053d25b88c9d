"""Shakespeare in words: LoRA adapters of a small language model, measured on speakers that nobody trains on."""

from __future__ import annotations

import numpy as np

from workers.data import Dataset
from workers.downloads import smollm2_folder
from workers.hf.definition import HfTask
from workers.tasks.shakespeare import speakers

MOST_CHARACTERS = 2000  # of each speaker: everybody says as much


def load() -> Dataset:
    """`x` (423,) of str: what each speaker says first, in whole lines; `group`: the play.

    As an example is a whole speaker, those held out are speakers, of each play about the same part.
    """
    said = {name: text[: text.rindex("\n", 0, MOST_CHARACTERS)] for name, text in speakers()}
    return Dataset(
        x=np.array(list(said.values()), dtype=object),
        y=np.zeros(len(said), np.int64),
        name="shakespeare-speakers",
        source="36 plays of Shakespeare, the first 2,000 characters of 423 speakers (shipped)",
        group=np.array([name.split(" ")[0] for name in said]),
    )


BARD = HfTask(
    name="shakespeare-lora",
    summary="next word of a play, LoRA adapters of SmolLM2 (135 million parameters)",
    base=smollm2_folder,
    kind="causal",
    load=load,
    adapter={"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    max_length=128,
    defaults={
        "lr": 2e-3,
        "batch_size": 4,
        "max_steps": 8,
        "optimiser": "adamw",
        "clip": 1.0,
        "schedule": "linear",
        "schedule_rounds": 7.0,
    },
    held_out=0.05,
)
