"""Triton backend of ``taco_kernels.low_rank_mlp``."""

import torch

from .config import Config
from .launch import low_rank

_Projection = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def low_rank_mlp(
    x2d: torch.Tensor,
    gate: _Projection,
    up: _Projection,
    down: _Projection,
    act: str,
    *,
    config: Config | None = None,
    down_config: Config | None = None,
) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))``: gate and up share their launches, whose last one writes ``act(gate) * up``.

    x2d [rows, in] (row stride free); dtypes and errors as in ``low_rank_linear``. gate and up stay float32 until their
    product is rounded to the dtype.
    """
    (hidden,) = low_rank("low_rank_mlp", x2d, [gate, up], config=config, act=act)
    return low_rank("low_rank_linear", hidden, [down], config=down_config)[0]
