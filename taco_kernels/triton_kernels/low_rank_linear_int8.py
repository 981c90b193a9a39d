"""Triton backend of ``taco_kernels.low_rank_linear_int8``: few rows, that is decode."""

from typing import Any

import torch
import triton

from . import int8_kernels
from .config import default_config
from .launch import Launch, _rows_contiguous, on_device, processors_of, run, slice_length, triton_dtype

# The height of a matrix unit: rows beyond it are not for these kernels.
MOST_ROWS = 16
# Slices that the second product adds up while it reads them.
MOST_SPLITS = 8


def low_rank_linear_int8(
    x2d: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor,
    u: torch.Tensor,
    u_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    pivot: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the op of this name computes, float32 accumulation, one rounding; the same input gives the same bits.

    x2d [rows, in] with 1 to 16 rows, float32, float16 or bfloat16 on one GPU, none of v's columns, rank and out zero.
    Returns contiguous [rows, out]. Raises TypeError for other dtypes and ValueError for tensors that are not on a GPU
    or too many rows. Tile sizes are the defaults of floating factors: NOT YET TUNED, NOT YET RUN ON A GPU.
    """
    rows = x2d.shape[0]
    triton_dtype(x2d)
    if not 0 < rows <= MOST_ROWS:
        raise ValueError(f"the kernels for 8-bit factors take 1 to {MOST_ROWS} rows, not {rows}")
    y = torch.empty((rows, u.shape[0]), dtype=x2d.dtype, device=x2d.device)
    _, processors = processors_of(x2d)
    x2d, v, u = (_rows_contiguous(t) for t in (x2d, v, u))
    v_scale, u_scale = v_scale.contiguous(), u_scale.contiguous()
    bias, pivot = (None if t is None else t.contiguous() for t in (bias, pivot))
    with on_device(x2d):
        run(int8_launches(x2d, v, u, v_scale, u_scale, bias, pivot, y, processors))
    return y


def int8_launches(
    x: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    v_scale: torch.Tensor,
    u_scale: torch.Tensor,
    bias: torch.Tensor | None,
    pivot: torch.Tensor | None,
    y: torch.Tensor,
    processors: int,
) -> list[Launch]:
    """The launches of one call, in stream order; work space is taken from x's allocator (meta tensors work too)."""
    rows, columns = x.shape[0], v.shape[1]
    out_size, rank = u.shape
    c = default_config(MOST_ROWS, columns, out_size, rank, x.element_size(), processors)
    per_split = slice_length(columns, min(c.split, MOST_SPLITS), c.block_k)
    split = triton.cdiv(columns, per_split)
    partial = torch.empty((split, rows, rank), dtype=torch.float32, device=x.device)
    first: tuple[Any, ...] = (
        x, x if pivot is None else pivot, v, v_scale, u_scale, partial, rank, v.stride(0), rows, columns, x.stride(0),
        per_split,
    )  # fmt: skip
    of_first = {
        "HAS_PIVOT": pivot is not None, "EVEN_IN": columns % c.block_k == 0, "SPLIT": split, "BLOCK_M": MOST_ROWS,
        "BLOCK_R": c.block_r, "BLOCK_K": c.block_k,
    }  # fmt: skip
    second: tuple[Any, ...] = (partial, u, y if bias is None else bias, y, rows, rank, out_size, u.stride(0))
    of_second = {
        "HAS_BIAS": bias is not None, "EVEN_RANK": rank % c.block_k2 == 0, "SPLIT": split, "BLOCK_M": MOST_ROWS,
        "BLOCK_N": c.block_n, "BLOCK_K": c.block_k2,
    }  # fmt: skip
    grid = (triton.cdiv(rank, c.block_r), split)
    return [
        Launch(int8_kernels.int8_shrink, grid, first, of_first, c.warps, c.stages),
        Launch(int8_kernels.int8_expand, (triton.cdiv(out_size, c.block_n),), second, of_second, c.warps2, c.stages2),
    ]
