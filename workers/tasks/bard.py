"""Shakespeare in words: LoRA adapters of a small language model, measured on speakers that nobody trains on."""

from __future__ import annotations

import numpy as np

from workers.data import Dataset
from workers.downloads import smollm2_folder
from workers.hf.definition import HfTask
from workers.tasks.shakespeare import speakers

MOST_CHARACTERS = 1000  # of each speaker: everybody says as much, and a held-out one is soon measured


def load() -> Dataset:
    """`x` (423,) of str: what each speaker says first, in whole lines; `group`: the play.

    As an example is a whole speaker, those held out are speakers, of each play about the same part.
    """
    said = {name: text[: text.rindex("\n", 0, MOST_CHARACTERS)] for name, text in speakers()}
    return Dataset(
        x=np.array(list(said.values()), dtype=object),
        y=np.zeros(len(said), np.int64),
        name="shakespeare-speakers",
        source="36 plays of Shakespeare, the first 1,000 characters of 423 speakers (shipped)",
        group=np.array([name.split(" ")[0] for name in said]),
    )


BARD = HfTask(
    name="shakespeare-lora",
    summary="next word of a play, LoRA adapters of SmolLM2 (135 million parameters)",
    base=smollm2_folder,
    kind="causal",
    load=load,
    adapter={"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    max_length=64,
    defaults={
        "lr": 3e-3,
        "batch_size": 4,
        "max_steps": 4,
        "optimiser": "adamw",
        "clip": 1.0,
        "schedule": "linear",
        "schedule_rounds": 6.0,
    },
    held_out=0.05,
    seed=128,  # the first under which no held-out speaker has the name of another one
)
