"""Triton backend of ``taco_kernels.low_rank_linear``."""

import torch

from .config import Config
from .launch import low_rank


def low_rank_linear(
    x2d: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual2d: torch.Tensor | None = None,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """``x V^T U^T + bias + residual``, float32 accumulation, one rounding of the result.

    x2d [rows, in] (row stride free), v [rank, in], u [out, rank], bias [out], residual2d [rows, out]; all float32,
    float16 or bfloat16 on one GPU. Returns contiguous [rows, out]; the same input gives the same bits.
    For one row, and for up to 16 where the sum over ``in`` is split two to eight times (the second product adds up no
    more itself, see ``default_config``), the rank-sized intermediate is float32 or two numbers of the dtype; else it is
    rounded to the dtype once, as two library calls would do. Raises TypeError for other dtypes and ValueError for
    tensors that are not on a GPU.
    """
    return low_rank("low_rank_linear", x2d, [(v, u, bias)], residual2d, None, config)[0]
