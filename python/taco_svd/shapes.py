"""Models of real shape with random weights: latency depends on shapes and dtypes, not on what the weights know.

Every tensor has memory of its own (layers that shared it would be found in a cache), filled from one block of random
numbers, so that a model of 7 B parameters stands after seconds and not minutes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .errors import TacoError

# vocabulary, hidden, intermediate, layers, heads, key/value heads, context, tied embeddings
_LLAMA = {
    "tinyllama-1.1b": (32000, 2048, 5632, 22, 32, 4, 2048, False),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 131072, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, 131072, True),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 4096, False),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40, 4096, False),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 8192, False),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, 8192, False),
}
_MISTRAL = {"mistral-7b": (32768, 4096, 14336, 32, 32, 8, 32768, False)}
_QWEN3 = {
    "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8, 40960, True),
    "qwen3-4b": (151936, 2560, 9728, 36, 32, 8, 40960, True),
    "qwen3-8b": (151936, 4096, 12288, 36, 32, 8, 40960, False),
}
SHAPES: tuple[str, ...] = (*_LLAMA, *_MISTRAL, *_QWEN3)

# of the block that weights are filled from: above it one copy runs at the speed of memory
_BLOCK = 1 << 22


def shape_config(name: str) -> PreTrainedConfig:
    """The config of a known model's shape.

    Raises:
        TacoError: the name is not in `SHAPES`.
    """
    classes: dict[str, tuple[Any, dict[str, tuple[Any, ...]], dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, _LLAMA, {}),
        "mistral": (transformers.MistralConfig, _MISTRAL, {"sliding_window": None}),
        "qwen3": (transformers.Qwen3Config, _QWEN3, {"head_dim": 128}),
    }
    for config_class, table, extra in classes.values():
        if name in table:
            vocabulary, hidden, intermediate, layers, heads, groups, context, tied = table[name]
            config: PreTrainedConfig = config_class(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=groups,
                max_position_embeddings=context,
                tie_word_embeddings=tied,
                **extra,
            )
            return config
    raise TacoError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}.")


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without data (meta device), for counting."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


class RandomFill:
    """Gives tensors random values at the speed of a copy; the numbers repeat after 4 M entries, memory does not."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        # uniform with the standard deviation 1
        self.block = torch.rand(_BLOCK, generator=generator).sub_(0.5).mul_(12**0.5).to(dtype)

    def __call__(self, shape: torch.Size | tuple[int, ...], std: float, device: torch.device | str) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.block.dtype, device=device)
        flat, block = tensor.view(-1), (self.block * std).to(device)
        for start in range(0, flat.numel(), _BLOCK):
            piece = flat[start : start + _BLOCK]
            piece.copy_(block[: len(piece)])
        return tensor


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model of this config in eval mode, with random weights of the size that keeps activations finite.

    Raises:
        TacoError: the architecture has buffers that cannot be made from its config alone.
    """
    model = skeleton(config, dtype)
    fill = RandomFill(dtype, seed)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter.ndim == 1:
                one = name == "weight"  # a norm's; biases are zero
                tensor = torch.full(parameter.shape, float(one), dtype=dtype, device=device)
            else:
                tensor = fill(parameter.shape, parameter.shape[-1] ** -0.5, device)
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            if "rotary" not in type(module).__name__.lower():
                raise TacoError(f"{type(model).__name__}: {path} has buffers that only a real checkpoint can give.")
            parent, _, name = path.rpartition(".")
            rotary_class: Any = type(module)
            setattr(model.get_submodule(parent), name, rotary_class(config=config).to(device))
    model.tie_weights()
    return model.eval()
