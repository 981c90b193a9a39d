"""Device code of the low-rank ops: ``y = scale * (x V^T) U^T + bias + residual`` in one or two launches.

Shapes everywhere: x [rows, in], V [rank, in], U [out, rank], y [rows, out]; last dimensions contiguous, rows strided.
``scale`` is 1 for ``low_rank_linear`` and ``1 / sqrt(mean(x^2) + eps)`` per row for ``low_rank_bridge``.

``row_shrink``, ``row_expand``  one row; plain multiply-adds, since a matrix unit would be fed 15 rows of padding
``shrink``, ``expand``          any number of rows through the matrix units; the first product may be split over ``in``
``combine``                     adds up the splits once where each row of them would be read by many ``expand`` programs
``fused``                       many rows and a small rank: the rank-sized intermediate never leaves the chip

Split partial sums are stored in float32 and added up in a fixed order: no atomics, so the same input gives the same
bits. ``fp32`` dots ask for ``ieee`` precision; tf32 would cost 13 bits without anyone having asked.
``n_rows`` is not specialised on, or prompt lengths of 1 and of multiples of 16 would compile anew. Offsets of rows
are 64-bit: rows * stride passes 2^31 at sizes that prefill really has.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter (3.6 to 3.9) multiplies the raw bits of bfloat16 in ``tl.dot`` and truncates on the way to
# bfloat16. Widening and rounding ourselves there keeps the arithmetic that of the GPU; compiled code never sees it.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _dot(a, b, acc):
    """acc + a b in float32; float32 operands are not rounded to tf32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _round(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def _load_tile(base, rows, cols, n_rows, n_cols, stride, EVEN_COLS: tl.constexpr):
    """Tile [len(rows), len(cols)] of a row-strided matrix, zeros outside of it."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    # Without the column test the whole 16-byte access is provably in bounds, and the compiler keeps it in one piece.
    if EVEN_COLS:
        return tl.load(pointers, mask=(rows < n_rows)[:, None], other=0.0)
    return tl.load(pointers, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)


@triton.jit
def _row_scale(sumsq, rows, n_rows, in_size, eps, SPLIT: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` from the partial sums of squares [SPLIT, n_rows]; 1 in padded rows."""
    total = tl.zeros([rows.shape[0]], dtype=tl.float32)
    for s in range(SPLIT):
        total += tl.load(sumsq + s * n_rows + rows, mask=rows < n_rows, other=0.0)
    return tl.where(rows < n_rows, 1.0 / tl.sqrt(total / in_size + eps), 1.0)


@triton.jit
def _store_output(
    y, acc, bias, residual, rows, cols, n_rows, n_cols, stride_residual,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Epilogue: add bias and residual in float32, round once, store. y is contiguous [n_rows, n_cols]."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(
            residual + long_rows * stride_residual + cols[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
    tl.store(
        y + long_rows * n_cols + cols[None, :],
        _round(acc, y.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def row_shrink(
    x, v, partial, sumsq, in_size, rank, stride_v, in_per_split,
    WITH_NORM: tl.constexpr, EVEN_IN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[s, r] = sum over the s-th slice of ``in`` of x[k] v[r, k], for one row. Grid (rank blocks, splits)."""
    r_block = tl.program_id(0)
    split = tl.program_id(1)
    rs = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # A two-dimensional accumulator: the reduction over threads happens once after the loop, not in every step.
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    start = split * in_per_split
    for k0 in tl.range(start, min(start + in_per_split, in_size), BLOCK_K, num_stages=STAGES):
        ks = k0 + tl.arange(0, BLOCK_K)
        weights = _load_tile(v, rs, ks, rank, in_size, stride_v, EVEN_IN).to(tl.float32)
        values = tl.load(x + ks, mask=ks < in_size, other=0.0).to(tl.float32)
        acc += weights * values[None, :]
        if WITH_NORM:
            squares += values * values
    tl.store(partial + split * rank + rs, tl.sum(acc, axis=1), mask=rs < rank)
    if WITH_NORM:  # noqa: SIM102  (a compile-time test around a run-time one)
        if r_block == 0:
            tl.store(sumsq + split, tl.sum(squares, axis=0))


@triton.jit
def row_expand(
    partial, sumsq, u, bias, residual, y, in_size, rank, out_size, stride_u, eps,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_RANK: tl.constexpr,
    SPLIT: tl.constexpr, SPLIT_POW2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[n] = scale * sum_r (sum_s partial[s, r]) u[n, r] + bias + residual, for one row. Grid (out blocks,)."""
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLIT_POW2)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for r0 in tl.range(0, rank, BLOCK_K, num_stages=STAGES):
        rs = r0 + tl.arange(0, BLOCK_K)
        weights = _load_tile(u, ns, rs, out_size, rank, stride_u, EVEN_RANK).to(tl.float32)
        parts = tl.load(
            partial + splits[:, None] * rank + rs[None, :],
            mask=(splits < SPLIT)[:, None] & (rs < rank)[None, :],
            other=0.0,
        )
        acc += weights * tl.sum(parts, axis=0)[None, :]
    result = tl.sum(acc, axis=1)
    if WITH_NORM:
        squares = tl.sum(tl.load(sumsq + splits, mask=splits < SPLIT, other=0.0), axis=0)
        result = result * (1.0 / tl.sqrt(squares / in_size + eps))
    inside = ns < out_size
    if HAS_BIAS:
        result += tl.load(bias + ns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        result += tl.load(residual + ns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + ns, _round(result, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def shrink(
    x, v, partial, sumsq, n_rows, in_size, rank, stride_x, stride_v, in_per_split, eps,
    WITH_NORM: tl.constexpr, EVEN_IN: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First product. Grid (row blocks * rank blocks, SPLIT).

    SPLIT > 1: partial[s] [n_rows, rank] float32, unscaled, and sumsq[s] [n_rows] float32 if WITH_NORM.
    SPLIT = 1: partial [n_rows, rank] in x's dtype, scaled already (the program has seen whole rows).
    """
    r_blocks = tl.cdiv(rank, BLOCK_R)
    m_block = tl.program_id(0) // r_blocks  # neighbours share rows of x, which are then still in L2
    r_block = tl.program_id(0) % r_blocks
    split = tl.program_id(1)
    ms = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    start = split * in_per_split
    for k0 in range(start, min(start + in_per_split, in_size), BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        values = _load_tile(x, ms, ks, n_rows, in_size, stride_x, EVEN_IN)
        weights = _load_tile(v, rs, ks, rank, in_size, stride_v, EVEN_IN)
        acc = _dot(values, tl.trans(weights), acc)
        if WITH_NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
    inside = (ms < n_rows)[:, None] & (rs < rank)[None, :]
    if SPLIT == 1:
        if WITH_NORM:
            acc = acc * (1.0 / tl.sqrt(squares / in_size + eps))[:, None]
        target = partial + ms.to(tl.int64)[:, None] * rank + rs[None, :]
        tl.store(target, _round(acc, partial.dtype.element_ty), mask=inside)
    else:
        plane = split.to(tl.int64) * n_rows
        tl.store(partial + (plane + ms)[:, None] * rank + rs[None, :], acc, mask=inside)
        if WITH_NORM:  # noqa: SIM102  (a compile-time test around a run-time one)
            if r_block == 0:
                tl.store(sumsq + plane + ms, squares, mask=ms < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def combine(
    partial, sumsq, middle, n_rows, in_size, rank, eps,
    WITH_NORM: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """middle[m, r] = scale[m] * sum_s partial[s, m, r], rounded to middle's dtype. Grid (blocks of m * rank + r,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = n_rows.to(tl.int64) * rank
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for s in range(SPLIT):
        total += tl.load(partial + s * size + at, mask=at < size, other=0.0)
    if WITH_NORM:
        rows = (at // rank).to(tl.int32)
        total = total * _row_scale(sumsq, rows, n_rows, in_size, eps, SPLIT)
    tl.store(middle + at, _round(total, middle.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["n_rows"])
def expand(
    partial, sumsq, u, bias, residual, y, n_rows, in_size, rank, out_size, stride_u, stride_residual, eps,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_RANK: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Second product with its epilogue; adds up the partial sums on the way in. Grid (row blocks * out blocks,)."""
    n_blocks = tl.cdiv(out_size, BLOCK_N)
    ms = (tl.program_id(0) // n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if WITH_NORM and SPLIT > 1:
        scale = _row_scale(sumsq, ms, n_rows, in_size, eps, SPLIT)[:, None]
    for r0 in range(0, rank, BLOCK_K):
        rs = r0 + tl.arange(0, BLOCK_K)
        weights = tl.trans(_load_tile(u, ns, rs, out_size, rank, stride_u, EVEN_RANK))
        if SPLIT == 1:
            middle = _load_tile(partial, ms, rs, n_rows, rank, rank, EVEN_RANK)
            acc = _dot(middle, weights, acc)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
            for s in tl.static_range(SPLIT):
                plane = partial + tl.cast(s, tl.int64) * n_rows * rank
                total += _load_tile(plane, ms, rs, n_rows, rank, rank, EVEN_RANK)
            if WITH_NORM:
                total = total * scale
            high = _round(total, u.dtype.element_ty)
            acc = _dot(high, weights, acc)
            # Half types: what rounding took from the intermediate goes through a second dot. Few rows are bound by
            # the bytes of U, so this costs nothing there, and the result is that of a float32 intermediate.
            if u.dtype.element_ty != tl.float32:
                low = _round(total - high.to(tl.float32), u.dtype.element_ty)
                acc = _dot(low, weights, acc)
    _store_output(
        y, acc, bias, residual, ms, ns, n_rows, out_size, stride_residual, HAS_BIAS, HAS_RESIDUAL
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def fused(
    x, v, u, bias, residual, y, n_rows, in_size, rank, out_size, stride_x, stride_v, stride_u, stride_residual, eps,
    out_per_program,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Both products for BLOCK_M rows; needs rank <= BLOCK_R. Grid (row blocks, slices of ``out``).

    The intermediate stays in registers / shared memory in x's dtype. Each slice of ``out`` computes it anew, so more
    than one slice pays only while there are too few row blocks to fill the GPU.
    """
    ms = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.arange(0, BLOCK_R)
    middle = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for k0 in range(0, in_size, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        values = _load_tile(x, ms, ks, n_rows, in_size, stride_x, EVEN_IN)
        weights = _load_tile(v, rs, ks, rank, in_size, stride_v, EVEN_IN)
        middle = _dot(values, tl.trans(weights), middle)
        if WITH_NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
    if WITH_NORM:
        middle = middle * (1.0 / tl.sqrt(squares / in_size + eps))[:, None]
    rounded = _round(middle, x.dtype.element_ty)
    start = tl.program_id(1) * out_per_program
    for n0 in range(start, min(start + out_per_program, out_size), BLOCK_N):
        ns = n0 + tl.arange(0, BLOCK_N)
        weights = _load_tile(u, ns, rs, out_size, rank, stride_u, EVEN_RANK)
        acc = _dot(rounded, tl.trans(weights), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        _store_output(
            y, acc, bias, residual, ms, ns, n_rows, out_size, stride_residual, HAS_BIAS, HAS_RESIDUAL
        )  # fmt: skip
