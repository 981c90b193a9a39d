"""Triton backend of ``taco_kernels.pivoted_low_rank_linear``: few rows, that is decode."""

from typing import Any

import torch
import triton

from . import kernels, pivot_kernels, row_kernels
from .config import Config, config_for, default_config
from .launch import Launch, Member, _rows_contiguous, launches, on_device, processors_of, run, triton_dtype

# Up to here the defaults are not the fused kernel, which gathers no inputs.
FEW_ROWS = 16


def pivoted_low_rank_linear(
    x2d: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    pivot: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual2d: torch.Tensor | None = None,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """``(x[pivot[:rank]] + x[pivot[rank:]] V^T) U^T + bias + residual``, float32 accumulation, one rounding.

    x2d [rows, in], v [rank, in - rank], u [out, rank], pivot [in] int32 or int64, bias [out], residual2d [rows, out];
    all but the pivot float32, float16 or bfloat16 on one GPU, none of in - rank, rank, rows and out zero. Returns
    contiguous [rows, out]; the same input gives the same bits. ``config`` overrides the table (tuning and tests).
    Raises TypeError for other dtypes and ValueError for tensors that are not on a GPU.
    """
    rows, in_size = x2d.shape
    out_size, rank = u.shape
    dtype = triton_dtype(x2d)
    y = torch.empty((rows, out_size), dtype=x2d.dtype, device=x2d.device)
    gpu, processors = processors_of(x2d)
    if config is None:
        # the same bytes as a map of in - rank inputs moves: its table serves
        sizes = in_size - rank, out_size, rank
        config = config_for("low_rank_linear", dtype, rows, *sizes, gpu, processors)
        if config.path == "fused":
            config = default_config(min(rows, FEW_ROWS), *sizes, x2d.element_size(), processors)
    x2d, v, u = (_rows_contiguous(t) for t in (x2d, v, u))
    if residual2d is not None:
        residual2d = _rows_contiguous(residual2d)
    member = Member(v, u, None if bias is None else bias.contiguous(), y)
    with on_device(x2d):
        run(pivoted_launches(x2d, member, pivot.contiguous(), residual2d, config, processors))
    return y


def pivoted_launches(
    x: torch.Tensor,
    member: Member,
    pivot: torch.Tensor,
    residual: torch.Tensor | None,
    config: Config,
    processors: int,
) -> list[Launch]:
    """The launches of one call, in stream order: those of the map behind the pivot, with a first one that gathers."""
    columns = member.v.shape[1]
    if config.path == "fused":
        raise ValueError("the fused kernel gathers no inputs")
    first, *rest = launches(x[:, :columns], [member], residual, None, config, processors=processors)
    c = first.constants
    if first.kernel is row_kernels.row_shrink:
        _, _, sums, ranks, strides, _, _, per_split = first.args
        args: tuple[Any, ...] = (x, pivot, member.v, sums[0], ranks[0], strides[0], columns, per_split)
        constants = {name: c[name] for name in ("EVEN_IN", "BLOCK_R", "BLOCK_K", "STAGES")}
        return [Launch(pivot_kernels.pivot_row_shrink, first.grid, args, constants, first.warps, first.stages), *rest]
    assert first.kernel is kernels.shrink
    _, _, sums, ranks, strides, _, rows, _, stride_x, per_split, _ = first.args
    args = (x, pivot, member.v, sums[0], ranks[0], strides[0], rows, columns, stride_x, per_split)
    constants = {name: c[name] for name in ("EVEN_IN", "SPLIT", "BLOCK_M", "BLOCK_R", "BLOCK_K")}
    tiles = triton.cdiv(rows, c["BLOCK_M"]) * triton.cdiv(ranks[0], c["BLOCK_R"]) * c["SPLIT"]
    return [Launch(pivot_kernels.pivot_shrink, (tiles,), args, constants, first.warps, first.stages), *rest]
