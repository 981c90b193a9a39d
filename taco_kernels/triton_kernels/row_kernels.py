"""Device code for one row; see ``kernels`` for what all kernels have in common."""

import triton
import triton.language as tl

from .device import activate, add_bias, load_factor, locate, round, select


@triton.jit
def row_shrink(
    x, vs, partials, ranks, strides_v, sumsq, in_size, in_per_split,
    WITH_NORM: tl.constexpr, EVEN_IN: tl.constexpr, V_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[s, r] = sum over the s-th slice of ``in`` of x[k] v[r, k], for one row. Grid (rank blocks, splits)."""
    member, r_block = locate(tl.program_id(0), ranks, BLOCK_R)
    v, partial = select(vs, member), select(partials, member)
    rank, stride_v = select(ranks, member), select(strides_v, member)
    split = tl.program_id(1)
    rs = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # A two-dimensional accumulator: the reduction over threads happens once after the loop, not in every step.
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    start = split * in_per_split
    for k0 in tl.range(start, min(start + in_per_split, in_size), BLOCK_K, num_stages=STAGES):
        ks = k0 + tl.arange(0, BLOCK_K)
        weights = load_factor(v, rs, ks, rank, in_size, stride_v, EVEN_IN, V_T).to(tl.float32)
        values = tl.load(x + ks, mask=ks < in_size, other=0.0).to(tl.float32)
        acc += weights * values[None, :]
        if WITH_NORM:
            squares += values * values
    tl.store(partial + split * rank + rs, tl.sum(acc, axis=1), mask=rs < rank)
    if WITH_NORM:  # noqa: SIM102  (a compile-time test around a run-time one)
        if tl.program_id(0) == 0:
            tl.store(sumsq + split, tl.sum(squares, axis=0))


@triton.jit
def _row_product(
    partial, u, ns, rank, out_size, stride_u, EVEN_RANK: tl.constexpr, U_T: tl.constexpr, SPLIT: tl.constexpr,
    SPLIT_POW2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N]: sum_r (sum_s partial[s, r]) u[n, r]."""
    splits = tl.arange(0, SPLIT_POW2)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for r0 in tl.range(0, rank, BLOCK_K, num_stages=STAGES):
        rs = r0 + tl.arange(0, BLOCK_K)
        weights = load_factor(u, ns, rs, out_size, rank, stride_u, EVEN_RANK, U_T).to(tl.float32)
        parts = tl.load(
            partial + splits[:, None] * rank + rs[None, :],
            mask=(splits < SPLIT)[:, None] & (rs < rank)[None, :],
            other=0.0,
        )
        acc += weights * tl.sum(parts, axis=0)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def row_expand(
    partials, us, biases, ys, ranks, outs, bias_sizes, strides_u, sumsq, residual, in_size, eps,
    WITH_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_RANK: tl.constexpr,
    U_T: tl.constexpr, SPLIT: tl.constexpr, SPLIT_POW2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y[n] = scale * sum_r (sum_s partial[s, r]) u[n, r] + bias + residual, for one row. Grid (out blocks,)."""
    member, n_block = locate(tl.program_id(0), outs, BLOCK_N)
    rank, out_size = select(ranks, member), select(outs, member)
    ns = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    result = _row_product(
        select(partials, member), select(us, member), ns, rank, out_size, select(strides_u, member), EVEN_RANK, U_T,
        SPLIT, SPLIT_POW2, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    if WITH_NORM:
        splits = tl.arange(0, SPLIT_POW2)
        squares = tl.sum(tl.load(sumsq + splits, mask=splits < SPLIT, other=0.0), axis=0)
        result = result * (1.0 / tl.sqrt(squares / in_size + eps))
    inside = ns < out_size
    if HAS_BIAS:
        result = add_bias(result, select(biases, member), ns, select(bias_sizes, member))
    if HAS_RESIDUAL:
        result += tl.load(residual + ns, mask=inside, other=0.0).to(tl.float32)
    y = select(ys, member)
    tl.store(y + ns, round(result, y.dtype.element_ty), mask=inside)


@triton.jit
def row_expand_gated(
    partials, us, biases, y, ranks, bias_sizes, strides_u, out_size, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_RANK: tl.constexpr, SPLIT: tl.constexpr, SPLIT_POW2: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[n] = act(gate[n]) * up[n], each as in ``row_expand``; members are gate and up. Grid (out blocks,)."""
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = _row_product(
        partials[0], us[0], ns, ranks[0], out_size, strides_u[0], EVEN_RANK, False, SPLIT, SPLIT_POW2, BLOCK_N,
        BLOCK_K, STAGES,
    )  # fmt: skip
    up = _row_product(
        partials[1], us[1], ns, ranks[1], out_size, strides_u[1], EVEN_RANK, False, SPLIT, SPLIT_POW2, BLOCK_N,
        BLOCK_K, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        gate = add_bias(gate, biases[0], ns, bias_sizes[0])
        up = add_bias(up, biases[1], ns, bias_sizes[1])
    tl.store(y + ns, round(activate(gate, ACT) * up, y.dtype.element_ty), mask=ns < out_size)
