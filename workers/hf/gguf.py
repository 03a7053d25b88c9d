"""A language model out of a GGUF file, as the plain folder that everything else reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from broker.errors import ConfigError, DataError
from workers.hf.base import REMEDY

OF_A_VERSION = ("transformers_version", "_model_name_or_path")  # of the configuration: not what the model is


def demand_gguf() -> None:
    """Raises ConfigError if the packages that read GGUF files are not installed."""
    try:
        import gguf  # noqa: F401 - transformers reads with it
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"GGUF files are read with what is not installed here ({error}): {REMEDY}") from None


def write_plain(file: Path, folder: Path) -> None:
    """Configuration, weights as float32 and tokenizer of a GGUF file, into a folder.

    The same file gives the same bytes. Raises ConfigError without the packages, DataError if it cannot be read.
    """
    demand_gguf()
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, **place)
        module = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **place
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{file}: cannot be read as GGUF ({type(error).__name__}: {error})") from error
    _split_digits(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _forget_version(folder / "config.json")


def _split_digits(tokenizer: Any) -> None:
    """SmolLM's tokenizer takes each digit alone, which the file says by a name that transformers does not know."""
    from tokenizers import pre_tokenizers as parts

    steps = [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = parts.Sequence(steps)


def _forget_version(config: Path) -> None:
    """So that the base's identity does not depend on the version that converted it."""
    kept = {name: value for name, value in json.loads(config.read_text()).items() if name not in OF_A_VERSION}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
