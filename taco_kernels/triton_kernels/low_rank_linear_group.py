"""Triton backend of ``taco_kernels.low_rank_linear_group``."""

from collections.abc import Sequence

import torch

from .config import Config
from .launch import low_rank


def low_rank_linear_group(
    x2d: torch.Tensor,
    vs: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    config: Config | None = None,
) -> list[torch.Tensor]:
    """``[x V^T U^T + bias]`` for each member; up to four of them share every launch.

    x2d [rows, in] (row stride free), vs [rank_i, in], us [out_i, rank_i], biases [out_i]; dtypes, results, rounding and
    errors as in ``low_rank_linear``.
    """
    return low_rank("low_rank_linear_group", x2d, list(zip(vs, us, biases, strict=True)), config=config)
