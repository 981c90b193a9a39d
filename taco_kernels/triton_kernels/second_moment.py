"""Triton backend of ``taco_kernels.second_moment_``: one block of rows of ``X^T X``, half types without a copy."""

import torch
import triton
import triton.language as tl

from .device import dot, load_tile
from .launch import Launch, _rows_contiguous, on_device, require_reachable, run

# 64 x 64 float32 sums: 32 registers per thread (4 warps); 64 rows of x per step are 8 KiB per operand in half types.
BLOCK = 64
BLOCK_ROWS = 64


@triton.jit(do_not_specialize=["n_rows"])
def gram(
    x, moment, n_rows, n_columns, first, block_rows, stride_x, stride_moment,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """moment[i, j] += sum_t x[t, first + i] x[t, first + j]. Grid (tiles of i, tiles of j); x [n_rows, n_columns]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = n_columns - first
    acc = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for t0 in range(0, n_rows, BLOCK_M):
        ts = t0 + tl.arange(0, BLOCK_M)
        left = load_tile(x + first, ts, rows, n_rows, width, stride_x, EVEN)
        right = load_tile(x + first, ts, cols, n_rows, width, stride_x, EVEN)
        acc = dot(tl.trans(left), right, acc)
    target = moment + rows.to(tl.int64)[:, None] * stride_moment + cols[None, :]
    inside = (rows < block_rows)[:, None] & (cols < width)[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + acc, mask=inside)


def launch(block: torch.Tensor, x: torch.Tensor, first: int) -> Launch:
    """Adds to ``block`` [rows, columns - first], float32: rows first... of ``X^T X``, from column first on."""
    grid = (triton.cdiv(block.shape[0], BLOCK), triton.cdiv(block.shape[1], BLOCK))
    arguments = (x, block, x.shape[0], x.shape[1], first, block.shape[0], x.stride(0), block.stride(0))
    # Blocks begin at multiples of the tile, so tiles are whole wherever the last one is.
    constants = {"EVEN": x.shape[1] % BLOCK == 0 and first % BLOCK == 0, "BLOCK_N": BLOCK, "BLOCK_M": BLOCK_ROWS}
    return Launch(gram, grid, arguments, constants, 4, 3)


def second_moment(block: torch.Tensor, x: torch.Tensor, first: int) -> None:
    """Launches it. x [rows, columns] float32, float16 or bfloat16. ValueError for tensors that are not on a GPU."""
    require_reachable(x)
    x = _rows_contiguous(x)
    step = launch(block, x, first)
    with on_device(x):
        run([step])
