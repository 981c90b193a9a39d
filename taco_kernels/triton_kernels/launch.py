"""Host side shared by the Triton ops: pick a configuration, take work space, launch."""

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from . import kernels, row_kernels
from .config import Config, config_for

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Stated, since Triton's own default changes between versions: a fused multiply-add rounds once where two would be.
FP_FUSION = True
COMBINE_BLOCK = 1024
# Members that one launch serves; more of them make the kernels' arguments long without filling the GPU any better.
MOST_MEMBERS = 4
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


def processors_of(x: torch.Tensor) -> tuple[str, int]:
    """(name of x's GPU, its number of multiprocessors); a small stand-in under the interpreter."""
    return _gpu(x.get_device()) if x.is_cuda else ("", 4)


def triton_dtype(x: torch.Tensor) -> str:
    """The name of x's dtype in the tuned tables.

    Raises TypeError for a dtype that the kernels do not take, ValueError for a tensor that Triton cannot reach.
    """
    dtype = _DTYPES.get(x.dtype)
    if dtype is None:
        raise TypeError(f"the Triton backend takes float32, float16 and bfloat16, not {x.dtype}")
    require_reachable(x)
    return dtype


def require_reachable(x: torch.Tensor) -> None:
    """Raises ValueError for a tensor that Triton cannot reach."""
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"the Triton backend needs CUDA tensors (or TRITON_INTERPRET=1), not {x.device}")


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it x's where it is not."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def slice_length(size: int, slices: int, block: int) -> int:
    """Length of each of at most ``slices`` slices of a loop over ``size``, a multiple of ``block``."""
    return triton.cdiv(triton.cdiv(size, slices), block) * block


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class Member(NamedTuple):
    """One factorised linear of a call: v [rank, in], u [out, rank], bias [out] or None, y [rows, out] for its result.

    In the gated form of a call both members name the same y.
    """

    v: torch.Tensor
    u: torch.Tensor
    bias: torch.Tensor | None
    y: torch.Tensor


def _is_transposed(factor: torch.Tensor) -> bool:
    """Whether the kernels should read it as the transpose of a row-strided matrix."""
    return factor.stride(0) == 1 and factor.stride(1) >= factor.shape[0] > 1


def _usable(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    """As they are where all are rows, or all transposed rows (one kernel reads all members); else copies of some."""
    if all(_is_transposed(factor) for factor in factors):
        return factors
    return [_rows_contiguous(factor) for factor in factors]


def low_rank(
    op: str,
    x: torch.Tensor,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    residual: torch.Tensor | None = None,
    eps: float | None = None,
    config: Config | None = None,
    act: str | None = None,
) -> list[torch.Tensor]:
    """``scale * (x V^T) U^T + bias + residual`` for every (v, u, bias) of ``factors``; the results, in order.

    scale is the inverse root mean square of x's rows if ``eps`` is given. x [rows, in], v [rank, in], u [out, rank],
    bias [out], residual [rows, out] (with one member only), all of one dtype (float32, float16, bfloat16) and device.
    Results are contiguous [rows, out]. With ``act`` there are two members of one width and one result, act(first) *
    second. ``config`` overrides the table (tuning and tests). Raises TypeError for another dtype, ValueError for
    tensors Triton cannot reach or a configuration that cannot work.
    """
    dtype = triton_dtype(x)
    rows, in_size = x.shape
    if act is not None and not (in_size and all(u.shape[1] for _, u, _ in factors)):
        gate, up = low_rank(op, x, factors)  # a side that is nothing but its bias
        return [_activated(gate, act).mul_(up)]
    widths = [u.shape[0] for _, u, _ in factors[: 1 if act else None]]
    ys = [torch.empty((rows, width), dtype=x.dtype, device=x.device) for width in widths]
    wanted = []
    for i, (v, u, bias) in enumerate(factors):
        y = ys[0 if act else i]
        if rows == 0 or u.shape[0] == 0:
            continue
        if in_size == 0 or u.shape[1] == 0:  # a sum over nothing: no kernel, only what is added to it
            y.zero_()
            for extra in (bias, residual):
                if extra is not None:
                    y += extra
            continue
        wanted.append((v, u, None if bias is None else bias.contiguous(), y))
    if not wanted:
        return ys
    x = _rows_contiguous(x)
    vs, us = _usable([item[0] for item in wanted]), [item[1] for item in wanted]
    us = _usable(us) if act is None else [_rows_contiguous(u) for u in us]
    members = [Member(v, u, *item[2:]) for v, u, item in zip(vs, us, wanted, strict=True)]
    if residual is not None:
        residual = _rows_contiguous(residual)
    gpu, processors = processors_of(x)
    with on_device(x):
        for at in range(0, len(members), MOST_MEMBERS):
            some = members[at : at + MOST_MEMBERS]
            chosen = config
            if chosen is None:
                out_size, ranks = sum(m.u.shape[0] for m in some), [m.u.shape[1] for m in some]
                chosen = config_for(op, dtype, rows, in_size, out_size, sum(ranks), gpu, processors, max(ranks))
            run(launches(x, some, residual, eps, chosen, act, processors))
    return ys


def run(steps: Sequence[Launch]) -> None:
    """Launches on the current stream of the current device."""
    for step in steps:
        step.kernel[step.grid](
            *step.args, **step.constants,
            num_warps=step.warps, num_stages=step.stages, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip


def launches(
    x: torch.Tensor,
    members: Sequence[Member],
    residual: torch.Tensor | None,
    eps: float | None,
    c: Config,
    act: str | None = None,
    processors: int = 1,
) -> list[Launch]:
    """The launches of one call, in stream order; work space is taken from x's allocator (meta tensors work too)."""
    if c.path == "fused":
        if act is not None:
            raise ValueError("the fused kernel has no gated form")
        return [_fused(x, member, residual, eps, c) for member in members]
    rows, in_size = x.shape
    if c.path == "row" and rows != 1:
        raise ValueError(f"the one-row kernels were given {rows} rows")
    norm = eps is not None
    eps_value = 0.0 if eps is None else float(eps)
    per_split = slice_length(in_size, c.split, c.block_k)
    split = triton.cdiv(in_size, per_split)
    ranks, outs = tuple(m.u.shape[1] for m in members), tuple(m.u.shape[0] for m in members)
    one_pass = split == 1 and c.path != "row"
    sums, sumsq = _intermediates(x, ranks, rows, 0 if one_pass else split)

    vs, us = tuple(m.v for m in members), tuple(m.u for m in members)
    v_transposed, u_transposed = _is_transposed(vs[0]), _is_transposed(us[0])
    v_strides = tuple(v.stride(1 if v_transposed else 0) for v in vs)
    u_strides = tuple(u.stride(1 if u_transposed else 0) for u in us)
    first: dict[str, Any] = {"WITH_NORM": norm, "EVEN_IN": in_size % c.block_k == 0, "V_T": v_transposed}
    r_blocks = sum(triton.cdiv(rank, c.block_r) for rank in ranks)

    # Absent tensors still need an argument; these are never read.
    biases = tuple(m.y if m.bias is None else m.bias for m in members)
    bias_sizes = tuple(0 if m.bias is None else m.bias.shape[0] for m in members)
    ys = tuple(m.y for m in members)
    residual_arg = ys[0] if residual is None else residual
    stride_residual = 0 if residual is None else residual.stride(0)
    second: dict[str, Any] = {
        "HAS_BIAS": any(bias_sizes), "EVEN_RANK": all(rank % c.block_k2 == 0 for rank in ranks),
        "BLOCK_N": c.block_n, "BLOCK_K": c.block_k2,
    }  # fmt: skip
    if act is None:
        second |= {"WITH_NORM": norm, "HAS_RESIDUAL": residual is not None, "U_T": u_transposed}
        n_blocks = sum(triton.cdiv(out, c.block_n) for out in outs)
    else:
        if len(members) != 2 or outs[0] != outs[1] or u_transposed or norm or residual is not None:
            raise ValueError("the gated form takes two members of one width, factors in rows, no norm and no residual")
        second["ACT"] = act
        n_blocks = triton.cdiv(outs[0], c.block_n)

    if c.path == "row":
        first |= {"BLOCK_R": c.block_r, "BLOCK_K": c.block_k, "STAGES": c.stages}
        second |= {"SPLIT": split, "SPLIT_POW2": triton.next_power_of_2(split), "STAGES": c.stages2}
        shrink_args = (x, vs, sums, ranks, v_strides, sumsq, in_size, per_split)
        if act is None:
            kernel = row_kernels.row_expand
            args: tuple[Any, ...] = (
                sums, us, biases, ys, ranks, outs, bias_sizes, u_strides, sumsq, residual_arg, in_size, eps_value,
            )  # fmt: skip
        else:
            kernel = row_kernels.row_expand_gated
            args = (sums, us, biases, ys[0], ranks, bias_sizes, u_strides, outs[0])
        return [
            Launch(row_kernels.row_shrink, (r_blocks, split), shrink_args, first, c.warps, c.stages),
            Launch(kernel, (n_blocks,), args, second, c.warps2, c.stages2),
        ]

    def grid(tiles: int) -> tuple[int]:
        return (min(tiles, c.persistent * processors) if c.persistent else tiles,)

    m_blocks = triton.cdiv(rows, c.block_m)
    persistent = bool(c.persistent)
    first |= {"SPLIT": split, "PERSISTENT": persistent}
    first |= {"BLOCK_M": c.block_m, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k}
    steps = [
        Launch(
            kernels.shrink, grid(m_blocks * r_blocks * split),
            (x, vs, sums, ranks, v_strides, sumsq, rows, in_size, x.stride(0), per_split, eps_value),
            first, c.warps, c.stages,
        )
    ]  # fmt: skip
    if split > 1 and c.path == "gemm":
        partials, (sums, _) = sums, _intermediates(x, ranks, rows, 0)
        steps.append(
            Launch(
                kernels.combine, (triton.cdiv(rows * max(ranks), COMBINE_BLOCK), len(ranks)),
                (partials, sumsq, sums, ranks, rows, in_size, eps_value),
                {"WITH_NORM": norm, "SPLIT": split, "BLOCK": COMBINE_BLOCK}, 4, 1,
            )
        )  # fmt: skip
        split = 1
    second |= {"SPLIT": split, "BLOCK_M": c.block_m}
    tiles = m_blocks * n_blocks
    if act is None:
        second["PERSISTENT"] = persistent
        args = (
            sums, us, biases, ys, ranks, outs, bias_sizes, u_strides, sumsq, residual_arg, rows, in_size,
            stride_residual, eps_value,
        )  # fmt: skip
        steps.append(Launch(kernels.expand, grid(tiles), args, second, c.warps2, c.stages2))
    else:
        args = (sums, us, biases, ys[0], ranks, bias_sizes, u_strides, outs[0], rows)
        steps.append(Launch(kernels.expand_gated, (tiles,), args, second, c.warps2, c.stages2))
    return steps


def _fused(x: torch.Tensor, member: Member, residual: torch.Tensor | None, eps: float | None, c: Config) -> Launch:
    v, u, bias, y = member
    rows, in_size = x.shape
    out_size, rank = u.shape
    if rank > c.block_r:
        raise ValueError(f"the fused kernel holds one rank block of {c.block_r}, rank is {rank}")
    per_program = slice_length(out_size, c.out_split, c.block_n)
    v_transposed, u_transposed = _is_transposed(v), _is_transposed(u)
    args = (
        x, v, u, y if bias is None else bias, y if residual is None else residual, y, rows, in_size, rank, out_size,
        x.stride(0), v.stride(1 if v_transposed else 0), u.stride(1 if u_transposed else 0),
        0 if residual is None else residual.stride(0), 0.0 if eps is None else float(eps), per_program,
    )  # fmt: skip
    constants = {
        "WITH_NORM": eps is not None, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "EVEN_IN": in_size % c.block_k == 0, "EVEN_RANK": rank == c.block_r, "V_T": v_transposed, "U_T": u_transposed,
        "BLOCK_M": c.block_m, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k, "BLOCK_N": c.block_n,
    }  # fmt: skip
    grid = (triton.cdiv(rows, c.block_m), triton.cdiv(out_size, per_program))
    return Launch(kernels.fused, grid, args, constants, c.warps, c.stages)


def _intermediates(
    x: torch.Tensor, ranks: Sequence[int], rows: int, split: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What lies between the products, one tensor for each member, and work space for sums of squares.

    ``split`` float32 planes of partial sums [rows, rank], or with 0 one [rows, rank] of x's dtype.
    """
    planes = max(split, 1) * rows
    kind = torch.float32 if split else x.dtype
    # Every member's part starts at a multiple of 16 elements, for wide loads; one allocation for all.
    sizes = [triton.cdiv(planes * rank, 16) * 16 for rank in ranks]
    space = torch.empty(sum(sizes) + (planes if split else 0), dtype=kind, device=x.device)
    starts = [sum(sizes[:i]) for i in range(len(ranks))]
    parts = tuple(space[at : at + planes * rank] for at, rank in zip(starts, ranks, strict=True))
    return parts, space[sum(sizes) :] if split else space


def _activated(x: torch.Tensor, act: str) -> torch.Tensor:
    from taco_kernels.low_rank_mlp import ACTIVATIONS

    return ACTIVATIONS[act](x)
