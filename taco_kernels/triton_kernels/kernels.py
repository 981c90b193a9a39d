"""Device code of the low-rank ops: ``y = scale * (x V^T) U^T + bias + residual`` in one or two launches.

Shapes everywhere: x [rows, in], V [rank, in], U [out, rank], y [rows, out]; last dimensions contiguous, rows strided.
``scale`` is 1 for ``low_rank_linear`` and ``1 / sqrt(mean(x^2) + eps)`` per row for ``low_rank_bridge``.

``row_shrink``, ``row_expand``  one row, in ``row_kernels``; plain multiply-adds, since a matrix unit would be fed 15
                                rows of padding
``shrink``, ``expand``          any number of rows through the matrix units; the first product may be split over ``in``
``combine``                     adds up the splits once where each row of them would be read by many ``expand`` programs
``fused``                       many rows and a small rank: the rank-sized intermediate never leaves the chip
``*_gated``                     second products of two members and ``act(gate) * up`` of their results

All but ``fused`` serve several members (q, k and v; gate and up) of one x: what belongs to a member comes in a tuple
with one entry for each, and a program finds out by its number whose tile it has. One member costs nothing: the
choice is made when the kernel is compiled.

A factor may be given as the transpose of a row-strided matrix (``V_T``, ``U_T``): the gradient towards x is such a
product, of the same factors with their roles swapped.

Split partial sums are stored in float32 and added up in a fixed order: no atomics, so the same input gives the same
bits. ``fp32`` dots ask for ``ieee`` precision; tf32 would cost 13 bits without anyone having asked.
``n_rows`` is not specialised on, or prompt lengths of 1 and of multiples of 16 would compile anew. Offsets of rows
are 64-bit: rows * stride passes 2^31 at sizes that prefill really has.
"""

import triton
import triton.language as tl

from .device import (
    activate,
    add_bias,
    blocks,
    dot,
    first_part,
    load_factor,
    load_tile,
    locate,
    round,
    row_scale,
    select,
    store_output,
)


@triton.jit
def _shrink_tile(
    tile, x, vs, partials, ranks, strides_v, sumsq, n_rows, in_size, stride_x, in_per_split, eps,
    WITH_NORM: tl.constexpr, EVEN_IN: tl.constexpr, V_T: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    r_blocks = blocks(ranks, BLOCK_R)
    split = tile % SPLIT
    m_block = tile // SPLIT // r_blocks  # neighbours share rows of x, which are then still in L2
    member, r_block = locate(tile // SPLIT % r_blocks, ranks, BLOCK_R)
    v, partial = select(vs, member), select(partials, member)
    rank, stride_v = select(ranks, member), select(strides_v, member)
    ms = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    start = split * in_per_split
    for k0 in range(start, min(start + in_per_split, in_size), BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        values = load_tile(x, ms, ks, n_rows, in_size, stride_x, EVEN_IN)
        weights = load_factor(v, rs, ks, rank, in_size, stride_v, EVEN_IN, V_T)
        acc = dot(values, tl.trans(weights), acc)
        if WITH_NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
    inside = (ms < n_rows)[:, None] & (rs < rank)[None, :]
    if SPLIT == 1:
        if WITH_NORM:
            acc = acc * (1.0 / tl.sqrt(squares / in_size + eps))[:, None]
        target = partial + ms.to(tl.int64)[:, None] * rank + rs[None, :]
        tl.store(target, round(acc, partial.dtype.element_ty), mask=inside)
    else:
        plane = tl.cast(split, tl.int64) * n_rows
        tl.store(partial + (plane + ms)[:, None] * rank + rs[None, :], acc, mask=inside)
        if WITH_NORM:  # noqa: SIM102  (a compile-time test around a run-time one)
            if tile // SPLIT % r_blocks == 0:
                tl.store(sumsq + plane + ms, squares, mask=ms < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def shrink(
    x, vs, partials, ranks, strides_v, sumsq, n_rows, in_size, stride_x, in_per_split, eps,
    WITH_NORM: tl.constexpr, EVEN_IN: tl.constexpr, V_T: tl.constexpr, SPLIT: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First product. Grid (row blocks * rank blocks * SPLIT,), or as many programs as the GPU holds if PERSISTENT.

    SPLIT > 1: partial[s] [n_rows, rank] float32, unscaled, and sumsq[s] [n_rows] float32 if WITH_NORM.
    SPLIT = 1: partial [n_rows, rank] in x's dtype, scaled already (the program has seen whole rows).
    """
    if PERSISTENT:
        tiles = tl.cdiv(n_rows, BLOCK_M) * blocks(ranks, BLOCK_R) * SPLIT
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _shrink_tile(
                tile, x, vs, partials, ranks, strides_v, sumsq, n_rows, in_size, stride_x, in_per_split, eps,
                WITH_NORM, EVEN_IN, V_T, SPLIT, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
    else:
        _shrink_tile(
            tl.program_id(0), x, vs, partials, ranks, strides_v, sumsq, n_rows, in_size, stride_x, in_per_split, eps,
            WITH_NORM, EVEN_IN, V_T, SPLIT, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def combine(
    partials, sumsq, middles, ranks, n_rows, in_size, eps,
    WITH_NORM: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """middle[m, r] = scale[m] * sum_s partial[s, m, r], rounded to middle's dtype.

    Grid (blocks of m * rank + r, members).
    """
    member = tl.program_id(1)
    partial, middle, rank = select(partials, member), select(middles, member), select(ranks, member)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = n_rows.to(tl.int64) * rank
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for s in range(SPLIT):
        total += tl.load(partial + s * size + at, mask=at < size, other=0.0)
    if WITH_NORM:
        rows = (at // rank).to(tl.int32)
        total = total * row_scale(sumsq, rows, n_rows, in_size, eps, SPLIT)
    tl.store(middle + at, round(total, middle.dtype.element_ty), mask=at < size)


@triton.jit
def _expand_product(
    partial, u, ms, ns, scale, n_rows, rank, out_size, stride_u,
    SCALED: tl.constexpr, EVEN_RANK: tl.constexpr, U_T: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the second product; adds up the partial sums on the way in."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_K):
        rs = r0 + tl.arange(0, BLOCK_K)
        weights = tl.trans(load_factor(u, ns, rs, out_size, rank, stride_u, EVEN_RANK, U_T))
        if SPLIT == 1:
            middle = load_tile(partial, ms, rs, n_rows, rank, rank, EVEN_RANK)
            acc = dot(middle, weights, acc)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
            for s in tl.static_range(SPLIT):
                plane = partial + tl.cast(s, tl.int64) * n_rows * rank
                total += load_tile(plane, ms, rs, n_rows, rank, rank, EVEN_RANK)
            if SCALED:
                total = total * scale
            high = round(first_part(total, u.dtype.element_ty), u.dtype.element_ty)
            acc = dot(high, weights, acc)
            # Half types: what rounding took from the intermediate goes through a second dot. Few rows are bound by
            # the bytes of U, so this costs nothing there, and the result is that of a float32 intermediate.
            if u.dtype.element_ty != tl.float32:
                low = round(total - high.to(tl.float32), u.dtype.element_ty)
                acc = dot(low, weights, acc)
    return acc


@triton.jit
def _expand_tile(
    tile, partials, us, biases, ys, ranks, outs, bias_sizes, strides_u, sumsq, residual, n_rows, in_size,
    stride_residual, eps,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_RANK: tl.constexpr,
    U_T: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_blocks = blocks(outs, BLOCK_N)
    member, n_block = locate(tile % n_blocks, outs, BLOCK_N)
    out_size = select(outs, member)
    ms = (tile // n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = 1.0
    if WITH_NORM and SPLIT > 1:
        scale = row_scale(sumsq, ms, n_rows, in_size, eps, SPLIT)[:, None]
    acc = _expand_product(
        select(partials, member), select(us, member), ms, ns, scale, n_rows, select(ranks, member), out_size,
        select(strides_u, member), WITH_NORM and SPLIT > 1, EVEN_RANK, U_T, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_output(
        select(ys, member), acc, select(biases, member), select(bias_sizes, member), residual, ms, ns, n_rows,
        out_size, stride_residual, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def expand(
    partials, us, biases, ys, ranks, outs, bias_sizes, strides_u, sumsq, residual, n_rows, in_size, stride_residual,
    eps,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_RANK: tl.constexpr,
    U_T: tl.constexpr, SPLIT: tl.constexpr, PERSISTENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Second product with its epilogue. Grid (row blocks * out blocks,), or what the GPU holds if PERSISTENT."""
    if PERSISTENT:
        tiles = tl.cdiv(n_rows, BLOCK_M) * blocks(outs, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _expand_tile(
                tile, partials, us, biases, ys, ranks, outs, bias_sizes, strides_u, sumsq, residual, n_rows, in_size,
                stride_residual, eps, WITH_NORM, HAS_BIAS, HAS_RESIDUAL, EVEN_RANK, U_T, SPLIT, BLOCK_M, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
    else:
        _expand_tile(
            tl.program_id(0), partials, us, biases, ys, ranks, outs, bias_sizes, strides_u, sumsq, residual, n_rows,
            in_size, stride_residual, eps, WITH_NORM, HAS_BIAS, HAS_RESIDUAL, EVEN_RANK, U_T, SPLIT, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def expand_gated(
    partials, us, biases, y, ranks, bias_sizes, strides_u, out_size, n_rows, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_RANK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up of two members' second products. Grid (row blocks * out blocks,).

    The two products come one after the other, so that one's tiles of U do not crowd out the other's; both results
    stay in registers, and neither of the [rows, out] matrices gate and up is ever written.
    """
    n_blocks = tl.cdiv(out_size, BLOCK_N)
    ms = (tl.program_id(0) // n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = _expand_product(
        partials[0], us[0], ms, ns, 1.0, n_rows, ranks[0], out_size, strides_u[0], False, EVEN_RANK, False, SPLIT,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = _expand_product(
        partials[1], us[1], ms, ns, 1.0, n_rows, ranks[1], out_size, strides_u[1], False, EVEN_RANK, False, SPLIT,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        gate = add_bias(gate, biases[0], ns[None, :], bias_sizes[0])
        up = add_bias(up, biases[1], ns[None, :], bias_sizes[1])
    store_output(y, activate(gate, ACT) * up, y, 0, y, ms, ns, n_rows, out_size, 0, False, False)


# --- many rows, small rank -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def fused(
    x, v, u, bias, residual, y, n_rows, in_size, rank, out_size, stride_x, stride_v, stride_u, stride_residual, eps,
    out_per_program,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_RANK: tl.constexpr, V_T: tl.constexpr, U_T: tl.constexpr,
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
        values = load_tile(x, ms, ks, n_rows, in_size, stride_x, EVEN_IN)
        weights = load_factor(v, rs, ks, rank, in_size, stride_v, EVEN_IN, V_T)
        middle = dot(values, tl.trans(weights), middle)
        if WITH_NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
    if WITH_NORM:
        middle = middle * (1.0 / tl.sqrt(squares / in_size + eps))[:, None]
    rounded = round(middle, x.dtype.element_ty)
    start = tl.program_id(1) * out_per_program
    for n0 in range(start, min(start + out_per_program, out_size), BLOCK_N):
        ns = n0 + tl.arange(0, BLOCK_N)
        weights = load_factor(u, ns, rs, out_size, rank, stride_u, EVEN_RANK, U_T)
        acc = dot(rounded, tl.trans(weights), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        store_output(
            y, acc, bias, out_size, residual, ms, ns, n_rows, out_size, stride_residual, HAS_BIAS, HAS_RESIDUAL
        )  # fmt: skip
