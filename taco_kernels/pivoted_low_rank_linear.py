"""``pivoted_low_rank_linear``: a factorised linear map whose right factor is the identity on some inputs.

Factors ``u v`` of a weight are only defined up to an invertible [rank, rank] matrix. Chosen such that ``v`` is the
identity on ``rank`` of the inputs, only ``v``'s other columns need storing: ``rank (out + in - rank)`` numbers instead
of ``rank (out + in)``, always fewer than the dense weight has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taco_kernels._library import FLOATS, computing_dtype

__all__ = ["pivoted_low_rank_linear", "pivoted_low_rank_linear_reference"]


def pivoted_low_rank_linear_reference(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The specification: same arguments and result as :func:`pivoted_low_rank_linear`, by the full right factor.

    Computed in float32 (float64 for float64) and rounded once.
    """
    _check(x, v, u, pivot, bias, residual)
    wide = computing_dtype(x.dtype)
    rank = v.shape[0]
    full = torch.zeros(rank, x.shape[-1], dtype=wide, device=x.device)
    full[:, pivot[:rank].long()] = torch.eye(rank, dtype=wide, device=x.device)
    full[:, pivot[rank:].long()] = v.to(wide)
    y = x.to(wide) @ full.T @ u.to(wide).T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def _check(x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    name = "pivoted_low_rank_linear"
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: x has dtype {x.dtype}; float32, float16, bfloat16 and float64 are supported")
    for label, t in (("v", v), ("u", u), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: {label} has dtype {t.dtype}, but x has {x.dtype}; all must agree")
    if pivot.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: pivot has dtype {pivot.dtype}; int32 or int64 is needed")
    if x.dim() < 1 or v.dim() != 2 or u.dim() != 2 or pivot.dim() != 1:
        raise ValueError(f"{name}: x must be [..., in], v and u 2-D, pivot 1-D")
    if pivot.shape[0] != x.shape[-1] or v.shape[0] + v.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: v {tuple(v.shape)} must be [rank, in - rank] and pivot {tuple(pivot.shape)} [in] "
            f"with in = {x.shape[-1]}, the last dimension of x {tuple(x.shape)}"
        )
    if u.shape[1] != v.shape[0]:
        raise ValueError(f"{name}: u {tuple(u.shape)} must be [out, rank] with rank = {v.shape[0]}")
    if bias is not None and bias.shape != u.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)} must be [out] = ({u.shape[0]},)")
    if residual is not None and residual.shape != (*x.shape[:-1], u.shape[0]):
        raise ValueError(f"{name}: residual {tuple(residual.shape)} must be [..., out] = {(*x.shape[:-1], u.shape[0])}")


def pivoted_low_rank_linear(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``(x[pivot[:rank]] + x[pivot[rank:]] v^T) u^T + bias + residual`` along the last dimension of ``x``.

    Args:
        x: [..., in].
        v: [rank, in - rank]: the right factor's columns for the inputs ``pivot[rank:]``; on the inputs
            ``pivot[:rank]`` it is the identity.
        u: [out, rank].
        pivot: [in], int32 or int64, a permutation of 0..in-1 (an index out of range raises, or asserts on a GPU).
        bias: [out], optional.
        residual: [..., out], optional.

    Returns:
        [..., out] of ``x``'s dtype. Differentiable in every floating argument.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit together.

    Source: interpolative decomposition (Cheng, Gimbutas, Martinsson, Rokhlin 2005) of the right factor.
    """
    _check(x, v, u, pivot, bias, residual)
    rank = v.shape[0]
    gathered = x.index_select(-1, pivot)
    # Two library products: the first one adds the identity's share while its sums are still at hand.
    first, rest = gathered[..., :rank], gathered[..., rank:]
    flat = first.shape[:-1].numel()
    t = torch.addmm(first.reshape(flat, rank), rest.reshape(flat, rest.shape[-1]), v.T)
    y = F.linear(t, u, bias).view(*x.shape[:-1], u.shape[0])
    return y if residual is None else y + residual
