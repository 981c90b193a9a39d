"""Triton backend of ``taco_kernels.singular_attribution``: both products and the four sums in one launch.

Neither product is written to memory: a program computes one tile of each, multiplies them, and leaves three numbers per
direction. It reads x and grad once per block of directions, which the second-level cache serves.
"""

import torch
import triton
import triton.language as tl

from .device import dot, load_tile
from .launch import Launch, _rows_contiguous, on_device, require_reachable, run

# 64 x 64: two float32 accumulators of 32 registers each per thread (4 warps), beside the tiles on their way in.
BLOCK_ROWS = 64
BLOCK_DIRECTIONS = 64
BLOCK_SUM = 32


@triton.jit(do_not_specialize=["tokens", "blocks"])
def attribution(
    x, grad, u, v, partial, tokens, blocks, in_size, out_size, directions, stride_x, stride_grad, stride_u, stride_v,
    plane,
    EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[0..2, s * blocks + m, r] = sums of p, |p| and p^2 over the m-th block of rows of sequence s.

    Grid (sequences * blocks, direction blocks). x [sequences * tokens, in], grad [.., out], u [out, directions],
    v [directions, in]; ``plane`` elements lie between the three planes of ``partial``.
    """
    program = tl.program_id(0)
    sequence = program // blocks
    rows = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = sequence.to(tl.int64) * tokens
    right = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k0 in range(0, in_size, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        values = load_tile(x + first_row * stride_x, rows, ks, tokens, in_size, stride_x, EVEN_IN)
        weights = load_tile(v, rs, ks, directions, in_size, stride_v, EVEN_IN)
        right = dot(values, tl.trans(weights), right)
    left = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k0 in range(0, out_size, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        values = load_tile(grad + first_row * stride_grad, rows, ks, tokens, out_size, stride_grad, EVEN_OUT)
        weights = load_tile(u, ks, rs, out_size, directions, stride_u, EVEN_K)
        left = dot(values, weights, left)
    # Rows and directions outside were loaded as zeros, so they add nothing.
    terms = left * right
    target = partial + program.to(tl.int64) * directions + rs
    inside = rs < directions
    tl.store(target, tl.sum(terms, axis=0), mask=inside)
    tl.store(target + plane, tl.sum(tl.abs(terms), axis=0), mask=inside)
    tl.store(target + 2 * plane, tl.sum(terms * terms, axis=0), mask=inside)


def launch(
    x: torch.Tensor,
    grad: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    partial: torch.Tensor,
    sequences: int,
    tokens: int,
) -> Launch:
    """The one launch of a call; ``partial`` is float32 [3, sequences * blocks, directions]."""
    (out_size, directions), in_size = u.shape, x.shape[1]
    blocks = triton.cdiv(tokens, BLOCK_ROWS)
    arguments = (
        x, grad, u, v, partial, tokens, blocks, in_size, out_size, directions, x.stride(0), grad.stride(0), u.stride(0),
        v.stride(0), partial.stride(0),
    )  # fmt: skip
    # Whole tiles only: then a row's 16-byte accesses need no mask of their own.
    constants = {
        "EVEN_IN": in_size % BLOCK_SUM == 0,
        "EVEN_OUT": out_size % BLOCK_SUM == 0,
        "EVEN_K": directions % BLOCK_DIRECTIONS == 0,
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_R": BLOCK_DIRECTIONS,
        "BLOCK_K": BLOCK_SUM,
    }
    grid = (sequences * blocks, triton.cdiv(directions, BLOCK_DIRECTIONS))
    return Launch(attribution, grid, arguments, constants, 4, 3)


def singular_attribution(
    x: torch.Tensor, grad: torch.Tensor, u: torch.Tensor, v: torch.Tensor, sequences: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signed, absolute, per-sequence squared and per-token squared sums, float32 [directions] each.

    x [sequences * tokens, in], grad [sequences * tokens, out], u [out, directions], v [directions, in], all of one
    dtype (float32, bfloat16) on one GPU; products are accumulated in float32, and added up in a fixed order.
    Raises ValueError for tensors that are not on a GPU.
    """
    require_reachable(x)
    directions = u.shape[1]
    rows = sequences * tokens
    # A sequence of one token each: blocks of one row would waste the tiles, and its squares are the token squares.
    single = tokens == 1
    if single:
        sequences, tokens = 1, rows
    if rows == 0 or directions == 0 or x.shape[1] == 0 or grad.shape[1] == 0:
        zeros = torch.zeros(directions, dtype=torch.float32, device=x.device)
        return zeros, zeros.clone(), zeros.clone(), zeros.clone()
    x, grad, u, v = (_rows_contiguous(t) for t in (x, grad, u, v))
    blocks = triton.cdiv(tokens, BLOCK_ROWS)
    partial = torch.empty((3, sequences * blocks, directions), dtype=torch.float32, device=x.device)
    step = launch(x, grad, u, v, partial, sequences, tokens)
    with on_device(x):
        run([step])
    # Few numbers are left: doubles keep what the short float32 sums have.
    signed, absolute, token_squares = partial.double()
    per_sequence = signed.view(sequences, blocks, directions).sum(1)
    total = token_squares.sum(0)
    squares = total if single else per_sequence.square().sum(0)
    return per_sequence.sum(0).float(), absolute.sum(0).float(), squares.float(), total.float()
