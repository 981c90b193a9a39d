"""What a latency run needs of memory and what there is, so that it says no before the machine does."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from .errors import TacoError
from .memory import free_memory

# of what is free; the rest is for torch, the compiler and the allocator's gaps
_USABLE = 0.92


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def tokens_seen(config: PreTrainedConfig, length: int) -> list[int]:
    """Per layer, to how many tokens at most one attends in a text of `length`: all, or those in a sliding window."""
    values: Any = config
    depth, window = values.num_hidden_layers, getattr(values, "sliding_window", None)
    # as transformers' caches read a config: without a list, a window is that of all layers
    kinds = getattr(values, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * depth
    return [min(length, window) if window and kind == "sliding_attention" else length for kind in kinds]


def cache_bytes(config: PreTrainedConfig, batch: int, length: int, dtype: torch.dtype, windows: bool = True) -> int:
    """Keys and values of `batch` sequences of `length` tokens in every layer, or (`windows`) of what its sliding window
    holds.
    """
    values: Any = config
    groups = getattr(values, "num_key_value_heads", None) or values.num_attention_heads
    head = getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
    seen = tokens_seen(config, length)
    tokens = sum(seen) if windows else length * len(seen)
    return int(2 * batch * tokens * groups * head * dtype.itemsize)


def working_bytes(config: PreTrainedConfig, batch: int, prompt: int, dtype: torch.dtype) -> int:
    """Largest intermediate results of one forward pass of batch x prompt tokens: an MLP's, and logits of one token."""
    values: Any = config
    wide = getattr(values, "intermediate_size", None) or 4 * values.hidden_size
    rows = batch * prompt
    return rows * (3 * wide + 6 * values.hidden_size) * dtype.itemsize + batch * values.vocab_size * 4


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuses what does not fit.

    Raises:
        TacoError: `needed` bytes are more than is free.
    """
    free = available_bytes(device)
    if free is not None and needed > _USABLE * free:
        raise TacoError(
            f"{what} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}; "
            "take a smaller shape, --batch or --prompt, leave out dense (--against removal), or another --dtype."
        )
