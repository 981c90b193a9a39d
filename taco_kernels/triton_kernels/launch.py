"""Host side shared by the Triton ops: pick a configuration, take work space, launch."""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from . import kernels
from .config import Config, config_for

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Stated, since Triton's own default changes between versions: a fused multiply-add rounds once where two would be.
FP_FUSION = True
COMBINE_BLOCK = 1024
_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class Launch(NamedTuple):
    """One kernel launch, as data: the launcher runs it, ``aot`` compiles it without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


@functools.cache
def _gpu(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def _on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it x's where it is not."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def slice_length(size: int, slices: int, block: int) -> int:
    """Length of each of at most ``slices`` slices of a loop over ``size``, a multiple of ``block``."""
    return triton.cdiv(triton.cdiv(size, slices), block) * block


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def low_rank(
    op: str,
    x: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float | None,
    config: Config | None = None,
) -> torch.Tensor:
    """``scale * (x V^T) U^T + bias + residual``; scale is the inverse root mean square of x's rows if ``eps`` is given.

    x [rows, in], v [rank, in], u [out, rank], bias [out], residual [rows, out], all of one dtype (float32, float16,
    bfloat16) and device. Returns contiguous [rows, out]. ``config`` overrides the table (tuning and tests).
    Raises TypeError for another dtype, ValueError for tensors Triton cannot reach or a configuration that cannot work.
    """
    dtype = _DTYPES.get(x.dtype)
    if dtype is None:
        raise TypeError(f"the Triton backend takes float32, float16 and bfloat16, not {x.dtype}")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"the Triton backend needs CUDA tensors (or TRITON_INTERPRET=1), not {x.device}")
    rows, in_size = x.shape
    out_size, rank = u.shape
    y = torch.empty((rows, out_size), dtype=x.dtype, device=x.device)
    if rows == 0 or out_size == 0:
        return y
    if in_size == 0 or rank == 0:  # a sum over nothing: no kernel, only what is added to it
        y.zero_()
        for extra in (bias, residual):
            if extra is not None:
                y += extra
        return y
    x, v, u = _rows_contiguous(x), _rows_contiguous(v), _rows_contiguous(u)
    if residual is not None:
        residual = _rows_contiguous(residual)
    if bias is not None:
        bias = bias.contiguous()
    if config is None:
        gpu, processors = _gpu(x.get_device()) if x.is_cuda else ("", 4)
        config = config_for(op, dtype, rows, in_size, out_size, rank, gpu, processors)
    with _on_device(x):
        for step in launches(x, v, u, bias, residual, y, eps, config):
            step.kernel[step.grid](
                *step.args, **step.constants,
                num_warps=step.warps, num_stages=step.stages, enable_fp_fusion=FP_FUSION,
            )  # fmt: skip
    return y


def launches(
    x: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    eps: float | None,
    c: Config,
) -> list[Launch]:
    """The launches of one call, in stream order; work space is taken from x's allocator (meta tensors work too)."""
    rows, in_size = x.shape
    out_size, rank = u.shape
    norm = eps is not None
    eps_value = 0.0 if eps is None else float(eps)
    stride_residual = 0 if residual is None else residual.stride(0)
    epilogue = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    # Absent tensors still need an argument; these are never read.
    bias_arg = y if bias is None else bias
    residual_arg = y if residual is None else residual

    if c.path == "fused":
        if rank > c.block_r:
            raise ValueError(f"the fused kernel holds one rank block of {c.block_r}, rank is {rank}")
        per_program = slice_length(out_size, c.out_split, c.block_n)
        args = (
            x, v, u, bias_arg, residual_arg, y, rows, in_size, rank, out_size,
            x.stride(0), v.stride(0), u.stride(0), stride_residual, eps_value, per_program,
        )  # fmt: skip
        constants = dict(
            WITH_NORM=norm, **epilogue, EVEN_IN=in_size % c.block_k == 0, EVEN_RANK=rank == c.block_r,
            BLOCK_M=c.block_m, BLOCK_R=c.block_r, BLOCK_K=c.block_k, BLOCK_N=c.block_n,
        )  # fmt: skip
        grid = (triton.cdiv(rows, c.block_m), triton.cdiv(out_size, per_program))
        return [Launch(kernels.fused, grid, args, constants, c.warps, c.stages)]

    per_split = slice_length(in_size, c.split, c.block_k)
    split = triton.cdiv(in_size, per_split)
    even_in = in_size % c.block_k == 0
    even_rank = rank % c.block_k2 == 0
    r_blocks = triton.cdiv(rank, c.block_r)

    if c.path == "row":
        if rows != 1:
            raise ValueError(f"the one-row kernels were given {rows} rows")
        partial, sumsq = _partial_sums(x, split, rank)
        first = Launch(
            kernels.row_shrink, (r_blocks, split),
            (x, v, partial, sumsq, in_size, rank, v.stride(0), per_split),
            {"WITH_NORM": norm, "EVEN_IN": even_in, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k, "STAGES": c.stages},
            c.warps, c.stages,
        )  # fmt: skip
        second = Launch(
            kernels.row_expand, (triton.cdiv(out_size, c.block_n),),
            (partial, sumsq, u, bias_arg, residual_arg, y, in_size, rank, out_size, u.stride(0), eps_value),
            dict(
                WITH_NORM=norm, **epilogue, EVEN_RANK=even_rank, SPLIT=split,
                SPLIT_POW2=triton.next_power_of_2(split), BLOCK_N=c.block_n, BLOCK_K=c.block_k2, STAGES=c.stages2,
            ),
            c.warps2, c.stages2,
        )  # fmt: skip
        return [first, second]

    m_blocks = triton.cdiv(rows, c.block_m)
    if split == 1:
        middle = sumsq = torch.empty((rows, rank), dtype=x.dtype, device=x.device)
    else:
        middle, sumsq = _partial_sums(x, split * rows, rank)
    steps = [
        Launch(
            kernels.shrink, (m_blocks * r_blocks, split),
            (x, v, middle, sumsq, rows, in_size, rank, x.stride(0), v.stride(0), per_split, eps_value),
            {
                "WITH_NORM": norm, "EVEN_IN": even_in, "SPLIT": split,
                "BLOCK_M": c.block_m, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k,
            },
            c.warps, c.stages,
        )
    ]  # fmt: skip
    if split > 1 and c.path == "gemm":
        partial, middle = (
            middle,
            torch.empty((rows, rank), dtype=x.dtype, device=x.device),
        )
        steps.append(
            Launch(
                kernels.combine, (triton.cdiv(rows * rank, COMBINE_BLOCK),),
                (partial, sumsq, middle, rows, in_size, rank, eps_value),
                {"WITH_NORM": norm, "SPLIT": split, "BLOCK": COMBINE_BLOCK}, 4, 1,
            )
        )  # fmt: skip
        split = 1
    steps.append(
        Launch(
            kernels.expand, (m_blocks * triton.cdiv(out_size, c.block_n),),
            (
                middle, sumsq, u, bias_arg, residual_arg, y, rows, in_size, rank, out_size,
                u.stride(0), stride_residual, eps_value,
            ),
            dict(
                WITH_NORM=norm, **epilogue, EVEN_RANK=even_rank, SPLIT=split,
                BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k2,
            ),
            c.warps2, c.stages2,
        )
    )  # fmt: skip
    return steps


def _partial_sums(x: torch.Tensor, planes: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 work space for ``planes`` rows of partial products and their sums of squares, in one allocation."""
    space = torch.empty(planes * (rank + 1), dtype=torch.float32, device=x.device)
    return space[: planes * rank], space[planes * rank :]
