"""``second_moment``: streaming ``X^T X`` of activations or gradients, half of it, in float32 or better.

Read top to bottom: storage -> reference -> backends -> public functions. The library's matrix product does the work on
every device; no symmetric rank-k update is exposed by torch, and one product over all of ``X^T X`` would compute (and
store) each number twice. So rows of it are kept in blocks, each from its diagonal on: 9/16 of the work and of the
memory with eight blocks. Half types are widened a few rows at a time, or go through Triton, which needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from taco_kernels import dispatch
from taco_kernels._library import FLOATS, below_autograd, exact_products

__all__ = ["second_moment_", "second_moment_dense", "second_moment_zeros"]

# More blocks save less and less (1/2 + 1/16 of the whole with eight), and thin products run slower.
BLOCKS = 8
# Narrower than this a product is not worth splitting (2 cores, float32: 256 columns in one piece, 512 in two).
LEAST_BLOCK = 256
# Elements of x that are widened to float32 at a time.
_CHUNK = 1 << 21


# --- storage ---------------------------------------------------------------------------------------------------------


def block_width(n: int) -> int:
    """Rows of ``X^T X`` per block: a multiple of 64, so that blocks are whole tiles of every backend."""
    return min(n, max(LEAST_BLOCK, -(-n // (BLOCKS * 64)) * 64)) if n else 1


def _spans(n: int) -> Iterator[tuple[int, int, int]]:
    """(first row, row after the last, offset in the packed storage) of every block."""
    width, offset = block_width(n), 0
    for start in range(0, n, width):
        stop = min(n, start + width)
        yield start, stop, offset
        offset += (stop - start) * (n - start)


def packed_size(n: int) -> int:
    """Numbers stored for n columns: between n^2 / 2 and n^2."""
    return sum((stop - start) * (n - start) for start, stop, _ in _spans(n))


def _block(moment: Tensor, n: int, start: int, stop: int, offset: int) -> Tensor:
    """Rows start to stop, columns start to n."""
    return moment[offset : offset + (stop - start) * (n - start)].view(stop - start, n - start)


def _columns(moment: Tensor) -> int:
    """n of a packed moment, from its length."""
    n = int((2 * moment.numel()) ** 0.5)
    while n > 0 and packed_size(n) > moment.numel():
        n -= 1
    if packed_size(n) != moment.numel():
        raise ValueError(f"second_moment: {moment.numel()} numbers are no packed moment of any number of columns")
    return n


# --- reference and backends ------------------------------------------------------------------------------------------


def second_moment_reference(x: Tensor) -> Tensor:
    """The specification: ``X^T X`` [n, n] over all leading dimensions of x [..., n], in float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows


def _library(moment: Tensor, rows: Tensor) -> None:
    n = rows.shape[1]
    step = rows.shape[0] if rows.dtype == moment.dtype else max(1, _CHUNK // max(1, n))
    for first in range(0, rows.shape[0], max(1, step)):
        # products in float32 also for a float64 moment of narrower rows: they are exact enough for one chunk
        part = rows[first : first + step]
        part = part.to(torch.float32 if part.dtype != torch.float64 else torch.float64)
        for start, stop, offset in _spans(n):
            block = _block(moment, n, start, stop, offset)
            if part.dtype == moment.dtype:
                block.addmm_(part[:, start:stop].T, part[:, start:])
            else:
                block += part[:, start:stop].T @ part[:, start:]


def _triton(moment: Tensor, rows: Tensor) -> None:
    from taco_kernels.triton_kernels.second_moment import second_moment as kernel

    n = rows.shape[1]
    for start, stop, offset in _spans(n):
        kernel(_block(moment, n, start, stop, offset), rows, start)


def _choose(rows: Tensor, moment: Tensor) -> str:
    forced = dispatch.get_backend()
    if forced in ("triton",):
        reason = dispatch.why_not("triton", rows.device.type)
        if not reason and (moment.dtype != torch.float32 or rows.dtype == torch.float64):
            reason = "adds to float32 moments of float32, float16 and bfloat16 rows only"
        if reason:
            raise RuntimeError(f"triton: {reason}")
        return "triton"
    # float32 has fast library products everywhere; half types would be widened first
    half = rows.dtype in (torch.float16, torch.bfloat16) and moment.dtype == torch.float32
    gpu = rows.device.type == "cuda" and not dispatch.why_not("triton", "cuda")
    return "triton" if forced is None and half and gpu else "library"


# --- public functions ------------------------------------------------------------------------------------------------


def second_moment_zeros(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Storage for the second moments of n columns, for :func:`second_moment_`: zeros, a little over n^2 / 2 of them.

    Args:
        n: columns, at least 1.
        dtype: float32 or float64. float64 storage also adds up in float64 from one call to the next; each call's
            products are float32 unless its rows are float64.
        device: where it lies; torch's default device for None.

    Returns:
        1-D, the rows of ``X^T X`` from the diagonal on, in blocks.

    Raises:
        TypeError: another dtype.
        ValueError: no columns.

    Source: as :func:`second_moment_`.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"second_moment: moments are float32 or float64, not {dtype}")
    if n < 1:
        raise ValueError(f"second_moment: {n} columns")
    return torch.zeros(packed_size(n), dtype=dtype, device=device)


def second_moment_(moment: Tensor, x: Tensor) -> Tensor:
    """Adds ``X^T X`` to packed second moments, in place, where X are all rows of x.

    Args:
        moment: from :func:`second_moment_zeros`, for n columns.
        x: [..., n], float32, float16, bfloat16 or float64; accumulated in float32 (in float64 where both are).

    Returns:
        ``moment``. No gradient flows.

    Raises:
        TypeError: a dtype that is not a supported float, or float64 rows for float32 moments.
        ValueError: sizes or devices that do not fit together.
        RuntimeError: a forced backend that cannot serve the call (the C++ and CUDA backends have no kernel of their
            own for it and leave it to the library).

    Source: the Gram matrix of a layer's inputs, by which SVD-LLM (arXiv:2403.07378) whitens them; to keep one half of
    it in blocks is this project's own.
    """
    if moment.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"second_moment: moments of {moment.dtype} would stop growing; make them with second_moment_zeros"
        )
    if x.dtype not in FLOATS or (x.dtype == torch.float64 and moment.dtype != torch.float64):
        raise TypeError(f"second_moment: rows of dtype {x.dtype} cannot be added to moments of {moment.dtype}")
    if moment.dim() != 1 or x.dim() < 1 or packed_size(x.shape[-1]) != moment.numel() or not x.shape[-1]:
        raise ValueError(
            f"second_moment: moments {tuple(moment.shape)} do not belong to rows of {tuple(x.shape)}[-1] columns; "
            "make them with second_moment_zeros"
        )
    if x.device != moment.device:
        raise ValueError(f"second_moment: x is on {x.device}, but the moments are on {moment.device}")
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.shape[0]:
        with below_autograd(), exact_products(rows.device):
            (_triton if _choose(rows, moment) == "triton" else _library)(moment, rows)
    return moment


def second_moment_dense(moment: Tensor) -> Tensor:
    """Packed second moments as a symmetric matrix.

    Args:
        moment: 1-D, from :func:`second_moment_zeros`, float32 or float64.

    Returns:
        [n, n], of ``moment``'s dtype and on its device; new memory.

    Raises:
        ValueError: a length that packed moments of no number of columns have.

    Source: as :func:`second_moment_`.
    """
    n = _columns(moment)
    dense = torch.empty((n, n), dtype=moment.dtype, device=moment.device)
    for start, stop, offset in _spans(n):
        block = _block(moment, n, start, stop, offset)
        dense[start:stop, stop:] = block[:, stop - start :]
        dense[stop:, start:stop] = block[:, stop - start :].T
        # one triangle of the block on the diagonal stands for both: its halves may differ in their last bits
        upper = block[:, : stop - start].triu()
        dense[start:stop, start:stop] = upper + upper.triu(1).T
    return dense
