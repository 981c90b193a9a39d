"""What the ops share about one factorised linear map ``x @ v.T @ u.T + bias``: argument checks and gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taco_kernels._library import FLOATS

__all__ = ["complain", "factors_fit", "fits", "gradients", "require_tensors", "row_count", "rows_2d", "turned"]


def fits(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> bool:
    """Whether x [..., in], v [rank, in], u [out, rank] and bias [out] belong together: quick, for the hot path."""
    try:
        dtype = x.dtype
        return dtype in FLOATS and x.dim() > 0 and factors_fit(x.shape[-1], dtype, x.device, v, u, bias)
    except AttributeError:  # None, which torch lets pass for a tensor; `complain` says so
        return False


def factors_fit(
    width: int, dtype: torch.dtype, device: torch.device, v: Tensor, u: Tensor, bias: Tensor | None
) -> bool:
    """:func:`fits` for an input of which only the width of its rows exists."""
    return (
        v.dtype == dtype
        and u.dtype == dtype
        and v.device == device
        and u.device == device
        and v.dim() == 2
        and u.dim() == 2
        and v.shape[1] == width
        and u.shape[1] == v.shape[0]
        and (bias is None or (bias.shape == u.shape[:1] and bias.dtype == dtype and bias.device == device))
    )


def complain(
    op: str,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    *,
    names: tuple[str, str, str] = ("v", "u", "bias"),
    x_name: str = "x",
    in_name: str = "in",
    out_name: str = "out",
    others: dict[str, Tensor | None] | None = None,
) -> None:
    """Says what is wrong with arguments that do not fit; raises TypeError or ValueError, or nothing if all is well.

    The names are what the caller of ``op`` knows the arguments by; ``others`` must agree with x in dtype and device.
    """
    require_tensors(op, **{x_name: x}, **dict(zip(names[:2], (v, u), strict=True)))
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {x_name} has dtype {x.dtype}; float32, float16, bfloat16 and float64 are supported")
    for name, t in {**dict(zip(names, (v, u, bias), strict=True)), **(others or {})}.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, but {x_name} has {x.dtype}; all must agree")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, but {x_name} is on {x.device}; all must agree")
    if x.dim() < 1:
        raise ValueError(f"{op}: {x_name} must be [..., {in_name}], but it has no dimensions")
    v_name, u_name, bias_name = names
    for name, t in ((v_name, v), (u_name, u)):
        if t.dim() != 2:
            raise ValueError(f"{op}: {name} must have 2 dimensions, but its shape is {tuple(t.shape)}")
    if v.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {v_name} {tuple(v.shape)} must be [rank, {in_name}] with {in_name} = {x.shape[-1]}, "
            f"the last dimension of {x_name} {tuple(x.shape)}"
        )
    if u.shape[1] != v.shape[0]:
        raise ValueError(
            f"{op}: {u_name} {tuple(u.shape)} must be [out, rank] with rank = {v.shape[0]}, "
            f"the first dimension of {v_name} {tuple(v.shape)}"
        )
    if bias is not None and bias.shape != u.shape[:1]:
        raise ValueError(f"{op}: {bias_name} {tuple(bias.shape)} must be [{out_name}] = ({u.shape[0]},)")


def require_tensors(op: str, **named: object) -> None:
    """Raises TypeError where one of ``named`` is no tensor: torch's own checks let None pass."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(value).__name__}")


def turned(factor: Tensor) -> bool:
    """Whether ``factor`` is a transposed view: its columns, not its rows, lie in one piece."""
    return factor.stride(1) != 1 and factor.stride(0) == 1


def row_count(x: Tensor) -> int:
    """How many rows x [..., width] has, a width of 0 included."""
    width = x.shape[-1]
    return x.numel() // width if width else x.shape[:-1].numel()


def rows_2d(x: Tensor) -> Tensor:
    """x [..., width] as [rows, width]; right for empty dimensions too, where -1 would be ambiguous."""
    # not Size.numel(): it turns a length that torch.export keeps open into a number
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def gradients(
    x_rows: Tensor, v: Tensor, u: Tensor, grad_rows: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x v^T u^T + bias`` towards x, v, u and bias, those that ``needs`` asks for.

    x_rows [rows, in] and grad_rows [rows, out]; nothing but the inputs is kept from the forward pass, the rank-sized
    intermediates are computed again. Differentiable.
    """
    need_x, need_v, need_u, need_bias = needs
    grad_x = grad_v = grad_u = None
    if need_v:
        grad_t = grad_rows @ u
        grad_x = grad_t @ v if need_x else None
        grad_v = grad_t.T @ x_rows
    elif need_x:
        # Towards x alone nobody else needs the rank-sized intermediate, and the gradient is a factorised linear
        # itself, with the factors' transposes in each other's place.
        grad_x = torch.ops.taco_kernels.low_rank_linear.default(grad_rows, u.T, v.T)
    if need_u:
        grad_u = grad_rows.T @ (x_rows @ v.T)
    return grad_x, grad_v, grad_u, grad_rows.sum(0) if need_bias else None
