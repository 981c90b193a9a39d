"""Device code of factors of 8-bit integers, for few rows: half the bytes of 16-bit factors stream in.

A weight becomes an element of x's dtype on the chip, exactly (eight bits of mantissa hold it); a direction's scales are
applied to the rank-sized intermediate. The second product adds up the slices of the first.
"""

import triton
import triton.language as tl

from .device import dot, first_part, load_factor, load_tile, round, store_output
from .pivot_kernels import _gather_tile

# Integers become numbers below one, and what meets them is so much larger: of the size that floating factors' is. Times
# a scale alone it would be below what float16 can hold whole.
_SCALED_BY = tl.constexpr(128.0)


@triton.jit
def _weights(base, rows, cols, n_rows, n_cols, stride, EVEN_COLS: tl.constexpr, dtype: tl.constexpr):
    """Tile [len(cols), len(rows)] of a factor's integers / 128 as numbers of ``dtype``, for the right side of a dot."""
    integers = load_factor(base, rows, cols, n_rows, n_cols, stride, EVEN_COLS, False)
    return tl.trans((integers.to(tl.float32) * (1.0 / _SCALED_BY)).to(dtype))


@triton.jit(do_not_specialize=["n_rows"])
def int8_shrink(
    x, pivot, v, v_scale, u_scale, partial, rank, stride_v, n_rows, columns, stride_x, in_per_split,
    HAS_PIVOT: tl.constexpr, EVEN_IN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[s] [n_rows, rank] float32: ``(x v^T * v_scale + identity) * u_scale * 128`` over slice s of the columns.

    The identity's share (``HAS_PIVOT``) is in s = 0. Grid (rank blocks, SPLIT); n_rows <= BLOCK_M.
    """
    split = tl.program_id(1)
    in_size = rank + columns
    ms = tl.arange(0, BLOCK_M)
    rs = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    start = split * in_per_split
    for k0 in range(start, min(start + in_per_split, columns), BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        if HAS_PIVOT:
            values = _gather_tile(x, pivot, ms, rank + ks, n_rows, ks < columns, in_size, stride_x)
        else:
            values = load_tile(x, ms, ks, n_rows, columns, stride_x, EVEN_IN)
        acc = dot(values, _weights(v, rs, ks, rank, columns, stride_v, EVEN_IN, x.dtype.element_ty), acc)
    acc *= tl.load(v_scale + rs, mask=rs < rank, other=0.0)[None, :] * _SCALED_BY
    if HAS_PIVOT:
        identity = tl.where(split == 0, rank, 0)
        acc += _gather_tile(x, pivot, ms, rs, n_rows, rs < identity, in_size, stride_x).to(tl.float32)
    acc *= tl.load(u_scale + rs, mask=rs < rank, other=0.0)[None, :] * _SCALED_BY
    plane = tl.cast(split, tl.int64) * n_rows
    tl.store(
        partial + (plane + ms)[:, None] * rank + rs[None, :], acc, mask=(ms < n_rows)[:, None] & (rs < rank)[None, :]
    )


@triton.jit(do_not_specialize=["n_rows"])
def int8_expand(
    partial, u, bias, y, n_rows, rank, out_size, stride_u,
    HAS_BIAS: tl.constexpr, EVEN_RANK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = (sum of the slices) u^T + bias. Grid (out blocks,); n_rows <= BLOCK_M."""
    dtype: tl.constexpr = y.dtype.element_ty
    ms = tl.arange(0, BLOCK_M)
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_K):
        rs = r0 + tl.arange(0, BLOCK_K)
        weights = _weights(u, ns, rs, out_size, rank, stride_u, EVEN_RANK, dtype)
        total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for s in tl.static_range(SPLIT):
            plane = partial + tl.cast(s, tl.int64) * n_rows * rank
            total += load_tile(plane, ms, rs, n_rows, rank, rank, EVEN_RANK)
        high = round(first_part(total, dtype), dtype)
        acc = dot(high, weights, acc)
        if dtype != tl.float32:  # what rounding took from the intermediate, as in kernels.expand
            acc = dot(round(total - high.to(tl.float32), dtype), weights, acc)
    store_output(y, acc, bias, out_size, y, ms, ns, n_rows, out_size, 0, HAS_BIAS, False)
