"""``sketch_product``: random test vectors times a matrix, the vectors made in registers inside the product.

The numbers are those of :mod:`taco_kernels.svd.sketch`, bit for bit: Philox is integer arithmetic. One call gives
sixteen bytes that belong to entries 32 apart, so a program that walks along the matrix in blocks of 512 columns
turns each call into sixteen tiles of 32 columns with a shift and a mask: no shuffles, nothing stored, and the
arithmetic of generation (about 100 integer operations per call) is spread over sixteen numbers and BLOCK_M rows of
the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from taco_kernels.svd.sketch import RUN

from .device import dot, round
from .launch import INTERPRETED, Launch, _rows_contiguous, on_device, run

__all__ = ["sketch_launch", "sketch_product"]


@triton.jit
def _philox(c0, c1, k0, k1):
    """Output words of Philox4x32-10 for counters (c0, c1, 0, 0); all uint32."""
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
        m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
        high0 = tl.umulhi(m0, c0)
        high1 = tl.umulhi(m1, c2)
        low0 = m0 * c0
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_vector"])
def sketch_gemm(
    a, scale, y, n_rows, size, n_vectors, stride, seed_low, seed_high, first_vector,
    HAS_SCALE: tl.constexpr, LOW: tl.constexpr, RUN: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y[v, r] = sum_i Omega[v, i] scale[i] a[r, i]; a [n_rows, size] strided, y [n_vectors, n_rows] contiguous float32.

    ``LOW`` rounds the matrix's tile to bfloat16 (Omega is exact in it); else the product is in full float32.
    """
    # Vectors fastest: the programs that run together read the same rows of the matrix.
    pid = tl.program_id(0)
    blocks = tl.cdiv(n_vectors, BLOCK_V)
    vectors = (pid % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    run = tl.arange(0, RUN)
    offsets = rows.to(tl.int64)[:, None] * stride
    inside = (rows < n_rows)[:, None]
    c1 = (vectors + first_vector).to(tl.uint32)[:, None] + tl.zeros([BLOCK_V, RUN], tl.uint32)
    # Seeds come as signed 32-bit halves; the bits are what counts.
    k0 = tl.zeros([BLOCK_V, RUN], tl.uint32) + seed_low.to(tl.uint32)
    k1 = tl.zeros([BLOCK_V, RUN], tl.uint32) + seed_high.to(tl.uint32)
    acc = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
    for block in range(0, tl.cdiv(size, 16 * RUN)):
        c0 = tl.zeros([BLOCK_V, RUN], tl.uint32) + (block * RUN + run).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = _philox(c0, c1, k0, k1)
        # Not unrolled: sixteen tiles in flight would fill the shared memory.
        for byte in range(0, 16):
            columns = (block * 16 + byte) * RUN + run
            tile = tl.load(a + offsets + columns[None, :], mask=inside & (columns < size)[None, :], other=0.0)
            word = tl.where(byte < 8, tl.where(byte < 4, w0, w1), tl.where(byte < 12, w2, w3))
            number = ((word >> (8 * (byte % 4))) & 0xFF).to(tl.int32)
            omega = (2 * number - 255).to(tl.float32) * 0.0078125
            if HAS_SCALE:
                tile = tile.to(tl.float32) * tl.load(scale + columns, mask=columns < size, other=0.0)[None, :]
            if LOW:
                tile = round(tile.to(tl.float32), tl.bfloat16)
                acc = dot(omega.to(tl.bfloat16), tl.trans(tile), acc)
            else:
                acc = dot(omega, tl.trans(tile.to(tl.float32)), acc)
    out = y + vectors.to(tl.int64)[:, None] * n_rows + rows[None, :]
    tl.store(out, acc, mask=(vectors < n_vectors)[:, None] & (rows < n_rows)[None, :])


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def sketch_launch(
    a: torch.Tensor, scale: torch.Tensor | None, y: torch.Tensor, first_vector: int, seed: int, low: bool
) -> Launch:
    """The launch as data, so that ``aot`` can compile it without a GPU."""
    # 128 x 128 sums are 64 registers a thread at 8 warps; a call's words are 16 more. Full float32 has no matrix unit:
    # smaller tiles.
    block_v, block_m = (64, 128) if low else (64, 64)
    grid = (triton.cdiv(y.shape[0], block_v) * triton.cdiv(a.shape[0], block_m),)
    args = (
        a, y if scale is None else scale, y, a.shape[0], a.shape[1], y.shape[0], a.stride(0),
        _signed(seed & 0xFFFFFFFF), _signed(seed >> 32 & 0xFFFFFFFF), first_vector,
    )  # fmt: skip
    constants: dict[str, Any] = {"HAS_SCALE": scale is not None, "LOW": low, "RUN": RUN}
    constants |= {"BLOCK_V": block_v, "BLOCK_M": block_m}
    return Launch(sketch_gemm, grid, args, constants, 8, 3)


def sketch_product(
    a: torch.Tensor, scale: torch.Tensor | None, vectors: tuple[int, int], seed: int, dtype: torch.dtype
) -> torch.Tensor:
    """``Omega diag(scale) A^T`` for test vectors ``vectors[0] .. vectors[1]``: [vectors, rows of A], float32.

    Args:
        a: [rows, size], float32, float16 or bfloat16.
        scale: [size] or None.
        dtype: bfloat16 multiplies tiles rounded to bfloat16; float32 is full float32. Sums are float32 either way.

    Raises:
        TypeError: another dtype; ValueError: tensors Triton cannot reach.
    """
    if a.dtype not in (torch.float32, torch.float16, torch.bfloat16) or dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the Triton sketch takes float32, float16 and bfloat16 matrices, not {a.dtype} with {dtype}")
    if not a.is_cuda and not INTERPRETED:
        raise ValueError(f"the Triton sketch needs CUDA tensors (or TRITON_INTERPRET=1), not {a.device}")
    a = _rows_contiguous(a)
    if scale is not None:
        scale = scale.float().contiguous()
    y = torch.empty((vectors[1] - vectors[0], a.shape[0]), dtype=torch.float32, device=a.device)
    launch = sketch_launch(a, scale, y, vectors[0], seed, dtype == torch.bfloat16)
    with on_device(a):
        run([launch])
    return y
