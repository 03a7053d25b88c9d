"""The base model: where it is, what its identity is, and what of it is trained.

Everybody starts from the same base, which does not travel, and does the same with it. What base that is and what is
done with it travels with the model, as names of arrays: the aggregator refuses updates whose names are other ones,
so nobody can change them, nor average them away.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from broker.errors import ConfigError, DataError, TaskError
from workers import devices
from workers.devices import AUTO, CPU
from workers.hf.crew import Crew
from workers.hf.quantised import Form, quantise
from workers.hf.ranks import of_rank
from workers.modules import seeded
from workers.task import Arrays

Kind = Literal["classifier", "causal"]
BASE, SETTINGS = "base.sha256.", "task.sha256."
AGREED = ("kind", "classes", "adapter", "frozen", "quantised", "max_length", "seed")
FILES = ("config.json", "*.safetensors", "tokenizer*.json", "vocab.*", "merges.txt", "spiece.model", "*.model")
REMEDY = "pip install 'fluffle[llm]'"
NAMES = ("SEQ_CLS", "CAUSAL_LM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Which model it is, and what is done with it. `where`: a folder, a name on the Hugging Face hub (at
    `revision`), or a function that finds the folder. `adapter`: PEFT's configuration; None trains the parameters
    themselves but those that a pattern in `frozen` names. `rank`: of this site's LoRA adapters; 0: as `adapter`
    says. `device`: where this site trains, with so many `processes`."""

    where: str | Path | Callable[[], Path]
    kind: Kind
    revision: str = ""
    classes: int = 2
    adapter: Mapping[str, Any] | None = None
    frozen: tuple[str, ...] = ()
    quantised: Form = ""
    max_length: int = 128
    seed: int = 42
    rank: int = 0
    device: str = AUTO
    processes: int = 1

    def digest(self) -> str:
        """The sha256 of what everybody must have alike, beside the files of the base."""
        said = {name: _plain(getattr(self, name)) for name in AGREED}
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded base with what is trained of it. `identity` is the base's, `settings` that of what is done with it.
    `parameters` travel, by their names there; `initial` are their first values. Whoever uses `module` holds `lock`,
    for all tasks of a process share it."""

    module: nn.Module
    tokenizer: Any
    identity: str
    settings: str
    parameters: Mapping[str, nn.Parameter]
    initial: Arrays
    has_adapter: bool
    device: torch.device = CPU
    crew: Crew | None = None
    lock: RLock = field(default_factory=RLock)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.parameters.items()

    @property
    def marks(self) -> frozenset[str]:
        """The names of the arrays that tell both identities."""
        return frozenset({BASE + self.identity, SETTINGS + self.settings})

    def views(self) -> Arrays:
        """What travels; on the CPU, the next step changes it."""
        values = {name: parameter.detach().cpu().numpy() for name, parameter in self.parameters.items()}
        return values | {mark: np.zeros((), np.float32) for mark in sorted(self.marks)}

    def arrays(self) -> Arrays:
        """What travels, as copies."""
        return {name: values.copy() for name, values in self.views().items()}

    def load(self, arrays: Arrays) -> None:
        """Copies the arrays into the module. Raises TaskError if they are of another base or task, or wrong."""
        self._check_marks(arrays)
        if arrays.keys() != {*self.parameters, *self.marks}:
            missing, unknown = (
                sorted(self.parameters.keys() - arrays.keys()),
                sorted(arrays.keys() - self.parameters),
            )
            raise TaskError(
                f"the arrays are not what this task trains (missing {missing[:3]}, unknown {unknown[:3]}): do both "
                "sides have the same adapter, and the same `frozen`?"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                array = arrays[name]
                if array.shape != tuple(parameter.shape) or array.dtype != np.float32:
                    raise TaskError(
                        f"array {name!r} is {array.dtype} {array.shape}, and this task trains float32 "
                        f"{tuple(parameter.shape)}: do both sides have the same adapter?"
                    )
                parameter.copy_(torch.from_numpy(array.copy()))

    def _check_marks(self, arrays: Arrays) -> None:
        if (found := _marked(BASE, arrays)) != self.identity:
            other = f"base model {found[:12]}..." if found else "no base model that they name"
            raise TaskError(
                f"the arrays belong to {other}, and here is {self.identity[:12]}... (sha256 of configuration, "
                "weights and tokenizer files): get the same base as the others, the same revision of it"
            )
        if (found := _marked(SETTINGS, arrays)) != self.settings:
            raise TaskError(
                f"the arrays belong to this base model, but to a task with other settings ({found[:12] or 'none'}, "
                f"and here is {self.settings[:12]}: sha256 of {', '.join(AGREED)}): get the same task as the others"
            )


def _marked(prefix: str, arrays: Arrays) -> str:
    """The identity that they name; of several, none is right."""
    return " ".join(name.removeprefix(prefix) for name in arrays if name.startswith(prefix))


def _plain(value: Any) -> Any:
    """For JSON; lists are sets here: of modules, layers or patterns."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(map(_plain, value), key=repr)
    return value


def load(base: Base) -> Model:
    """Reads the base, and prepares what is trained. Raises ConfigError without the extra, or for settings that do
    not fit the model; DataError if the base is not there."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise ConfigError(f"large models need what is not installed here ({error}): {REMEDY}") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, folder = devices.find(base.device), find(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with warnings.catch_warnings(), seeded(base.seed):
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5 by an old name
        try:
            module = _read(base, folder, tokenizer)
            if base.adapter is not None:
                module = peft.get_peft_model(module, _configuration(base))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(f"base model {folder}: {type(error).__name__}: {error}") from error
    names = _trained(module, base)
    if base.quantised:
        quantise(module, base.quantised)
    own = dict(module.to(device).named_parameters())
    parameters = {travels: own[name] for name, travels in names.items()}
    which = identity(folder)
    crew = _crew(base, folder, which, device) if base.processes > 1 else None
    model = Model(module, tokenizer, which, base.digest(), parameters, {}, base.adapter is not None, device, crew)
    model.initial.update(model.arrays())
    return model


def _crew(base: Base, folder: Path, which: str, device: torch.device) -> Crew:
    """Raises ConfigError if there are fewer devices than processes."""
    places = [str(device)] * base.processes
    if device.type == "cuda":
        places = [str(devices.find(f"cuda:{(device.index or 0) + rank}")) for rank in range(base.processes)]
    elif device.type == "mps":
        raise ConfigError(f"site.processes = {base.processes}: MPS is one device: set it to 1")
    hello = {name: getattr(base, name) for name in (*AGREED, "rank")}
    return Crew(base.processes, {**hello, "where": str(folder)}, which, places)


def find(base: Base) -> Path:
    """The folder with the base's files; one that is on the hub is downloaded once. Raises DataError."""
    where = base.where() if callable(base.where) else base.where
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(where, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where):
        raise DataError(f"base model {where}: there is no such folder")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(where, revision=base.revision or None, allow_patterns=list(FILES))
    except Exception as error:  # whatever goes wrong over there, the remedy is the same
        raise DataError(
            f"base model {where!r} is no folder here, and the hub did not give it ({type(error).__name__}: "
            f"{error}): name a folder that has it"
        ) from error
    return Path(found)


def identity(folder: Path) -> str:
    """The sha256 over names and sha256 of the files that make the model: configuration, weights, tokenizer.

    Raises DataError if there are no weights.
    """
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        raise DataError(f"base model {folder}: it has no *.safetensors, and weights in other formats are not read")
    lines = "".join(f"{_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(base: Base, folder: Path, tokenizer: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if base.kind == "classifier" else AutoModelForCausalLM
    classes = {"num_labels": base.classes} if base.kind == "classifier" else {}
    module: nn.Module = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, **classes
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = module.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return module


def _configuration(base: Base) -> Any:
    import peft

    task = NAMES[base.kind == "causal"]
    adapter = of_rank(base.adapter, base.rank) if base.rank else dict(base.adapter or {})
    return peft.get_peft_config({"task_type": task, **adapter})


def _trained(module: nn.Module, base: Base) -> dict[str, str]:
    """Their names; and those under which they travel, by which PEFT saves them. Raises ConfigError if there are
    none."""
    for name, parameter in module.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in base.frozen):
            parameter.requires_grad = False
    names: dict[int, str] = {}
    if base.adapter is not None:
        import peft

        exposed = peft.get_peft_model_state_dict(module, save_embedding_layers=False)
        names = {values.data_ptr(): name for name, values in exposed.items()}
    found = {
        name: names.get(parameter.data_ptr(), name)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if not found:
        raise ConfigError("nothing of the model is trained: let `frozen` leave something, or set `adapter`")
    return found
