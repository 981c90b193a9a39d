"""What a model takes: parameters and bytes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .int8_linear import Int8LowRankLinear
from .replacement import LowRankLinear, NarrowLinear


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones counted once, and of the indices of pivoted and narrow maps."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored(model))


def parameter_count(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones counted once; entries of an index count, since they are stored like weights."""
    return sum(tensor.numel() for tensor in _stored(model))


def _stored(model: PreTrainedModel) -> list[torch.Tensor]:
    found: list[torch.Tensor] = list(model.parameters())
    for module in model.modules():
        index = module.index if isinstance(module, NarrowLinear) else None
        index = module.pivot if isinstance(module, (LowRankLinear, Int8LowRankLinear)) else index
        if index is not None:
            found.append(index)
    return found
