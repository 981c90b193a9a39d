"""Triton backend of ``taco_kernels.low_rank_bridge``."""

import torch

from .config import Config
from .launch import low_rank


def low_rank_bridge(
    h2d: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """``h + (rmsnorm(h) V^T) U^T + bias`` with ``rmsnorm(h) = h / sqrt(mean(h^2) + eps)`` (Zhang and Sennrich, 2019).

    h2d [rows, hidden] (row stride free), v [rank, hidden], u [hidden, rank], bias [hidden]; dtypes and errors as in
    ``low_rank_linear``. The norm is never materialised: its scale is one number per row and multiplies the
    rank-sized intermediate, while the sum of squares comes from the pass over h that the first product makes anyway.
    """
    return low_rank("low_rank_bridge", h2d, [(v, u, bias)], h2d, eps, config)[0]
