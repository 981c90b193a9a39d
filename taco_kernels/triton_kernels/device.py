"""What the Triton kernels share on the device: dots, roundings, tiles, members of a group, epilogues."""

import os

import triton
import triton.language as tl

# Triton's interpreter (3.6 to 3.9) multiplies the raw bits of bfloat16 in ``tl.dot`` and truncates on the way to
# bfloat16. Widening and rounding ourselves there keeps the arithmetic that of the GPU; compiled code never sees it.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32; float32 operands are not rounded to tf32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def first_part(x, dtype: tl.constexpr):
    """What of float32 numbers is rounded to ``dtype`` where the remainder goes through a product of its own.

    Stops at the dtype's largest number: the remainder then reaches as far again, for float16 up to 131008 together.
    With infinity as the first part the remainder would be minus infinity, and their sum NaN.
    """
    if dtype == tl.float16:
        return tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    elif dtype == tl.bfloat16:
        return tl.minimum(tl.maximum(x, -3.3895313892515355e38), 3.3895313892515355e38)
    else:
        return x


@triton.jit
def load_tile(base, rows, cols, n_rows, n_cols, stride, EVEN_COLS: tl.constexpr):
    """Tile [len(rows), len(cols)] of a row-strided matrix, zeros outside of it."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    # Without the column test the whole 16-byte access is provably in bounds, and the compiler keeps it in one piece.
    if EVEN_COLS:
        return tl.load(pointers, mask=(rows < n_rows)[:, None], other=0.0)
    return tl.load(pointers, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)


@triton.jit
def load_factor(base, rows, cols, n_rows, n_cols, stride, EVEN_COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tile [len(rows), len(cols)] of a factor, or of the transpose of what is stored; zeros outside."""
    if TRANSPOSED:
        return tl.trans(load_tile(base, cols, rows, n_cols, n_rows, stride, False))
    return load_tile(base, rows, cols, n_rows, n_cols, stride, EVEN_COLS)


@triton.jit
def locate(block, sizes, BLOCK: tl.constexpr):
    """(member, block within it) of a block counted through all members, each cut into blocks of its own."""
    member = 0
    if len(sizes) > 1:
        size = sizes[0]
        for i in tl.static_range(1, len(sizes)):
            blocks = tl.cdiv(size, BLOCK)
            later = block >= blocks
            block = tl.where(later, block - blocks, block)
            member = tl.where(later, i, member)
            size = tl.where(later, sizes[i], size)
    return member, block


@triton.jit
def select(values, member):
    """values[member] for a member known at run time only; keeps what is known of alignment."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(member == i, values[i], chosen)
    return chosen


@triton.jit
def blocks(sizes, BLOCK: tl.constexpr):
    total = tl.cdiv(sizes[0], BLOCK)
    for i in tl.static_range(1, len(sizes)):
        total += tl.cdiv(sizes[i], BLOCK)
    return total


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of a gated MLP in float32."""
    if ACT == "silu":
        return x * _sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(a)) / 2 is sigmoid(2 a)
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == "relu", "unknown activation")
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_scale(sumsq, rows, n_rows, in_size, eps, SPLIT: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` from the partial sums of squares [SPLIT, n_rows]; 1 in padded rows."""
    total = tl.zeros([rows.shape[0]], dtype=tl.float32)
    for s in range(SPLIT):
        total += tl.load(sumsq + s * n_rows + rows, mask=rows < n_rows, other=0.0)
    return tl.where(rows < n_rows, 1.0 / tl.sqrt(total / in_size + eps), 1.0)


@triton.jit
def add_bias(acc, bias, cols, bias_size):
    """acc + bias along the last dimension; ``bias_size`` is 0 for a member that has none."""
    return acc + tl.load(bias + cols, mask=cols < bias_size, other=0.0).to(tl.float32)


@triton.jit
def store_output(
    y, acc, bias, bias_size, residual, rows, cols, n_rows, n_cols, stride_residual,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Epilogue: add bias and residual in float32, round once, store. y is contiguous [n_rows, n_cols]."""
    if HAS_BIAS:
        acc = add_bias(acc, bias, cols[None, :], bias_size)
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
        round(acc, y.dtype.element_ty),
        mask=inside,
    )
