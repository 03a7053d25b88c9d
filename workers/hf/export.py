"""What a run learned, as folders that plain transformers and peft load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broker.errors import ConfigError, StateError, TaskError
from workers.hf.base import find, load
from workers.hf.definition import HfTask
from workers.hf.quantised import restore
from workers.task import Arrays


def write_adapter(task: HfTask, arrays: Arrays, out: Path) -> None:
    """`adapter_config.json`, `adapter_model.safetensors` and the tokenizer. Raises ConfigError without an adapter;
    StateError if the arrays are not the task's, or the disk refuses."""
    if task.adapter is None:
        raise ConfigError(f"task {task.name!r} trains no adapter: use --format merged")
    model = _loaded(task, arrays)
    model.module.peft_config["default"].base_model_name_or_path = str(find(task.described()))
    _save(out, model.module, model.tokenizer)


def write_merged(task: HfTask, arrays: Arrays, out: Path, most_bytes: int | None = None) -> None:
    """The whole model with what was learned in its weights, in files of at most so many bytes (None: as
    transformers cuts them); a quantised base becomes float32, of the values that it was trained with. Raises
    ConfigError for adapters that are no weights, such as learned prompts; StateError as `write_adapter` does."""
    model = _loaded(task, arrays)
    module = model.module
    restore(module)
    if task.adapter is not None:
        if not hasattr(module, "merge_and_unload"):
            raise ConfigError(f"the adapter of task {task.name!r} cannot be merged into weights: use --format peft")
        try:
            module = module.merge_and_unload()
        except (AttributeError, ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"the adapter of task {task.name!r} cannot be merged into weights ({error}): use --format peft"
            ) from error
    _save(out, module, model.tokenizer, **({"max_shard_size": most_bytes} if most_bytes else {}))


def _loaded(task: HfTask, arrays: Arrays) -> Any:
    """A model of its own, for merging changes it."""
    model: Any = load(task.described())
    try:
        model.load(arrays)
    except TaskError as error:
        raise StateError(f"the model is not one of task {task.name!r}: {error}") from None
    model.module.eval()
    return model


def _save(out: Path, module: Any, tokenizer: Any, **options: Any) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        module.save_pretrained(out, **options)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise StateError(f"{out}: cannot be written: {error.strerror or error}") from None
