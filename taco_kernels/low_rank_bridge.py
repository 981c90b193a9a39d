"""``low_rank_bridge``: the residual map that stands in for a run of removed layers.

Read top to bottom: reference -> calls into the backends -> registered op, fake, autograd -> public function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taco_kernels import direct, dispatch, native
from taco_kernels._cuda import Member
from taco_kernels._cuda import low_rank as _cuda_call
from taco_kernels._factored import complain, fits, gradients, require_tensors, row_count, rows_2d, turned
from taco_kernels._library import (
    apply_function,
    below_autograd,
    computing_dtype,
    define,
    implement,
    needs_grad,
    rows_of,
    seen_as_op,
    transformed,
)

__all__ = ["low_rank_bridge", "low_rank_bridge_reference"]


# --- reference -------------------------------------------------------------------------------------------------------


def low_rank_bridge_reference(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The specification: same arguments and result as :func:`low_rank_bridge`, in plain torch.

    Everything, the norm and the rank-sized intermediate included, is computed in float32 (float64 for float64) and
    rounded once.
    """
    wide = computing_dtype(h.dtype)
    rows = rows_2d(h).to(wide)
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    y = normed @ v.to(wide).T @ u.to(wide).T
    y = y + rows
    if bias is not None:
        y = y + bias
    return y.to(h.dtype).view(h.shape)


# --- backends --------------------------------------------------------------------------------------------------------


def _library(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    rows = rows_2d(h)
    if h.shape[-1] == 0:
        return rows.clone().view(h.shape)
    wide = computing_dtype(h.dtype)
    if h.dtype == torch.float16:
        # what is not normalised yet may leave the range after the first product
        normed = F.rms_norm(rows.to(wide), (h.shape[-1],), eps=eps).to(h.dtype)
        return F.linear(F.linear(normed, v), u, bias).add_(rows).view(h.shape)
    # The scale goes behind the first product: no normalised copy of h is written, and none of it in float32, whose
    # fresh pages alone take longer than both products of a small rank.
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    return F.linear(F.linear(rows, v).mul_(scale), u, bias).add_(rows).view(h.shape)


def _cpp(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = h.new_empty(h.shape)
    h, rows, h_stride = rows_of(h)
    if v.stride(1) != 1:
        v = v.contiguous()
    if u.stride(1) != 1:
        u = u.contiguous()
    bias_ptr = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_ptr = bias.data_ptr()
    # The names above keep every temporary copy alive until the kernel has returned.
    native.module.cpu_low_rank_bridge(  # type: ignore[union-attr]
        h.data_ptr(), h_stride, v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), bias_ptr, y.data_ptr(),
        rows, h.shape[-1], v.shape[0], eps, dispatch.CPP_DTYPES[h.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _triton(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.low_rank_bridge import low_rank_bridge as kernel

    flat = rows_2d(h)
    return kernel(flat, v, u, bias, eps).view(h.shape)


def _cuda(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if not (h.numel() and v.numel()):
        return low_rank_bridge_reference(h, v, u, bias, eps)
    return _cuda_call(h, [Member(v, u, bias)], h, eps)[0]


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "reference": low_rank_bridge_reference,
    "library": _library,
    "cpp": _cpp,
    "triton": _triton,
    "cuda": _cuda,
}


def _check(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> None:
    # One quick expression on the hot path; the slow functions write the message.
    if not (fits(h, v, u, bias) and u.shape[0] == h.shape[-1]):
        require_tensors("low_rank_bridge", h=h, v=v, u=u)
        bias = bias if u.shape[:1] == h.shape[-1:] else None  # or it would be called wrong for u's fault
        complain("low_rank_bridge", h, v, u, bias, x_name="h", in_name="hidden", out_name="hidden")
        raise ValueError(f"low_rank_bridge: u {tuple(u.shape)} must be [hidden, rank] = {(h.shape[-1], v.shape[0])}")


# --- registered op, fake, autograd -----------------------------------------------------------------------------------

_SCHEMA = "(Tensor h, Tensor v, Tensor u, Tensor? bias=None, float eps=1e-06) -> Tensor"
_op = define("low_rank_bridge", _SCHEMA)
_direct = direct.entry("low_rank_bridge", dispatch.cpu_rows)


def _compute(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    _check(h, v, u, bias)
    rows = row_count(h)
    device = h.device.type
    shape = None if device == "cpu" else ("low_rank_bridge", h.shape[-1], h.shape[-1], v.shape[0])
    backend = dispatch.choose(device, h.dtype, rows, turned(v) or turned(u), shape, v.shape[0])
    y = _BACKENDS[backend](h, v, u, bias, eps)
    if device == "cuda":
        direct.served("low_rank_bridge", backend, h, v, u, bias, eps)
    return y


def _compute_or_direct(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = _direct(h, v, u, bias, eps)  # for compiled code that calls this op and not its native twin
    if y is not None:
        return _library(h, v, u, bias, eps) if y is False else y
    return _compute(h, v, u, bias, eps)


def _fake(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    _check(h, v, u, bias)
    return h.new_empty(h.shape)


class _LowRankBridge(torch.autograd.Function):
    """Saves only the op's inputs: norm and rank-sized intermediate are cheaper to compute again than to keep."""

    @staticmethod
    def forward(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        with below_autograd():
            return _op(h, v, u, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.eps = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, v, u = ctx.saved_tensors
        need_h, need_v, need_u, need_bias, _ = ctx.needs_input_grad
        # The norm's part in float32, like the forward pass; the products in the tensors' own dtype.
        wide = computing_dtype(h.dtype)
        grad_rows = rows_2d(grad)
        rows = rows_2d(h).to(wide)
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + ctx.eps)
        normed = rows * scale
        grad_h, *others = gradients(normed.to(h.dtype), v, u, grad_rows, (need_h, need_v, need_u, need_bias))
        if grad_h is not None:
            # d/dh of n = h s, s = (mean h^2 + eps)^-1/2:  dh = s (dn - n mean(n dn))
            grad_normed = grad_h.to(wide)
            inner = (normed * grad_normed).mean(-1, keepdim=True)
            grad_h = (grad_rows.to(wide) + scale * (grad_normed - normed * inner)).to(h.dtype).view(h.shape)
        return grad_h, *others, None


def _by_torch(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    _check(h, v, u, bias)
    return low_rank_bridge_reference(h, v, u, bias, eps)


def _autograd(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    if transformed():
        return _by_torch(h, v, u, bias, eps)
    if needs_grad(h, v, u, bias):
        return apply_function(_LowRankBridge, h, v, u, bias, eps)
    with below_autograd():
        return _op(h, v, u, bias, eps)


implement("low_rank_bridge", compute=_compute_or_direct, fake=_fake, autograd=_autograd, by_torch=_by_torch)
_native = direct.native_op("low_rank_bridge", _SCHEMA, _op, _fake)


# --- public function -------------------------------------------------------------------------------------------------


def low_rank_bridge(h: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``h + rmsnorm(h) @ v.T @ u.T + bias`` with ``rmsnorm(h) = h / sqrt(mean(h^2) + eps)``, without a weight.

    A norm's weight is folded into ``v`` (``v * weight``), which changes nothing but saves a read.

    Args:
        h: [..., hidden], the hidden states, any strides.
        v: [rank, hidden], the right factor.
        u: [hidden, rank], the left factor.
        bias: [hidden], optional.
        eps: added to the mean square.

    Returns:
        [..., hidden], contiguous, of ``h``'s dtype; a new tensor, never ``h`` itself.

    dtypes, rounding, reproducibility, gradients and errors are those of :func:`taco_kernels.low_rank_linear`.

    Source: RMSNorm without gain (arXiv:1910.07467, equation 4), and a reduced-rank regression of the removed layers'
    joint residual on it; the map is this project's own.
    """
    if torch.compiler.is_compiling():
        native_suits = direct.suits_native("low_rank_bridge", h, v, u, bias)
        return _native(h, v, u, bias, eps) if native_suits else _op(h, v, u, bias, eps)
    y = _direct(h, v, u, bias, eps)
    if y is not None:
        return _library(h, v, u, bias, eps) if y is False else y
    if transformed():  # transforms are met in the op's dispatch
        return _op(h, v, u, bias, eps)
    if needs_grad(h, v, u, bias):
        return _op(h, v, u, bias, eps) if seen_as_op() else apply_function(_LowRankBridge, h, v, u, bias, eps)
    with below_autograd():
        return _op(h, v, u, bias, eps)
