"""``low_rank_linear``: a linear layer whose weight is the product of two thin factors, ``W = u @ v``.

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
from taco_kernels._factored import complain, fits, gradients, row_count, rows_2d, turned
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

__all__ = ["low_rank_linear", "low_rank_linear_reference"]


# --- reference -------------------------------------------------------------------------------------------------------


def low_rank_linear_reference(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The specification: same arguments and result as :func:`low_rank_linear`, in plain torch.

    Everything, the rank-sized intermediate included, is computed in float32 (float64 for float64) and rounded once.
    """
    wide = computing_dtype(x.dtype)
    y = rows_2d(x).to(wide) @ v.to(wide).T @ u.to(wide).T
    y = y.view(*x.shape[:-1], u.shape[0])
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


# --- backends --------------------------------------------------------------------------------------------------------


def _library(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # Rounds the rank-sized intermediate to x's dtype, as any pair of library calls does.
    # Views to two dimensions and back, from here, would cost 40 us where the caches hold weights instead of code.
    y = F.linear(F.linear(x, v), u, bias)
    return y if residual is None else y.add_(residual)


def _cpp(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    out_features, rank = u.shape
    y = x.new_empty((*x.shape[:-1], out_features))
    x, rows, x_stride = rows_of(x)
    if v.stride(1) != 1:
        v = v.contiguous()
    if u.stride(1) != 1:
        u = u.contiguous()
    bias_ptr = residual_ptr = residual_stride = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_ptr = bias.data_ptr()
    if residual is not None:
        residual, _, residual_stride = rows_of(residual)
        residual_ptr = residual.data_ptr()
    # The names above keep every temporary copy alive until the kernel has returned.
    native.module.cpu_low_rank_linear(  # type: ignore[union-attr]
        x.data_ptr(), x_stride, v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), bias_ptr, residual_ptr,
        residual_stride, y.data_ptr(), rows, x.shape[-1], rank, out_features, dispatch.CPP_DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _triton(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.low_rank_linear import low_rank_linear as kernel

    flat = rows_2d(x)
    rest = None if residual is None else residual.reshape(flat.shape[0], residual.shape[-1])
    return kernel(flat, v, u, bias, rest).view(*x.shape[:-1], u.shape[0])


def _cuda(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # A sum over nothing has no kernel: the reference gives bias and residual.
    if not (x.numel() and u.numel()):
        return low_rank_linear_reference(x, v, u, bias, residual)
    return _cuda_call(x, [Member(v, u, bias)], residual)[0]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "reference": low_rank_linear_reference,
    "library": _library,
    "cpp": _cpp,
    "triton": _triton,
    "cuda": _cuda,
}


def _check(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    # One quick expression on the hot path; the slow functions write the message.
    if not (
        fits(x, v, u, bias)
        and (
            residual is None
            or (
                residual.shape == (*x.shape[:-1], u.shape[0])
                and residual.dtype == x.dtype
                and residual.device == x.device
            )
        )
    ):
        complain("low_rank_linear", x, v, u, bias, others={"residual": residual})
        shape = () if residual is None else tuple(residual.shape)
        raise ValueError(f"low_rank_linear: residual {shape} must be [..., out] = {(*x.shape[:-1], u.shape[0])}")


# --- registered op, fake, autograd -----------------------------------------------------------------------------------

_SCHEMA = "(Tensor x, Tensor v, Tensor u, Tensor? bias=None, Tensor? residual=None) -> Tensor"
_op = define("low_rank_linear", _SCHEMA)
_direct = direct.entry("low_rank_linear", dispatch.cpu_rows)


def _compute(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    _check(x, v, u, bias, residual)
    rows = row_count(x)
    device = x.device.type
    shape = None if device == "cpu" else ("low_rank_linear", x.shape[-1], u.shape[0], v.shape[0])
    backend = dispatch.choose(device, x.dtype, rows, turned(v) or turned(u), shape, v.shape[0])
    y = BACKENDS[backend](x, v, u, bias, residual)
    if device == "cuda":
        direct.served("low_rank_linear", backend, x, v, u, bias, residual)
    return y


def _compute_or_direct(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    y = _direct(x, v, u, bias, residual)  # for compiled code that calls this op and not its native twin
    if y is not None:
        return _library(x, v, u, bias, residual) if y is False else y
    return _compute(x, v, u, bias, residual)


def _fake(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    _check(x, v, u, bias, residual)
    return x.new_empty((*x.shape[:-1], u.shape[0]))


class _LowRankLinear(torch.autograd.Function):
    """Saves only the op's inputs: the rank-sized intermediate is cheaper to compute again than to keep."""

    @staticmethod
    def forward(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        with below_autograd():
            return _op(x, v, u, bias, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u = ctx.saved_tensors
        *needs, need_residual = ctx.needs_input_grad
        grad_x, *others = gradients(rows_2d(x), v, u, rows_2d(grad), tuple(needs))
        return None if grad_x is None else grad_x.view(x.shape), *others, grad if need_residual else None


def _by_torch(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    _check(x, v, u, bias, residual)
    return low_rank_linear_reference(x, v, u, bias, residual)


def _autograd(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    if transformed():
        return _by_torch(x, v, u, bias, residual)
    if needs_grad(x, v, u, bias, residual):
        return apply_function(_LowRankLinear, x, v, u, bias, residual)
    with below_autograd():
        return _op(x, v, u, bias, residual)


implement("low_rank_linear", compute=_compute_or_direct, fake=_fake, autograd=_autograd, by_torch=_by_torch)
_native = direct.native_op("low_rank_linear", _SCHEMA, _op, _fake)


# --- public function -------------------------------------------------------------------------------------------------


def low_rank_linear(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``x @ v.T @ u.T + bias + residual``: a linear layer of weight ``u @ v`` without ever forming it.

    Args:
        x: [..., in], any strides.
        v: [rank, in], the right factor.
        u: [out, rank], the left factor.
        bias: [out], optional.
        residual: [..., out], added to the result, optional.

    Returns:
        [..., out], contiguous, of ``x``'s dtype.

    All tensors share one device and one dtype of float32, float16, bfloat16 (accumulated in float32) or float64.
    The backends ``reference``, ``cpp`` and ``cuda`` keep the rank-sized intermediate ``x @ v.T`` in float32 and round
    once, at the end; ``library`` rounds the intermediate to the dtype as well, and so do ``triton`` for more than 16
    rows, or fewer of a small rank, and ``cpp`` for more than 4 rows of bfloat16 where the CPU multiplies them
    (AVX-512-BF16). Where a GPU's matrix units multiply few rows (``cuda`` if 16-bit rows are multiples of 16 bytes;
    ``triton`` otherwise), the intermediate is the sum of two numbers of the dtype: twice its precision, but float16 is
    infinite beyond 131008, where float32 is not. The same input gives the same bits on every call with the same backend
    and thread count. Differentiable in every tensor argument, any number of times; forward-mode derivatives and
    ``torch.func``'s transforms are computed by plain torch operations, whatever backend is forced.

    Raises:
        TypeError: a dtype that is not supported, or tensors of different dtypes.
        ValueError: shapes or devices that do not fit together.
        RuntimeError: a backend was forced (``TACO_BACKEND``) that cannot serve this call.

    Source: truncated SVD of a linear layer as in Taco-SVD (arXiv:2501.00339, equation 2) with both factors kept.
    """
    if torch.compiler.is_compiling():
        native_suits = direct.suits_native("low_rank_linear", x, v, u, bias, residual)
        return _native(x, v, u, bias, residual) if native_suits else _op(x, v, u, bias, residual)
    y = _direct(x, v, u, bias, residual)
    if y is not None:
        return _library(x, v, u, bias, residual) if y is False else y
    if transformed():  # transforms are met in the op's dispatch
        return _op(x, v, u, bias, residual)
    if needs_grad(x, v, u, bias, residual):
        return _op(x, v, u, bias, residual) if seen_as_op() else apply_function(_LowRankLinear, x, v, u, bias, residual)
    with below_autograd():
        return _op(x, v, u, bias, residual)
