"""Device code of the first product behind a pivot: ``t = x[pivot[:rank]] + x[pivot[rank:]] V^T``.

V [rank, columns] lacks the columns in which the right factor is the identity. The inputs are gathered while V streams
in: x is a few rows, which the caches hold, so no gathered copy of it is written. The second product is ``kernels``'.
What a pivot that is no permutation names beyond x is read as zero.
"""

import triton
import triton.language as tl

from .device import dot, load_factor, round


@triton.jit
def _gather_row(x, pivot, places, inside, in_size):
    """x[pivot[places]] of one row as float32, zero where a place is not inside."""
    at = tl.load(pivot + places, mask=inside, other=0)
    return tl.load(x + at, mask=inside & (at >= 0) & (at < in_size), other=0.0).to(tl.float32)


@triton.jit
def _gather_tile(x, pivot, rows, places, n_rows, inside, in_size, stride_x):
    """[len(rows), len(places)] of x's gathered columns, zeros outside."""
    at = tl.load(pivot + places, mask=inside, other=0)
    reachable = inside & (at >= 0) & (at < in_size)
    pointers = x + rows.to(tl.int64)[:, None] * stride_x + at[None, :]
    return tl.load(pointers, mask=(rows < n_rows)[:, None] & reachable[None, :], other=0.0)


@triton.jit
def pivot_row_shrink(
    x, pivot, v, partial, rank, stride_v, columns, in_per_split,
    EVEN_IN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[s, r] for one row, float32; the identity's share is in s = 0. Grid (rank blocks, splits)."""
    split = tl.program_id(1)
    in_size = rank + columns
    rs = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    start = split * in_per_split
    for k0 in tl.range(start, min(start + in_per_split, columns), BLOCK_K, num_stages=STAGES):
        ks = k0 + tl.arange(0, BLOCK_K)
        weights = load_factor(v, rs, ks, rank, columns, stride_v, EVEN_IN, False).to(tl.float32)
        acc += weights * _gather_row(x, pivot, rank + ks, ks < columns, in_size)[None, :]
    identity = tl.where(split == 0, rank, 0)
    total = tl.sum(acc, axis=1) + _gather_row(x, pivot, rs, rs < identity, in_size)
    tl.store(partial + split * rank + rs, total, mask=rs < rank)


@triton.jit(do_not_specialize=["n_rows"])
def pivot_shrink(
    x, pivot, v, partial, rank, stride_v, n_rows, columns, stride_x, in_per_split,
    EVEN_IN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for several rows. Grid (row blocks * rank blocks * SPLIT,).

    SPLIT > 1: partial[s] [n_rows, rank] float32. SPLIT = 1: partial [n_rows, rank] in x's dtype.
    """
    r_blocks = tl.cdiv(rank, BLOCK_R)
    in_size = rank + columns
    split = tl.program_id(0) % SPLIT
    ms = (tl.program_id(0) // SPLIT // r_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = (tl.program_id(0) // SPLIT % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    start = split * in_per_split
    for k0 in range(start, min(start + in_per_split, columns), BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        values = _gather_tile(x, pivot, ms, rank + ks, n_rows, ks < columns, in_size, stride_x)
        weights = load_factor(v, rs, ks, rank, columns, stride_v, EVEN_IN, False)
        acc = dot(values, tl.trans(weights), acc)
    identity = tl.where(split == 0, rank, 0)
    acc += _gather_tile(x, pivot, ms, rs, n_rows, rs < identity, in_size, stride_x).to(tl.float32)
    inside = (ms < n_rows)[:, None] & (rs < rank)[None, :]
    plane = tl.cast(split, tl.int64) * n_rows
    tl.store(partial + (plane + ms)[:, None] * rank + rs[None, :], round(acc, partial.dtype.element_ty), mask=inside)
