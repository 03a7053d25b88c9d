"""PEFT's LoRA adapters at a participant whose rank is lower than the run's (`site.lora_rank`).

PEFT multiplies B A by lora_alpha / r. Everybody keeps the run's lora_alpha, so a participant of rank r_i multiplies
by lora_alpha / r_i; `broker/lora.py` and `lora-stack` reckon with that, and products agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker.errors import ConfigError

DEFAULT_RANK = 8  # PEFT's
MATRICES = (True, False, "gaussian")  # other ways to begin change the base, and each rank changes it otherwise
ANY_RANK = frozenset({
    "peft_type", "task_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "modules_to_save",
    "init_lora_weights", "rank_pattern", "alpha_pattern",
})  # fmt: skip


def of_rank(adapter: Mapping[str, Any] | None, rank: int) -> dict[str, Any]:
    """That configuration with no module's rank above `rank`. Raises ConfigError for adapters that are no LoRA, or
    of a kind whose parts cannot be cut to a rank, and for a rank above theirs."""
    if adapter is None or str(adapter.get("peft_type")).upper() != "LORA":
        raise ConfigError(f"site.lora_rank = {rank}: the task trains no LoRA adapters: leave it out")
    unfit = [name for name, value in adapter.items() if value and name not in ANY_RANK]
    if adapter.get("init_lora_weights", True) not in MATRICES:
        unfit.append("init_lora_weights")
    if unfit:
        raise ConfigError(
            f"site.lora_rank = {rank}: adapters with {', '.join(unfit)} have one rank for everybody: leave out "
            "one or the other"
        )
    own, patterns = adapter.get("r", DEFAULT_RANK), adapter.get("rank_pattern") or {}
    if rank > (most := max(own, *patterns.values(), 0)):
        raise ConfigError(f"site.lora_rank = {rank} is above the rank of the task's adapters, {most}: lower it")
    least = {name: min(rank, value) for name, value in patterns.items()}
    return {**adapter, "r": min(rank, own), "rank_pattern": least}
