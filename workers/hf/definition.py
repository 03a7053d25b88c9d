"""What a user writes to train a large model. Importing it brings no transformers; binding it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from broker.errors import ConfigError, StateError, TaskError
from workers.data import Dataset
from workers.definition import Prediction
from workers.devices import AUTO, find
from workers.hf import ranks
from workers.hf.base import BASE, SETTINGS, Base, Kind, Model
from workers.hf.quantised import Form
from workers.hf.recipe import Chosen, choose
from workers.hf.task import HfBound, Shared
from workers.recipe import Recipe
from workers.task import Arrays, Scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTask:
    """A sequence classifier or a causal language model, trained whole or by an adapter.

    `base` is a folder, a name on the Hugging Face hub (at `revision`), or a function that finds the folder. `load`
    gives a `Dataset` of texts: x (n,) of str, or (n, 2) for pairs of texts, or of prompts and what is to follow; y
    are classes (for a language model it only says how data is shared out). `adapter` is PEFT's configuration, such
    as {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value"]}; None trains all parameters but those
    that a pattern in `frozen` names. `quantised` keeps what is frozen in 8 bits ("int8") or 4 ("nf4"). `max_length`
    counts tokens of an example. `defaults` are training settings (see `Recipe` and `Tuning`). `held_out` is the
    share of examples nobody trains on; `seed` draws those, and what is new in the model. `rank` is what `of_rank`
    sets. `device` is where it trains and evaluates: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto`, the first there is
    of CUDA, MPS and CPU. `processes` share each batch, each on a device of its own if that is CUDA (`crew.py`).
    """

    name: str
    base: str | Path | Callable[[], Path]
    kind: Kind
    load: Callable[..., Dataset]
    summary: str = ""
    revision: str = ""
    classes: int = 2
    adapter: Mapping[str, Any] | None = None
    frozen: tuple[str, ...] = ()
    quantised: Form = ""
    max_length: int = 128
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    held_out: float = 0.2
    seed: int = 42
    rank: int = 0
    device: str = AUTO
    processes: int = 1
    _shared: Shared = field(default_factory=Shared, repr=False, compare=False)

    @property
    def metric(self) -> str:
        return "accuracy" if self.kind == "classifier" else "perplexity"

    def model(self) -> Model:
        """The base with what is trained of it; loaded once in a process, for each rank. Raises ConfigError or
        DataError."""
        return self._shared.get(self.described())

    def described(self) -> Base:
        """What is loaded, and what of it is trained."""
        return Base(
            where=self.base,
            kind=self.kind,
            revision=self.revision,
            classes=self.classes,
            adapter=self.adapter,
            frozen=self.frozen,
            quantised=self.quantised,
            max_length=self.max_length,
            seed=self.seed,
            rank=self.rank,
            device=self.device,
            processes=self.processes,
        )

    def choose(self, settings: Mapping[str, Scalar]) -> Chosen:
        """The defaults with these settings over them. Raises ConfigError for one that cannot work."""
        chosen = choose({**self.defaults, **settings})
        if chosen.recipe.remedies and self.kind == "causal":
            raise ConfigError(
                f"setting train.{chosen.recipe.remedies[0]} needs classes: leave it out for task {self.name!r}"
            )
        return chosen

    def recipe(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> Recipe:  # noqa: ARG002
        """The part of `choose` that other tasks have, too."""
        return self.choose(settings).recipe

    def of_rank(self, rank: int) -> HfTask:
        """The same with LoRA adapters of at most that rank; 0: as they are. Raises ConfigError for other adapters,
        and for a rank above theirs."""
        if rank:
            ranks.of_rank(self.adapter, rank)
        return replace(self, rank=rank)

    def on(self, device: str, processes: int = 1) -> HfTask:
        """The same on another device, "": as it is; in so many processes. Raises ConfigError if there is none."""
        return replace(self, device=str(find(device)) if device else self.device, processes=processes)

    def bind(
        self, train: Dataset | None = None, held_out: Dataset | None = None, participant: str = "this participant"
    ) -> HfBound:
        """One participant's task. Without `train` it can only make the initial model and evaluate.

        Raises ConfigError without the extra, and DataError if the base or the training data is not there.
        """
        return HfBound(self, train, held_out, participant)

    def check(self, settings: Mapping[str, Scalar], inputs: tuple[int, ...] | None = None) -> None:
        """Raises ConfigError for training settings that cannot work."""
        self.recipe(settings, inputs)

    def run_defaults(self) -> dict[str, Scalar]:
        """The arrays that name the base and the task are no parameters."""
        return {"strategy.buffers": f"{BASE}*,{SETTINGS}*"}

    def predict(self, arrays: Arrays, inputs: Dataset) -> list[Prediction]:
        """The class of each text and its probability. Raises StateError if the model is not of this task."""
        try:
            return self.bind().predict(arrays, inputs)
        except TaskError as error:
            raise StateError(f"the model is not one of task {self.name!r}: {error}") from None
