"""``low_rank_linear_int8``: a factorised linear map whose factors are 8-bit integers, with a scale for each direction.

Few rows wait for the factors' bytes, and these are half of what 16-bit factors have. A singular direction k is a row of
``v`` and a column of ``u``; each of the two has one scale, so that all scales act on the rank-sized intermediate and no
weight has to be scaled on its way. Activations stay as they are (weight-only quantisation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taco_kernels import dispatch, native
from taco_kernels._factored import require_tensors, row_count, rows_2d
from taco_kernels._library import (
    FLOATS,
    any_autocast,
    apply_function,
    below_autograd,
    computing_dtype,
    define,
    implement,
    library,
    needs_grad,
    rows_of,
    seen_as_op,
    transformed,
)
from taco_kernels.low_rank_linear import low_rank_linear
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear

__all__ = ["dequantise", "low_rank_linear_int8", "low_rank_linear_int8_reference", "quantise_rows"]

NAME = "low_rank_linear_int8"
MOST_ROWS = 96
LARGEST = 127
"""Of the integers: -128 is not used, so that signs are alike"""
_PLAIN = (Tensor, torch.nn.Parameter)


# --- the format ------------------------------------------------------------------------------------------------------


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as integers of at most `LARGEST` in size, and its scale: ``rows ~ integers * scales[:, None]``.

    Args:
        rows: [directions, n], floating: a right factor, or a left one transposed (turn its integers back with
            ``.T.contiguous()``: kernels read rows).

    Returns:
        int8 [directions, n], and float32 [directions] that bfloat16 holds exactly (a model is cast as a whole). Every
        element is at most half a scale off. A row of zeros has scale 0.

    Raises:
        ValueError: rows that are not finite.
    """
    wide = rows.detach().float()
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    if not bool(largest.isfinite().all()):
        raise ValueError("factors that are not finite cannot be quantised")
    scales = (largest / LARGEST).bfloat16().float()
    # rounded up, or the largest element would not fit
    above = torch.nextafter(scales.bfloat16(), scales.bfloat16().new_full((), float("inf"))).float()
    scales = torch.where(scales * LARGEST < largest, above, scales)
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    integers = (wide / divisors[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return integers, scales


def dequantise(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``integers * scales``, each element rounded to ``dtype`` once: `quantise_rows` undone.

    Args:
        integers: int8 [m, n].
        scales: float32 [m, 1] or [n].
    """
    if _unpacks(integers, scales, dtype):
        made = torch.empty(integers.shape, dtype=dtype, device=integers.device)
        flat = scales.reshape(-1).contiguous()  # names keep copies alive for the call
        native.module.cpu_unpack_int8(  # type: ignore[union-attr]
            integers.data_ptr(), integers.stride(0), *integers.shape, flat.data_ptr(), scales.dim() == 2,
            made.data_ptr(), made.stride(0), dispatch.CPP_DTYPES[dtype], torch.get_num_threads(),
        )  # fmt: skip
        return made
    wide = computing_dtype(dtype)
    return (integers.to(wide) * scales.to(wide)).to(dtype)


def _unpacks(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are addresses to unpack from: none in what is traced or transformed."""
    return (
        native.module is not None
        and dispatch.get_backend() not in ("reference", "library")
        and type(integers) in _PLAIN
        and type(scales) in _PLAIN
        and integers.device.type == "cpu"
        and dtype in dispatch.CPP_DTYPES
        and integers.stride(1) == 1
        and not torch.compiler.is_compiling()
        and not transformed()
        and not torch._C._len_torch_dispatch_stack()
    )


# --- reference and backends ------------------------------------------------------------------------------------------


def low_rank_linear_int8_reference(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None = None,
    pivot: Tensor | None = None,
) -> Tensor:
    """The specification: same arguments and result as :func:`low_rank_linear_int8`.

    Computed in float32 (float64 for float64) and rounded once.
    """
    check(x, v, v_scale, u, u_scale, bias, pivot)
    wide = computing_dtype(x.dtype)
    rank, inputs = v.shape[0], x.to(wide)
    if pivot is None:
        t = (inputs @ v.to(wide).T) * v_scale.to(wide)
    else:
        behind = (inputs.index_select(-1, pivot[rank:]) @ v.to(wide).T) * v_scale.to(wide)
        t = inputs.index_select(-1, pivot[:rank]) + behind
    y = (t * u_scale.to(wide)) @ u.to(wide).T
    return (y if bias is None else y + bias).to(x.dtype)


def check(
    x: Tensor, v: Tensor, v_scale: Tensor, u: Tensor, u_scale: Tensor, bias: Tensor | None, pivot: Tensor | None
) -> None:
    """Raises TypeError or ValueError where the arguments do not fit together."""
    require_tensors(NAME, x=x, v=v, v_scale=v_scale, u=u, u_scale=u_scale)
    if x.dtype not in FLOATS:
        raise TypeError(f"{NAME}: x has dtype {x.dtype}; float32, float16, bfloat16 and float64 are supported")
    for label, t, dtypes in (
        ("v", v, (torch.int8,)),
        ("u", u, (torch.int8,)),
        ("v_scale", v_scale, (torch.float32,)),
        ("u_scale", u_scale, (torch.float32,)),
        ("bias", bias, (x.dtype,)),
        ("pivot", pivot, (torch.int32, torch.int64)),
    ):
        if t is not None and t.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{NAME}: {label} has dtype {t.dtype}; {wanted} is needed")
        if t is not None and t.device != x.device:
            raise ValueError(f"{NAME}: {label} is on {t.device}, but x is on {x.device}; all must agree")
    if x.dim() < 1 or v.dim() != 2 or u.dim() != 2:
        raise ValueError(f"{NAME}: x must be [..., in], v and u 2-D")
    rank, width = v.shape[0], x.shape[-1]
    columns = width if pivot is None else width - rank
    if v.shape[1] != columns:
        wanted = "[rank, in]" if pivot is None else "[rank, in - rank]"
        raise ValueError(
            f"{NAME}: v {tuple(v.shape)} must be {wanted} with in = {width}, the last dimension of x {tuple(x.shape)}"
        )
    if u.shape[1] != rank:
        raise ValueError(f"{NAME}: u {tuple(u.shape)} must be [out, rank] with rank = {rank}")
    for label, t, length in (
        ("v_scale", v_scale, rank),
        ("u_scale", u_scale, rank),
        ("bias", bias, u.shape[0]),
        ("pivot", pivot, width),
    ):
        if t is not None and t.shape != (length,):
            raise ValueError(f"{NAME}: {label} {tuple(t.shape)} must be ({length},)")


def _by_factors(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None,
    pivot: Tensor | None,
) -> Tensor:
    """By the ops of floating factors, which choose their own backend.

    For many rows, which do not wait for bytes: the factors are written out for the time of the call.
    """
    left, right = dequantise(u, u_scale, x.dtype), dequantise(v, v_scale[:, None], x.dtype)
    if pivot is None:
        return low_rank_linear(x, right, left, bias)
    return pivoted_low_rank_linear(x, right, left, pivot, bias)


def _cpp(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None,
    pivot: Tensor | None,
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], u.shape[0]))
    x, rows, stride = rows_of(x)
    v, u = (factor if factor.stride(1) == 1 else factor.contiguous() for factor in (v, u))
    # names keep copies alive for the call
    v_scale, u_scale = v_scale.contiguous(), u_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    pivot = None if pivot is None else pivot.contiguous()
    native.module.cpu_low_rank_int8(  # type: ignore[union-attr]
        x.data_ptr(), stride, 0 if pivot is None else pivot.data_ptr(),
        pivot is not None and pivot.dtype == torch.int64, v.data_ptr(), v.stride(0), v_scale.data_ptr(), u.data_ptr(),
        u.stride(0), u_scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, x.shape[-1],
        v.shape[0], u.shape[0], dispatch.CPP_DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _triton(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None,
    pivot: Tensor | None,
) -> Tensor:
    if not (x.numel() and v.numel() and u.numel()):
        return _by_factors(x, v, v_scale, u, u_scale, bias, pivot)
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.low_rank_linear_int8 import low_rank_linear_int8 as kernel

    return kernel(rows_2d(x), v, v_scale, u, u_scale, bias, pivot).view(*x.shape[:-1], u.shape[0])


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": low_rank_linear_int8_reference,
    "library": _by_factors,
    "cpp": _cpp,
    "triton": _triton,
}


def int8_rows(dtype: torch.dtype) -> dispatch.RowLimits:
    """Up to how many rows the kernels for 8-bit factors serve on a CPU.

    They unpack the weights anew for every 64 rows; beyond, to write them out once for all costs less (two Zen 4 cores,
    4096 x 11008, rank 1024: 2 ms, where unpacking takes 1 ms for 64 rows).
    """
    most = MOST_ROWS if dispatch.multiplies_many_rows(dtype) else min(MOST_ROWS, dispatch.CPU_MAX_ROWS[dtype])
    return ((0, most, dispatch.ANY),)


def _choose(x: Tensor, rows: int, rank: int) -> str:
    """The backend for one call; there is no kernel of ours in CUDA, and Triton's are for few rows."""
    chosen = dispatch.choose(x.device.type, x.dtype, rows, False, None, rank, int8_rows)
    if chosen == "cuda":
        if dispatch.get_backend() is not None:
            raise RuntimeError("cuda: has no kernel for 8-bit factors; triton has")
        chosen = "library" if dispatch.why_not("triton", "cuda") else "triton"
    return "library" if chosen == "triton" and rows > dispatch.TRITON_MAX_ROWS else chosen


_INDICES = (torch.int32, torch.int64)
# Rows up to which the C++ kernels serve a dtype
_SERVED = {dtype: int8_rows(dtype)[0][1] for dtype in dispatch.CPP_DTYPES} if native.module is not None else {}


# --- registered op, fake, autograd, autocast -------------------------------------------------------------------------

_SCHEMA = (
    "(Tensor x, Tensor v, Tensor v_scale, Tensor u, Tensor u_scale, Tensor? bias=None, Tensor? pivot=None) -> Tensor"
)
_op = define(NAME, _SCHEMA)


def _compute(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None = None,
    pivot: Tensor | None = None,
) -> Tensor:
    check(x, v, v_scale, u, u_scale, bias, pivot)
    rows = row_count(x)
    backend = _choose(x, rows, v.shape[0])
    return BACKENDS[backend](x, v, v_scale, u, u_scale, bias, pivot)


def _fake(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None = None,
    pivot: Tensor | None = None,
) -> Tensor:
    check(x, v, v_scale, u, u_scale, bias, pivot)
    return x.new_empty((*x.shape[:-1], u.shape[0]))


class _Int8LowRankLinear(torch.autograd.Function):
    """Saves the integers, and writes the factors out again on the way back: a model's are all alive until then."""

    @staticmethod
    def forward(
        x: Tensor, v: Tensor, v_scale: Tensor, u: Tensor, u_scale: Tensor, bias: Tensor | None, pivot: Tensor | None
    ) -> Tensor:
        with below_autograd():
            return _op(x, v, v_scale, u, u_scale, bias, pivot)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5], inputs[6])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, v_scale, u, u_scale, pivot = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            inner = grad @ dequantise(u, u_scale, grad.dtype)
            grad_x = inner @ dequantise(v, v_scale[:, None], grad.dtype)
            if pivot is not None:
                grad_x = torch.cat([inner, grad_x], -1).index_select(-1, pivot.argsort())
        if ctx.needs_input_grad[5]:
            grad_bias = rows_2d(grad).sum(0)
        return grad_x, None, None, None, None, grad_bias, None


def _autograd(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None = None,
    pivot: Tensor | None = None,
) -> Tensor:
    if transformed():
        return low_rank_linear_int8_reference(x, v, v_scale, u, u_scale, bias, pivot)
    if needs_grad(x, bias):
        return apply_function(_Int8LowRankLinear, x, v, v_scale, u, u_scale, bias, pivot)
    with below_autograd():
        return _op(x, v, v_scale, u, u_scale, bias, pivot)


implement(NAME, compute=_compute, fake=_fake, autograd=_autograd)


def _register_autocast(device_type: str, key: str) -> None:
    """Activations and bias are cast, as a linear's are; scales are part of the format and stay."""
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(x: Any, v: Any, v_scale: Any, u: Any, u_scale: Any, bias: Any = None, pivot: Any = None) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        x, bias = (t.to(dtype) if t is not None and t.dtype in FLOATS[:3] else t for t in (x, bias))
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return _op(x, v, v_scale, u, u_scale, bias, pivot)

    library.impl(NAME, cast_and_call, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
library.impl(NAME, low_rank_linear_int8_reference, "FuncTorchBatched")


# --- public function -------------------------------------------------------------------------------------------------


def low_rank_linear_int8(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None = None,
    pivot: Tensor | None = None,
) -> Tensor:
    """``((x v^T * v_scale) * u_scale) u^T + bias`` along the last dimension of ``x``, with factors of 8-bit integers.

    With a pivot the identity's share is added where it belongs:
    ``((x[pivot[:rank]] + x[pivot[rank:]] v^T * v_scale) * u_scale) u^T + bias``.

    Args:
        x: [..., in], float32, float16, bfloat16 or float64, any strides.
        v: [rank, in] int8, or [rank, in - rank] with a pivot (see :func:`taco_kernels.pivoted_low_rank_linear`).
        v_scale: [rank] float32.
        u: [out, rank] int8.
        u_scale: [rank] float32.
        bias: [out] of ``x``'s dtype, optional.
        pivot: [in], int32 or int64, a permutation of 0..in-1, optional.

    Returns:
        [..., out] of ``x``'s dtype. Differentiable in ``x`` and ``bias``. The backend ``cpp`` computes up to eight rows
        in float32 and rounds once; of more it writes the factors out in ``x``'s dtype, each element rounded, a panel at
        a time, and is what it is in :func:`taco_kernels.low_rank_linear` from then on. So is ``library``, with all of
        them written out. ``triton`` serves up to 16 rows, the intermediate as two numbers of the dtype.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit together.
        IndexError or RuntimeError: an index of the pivot out of range; a backend was forced that cannot serve the call.

    Source: symmetric quantisation to 8 bits by the largest entry of a row (LLM.int8(), arXiv:2208.07339, section 2),
    here of each singular direction of both factors; that all scales act on the intermediate is this project's own.
    """
    if torch.compiler.is_compiling() or any_autocast() or transformed():
        return _op(x, v, v_scale, u, u_scale, bias, pivot)
    if needs_grad(x, bias):
        arguments = (x, v, v_scale, u, u_scale, bias, pivot)
        return _op(*arguments) if seen_as_op() else apply_function(_Int8LowRankLinear, *arguments)
    if _is_plain(x, v, v_scale, u, u_scale, bias, pivot):
        return _cpp(x, v, v_scale, u, u_scale, bias, pivot)
    with below_autograd():
        return _op(x, v, v_scale, u, u_scale, bias, pivot)


def _is_plain(
    x: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    bias: Tensor | None,
    pivot: Tensor | None,
) -> bool:
    """Whether a call is one that the C++ kernels serve and nobody else has to see: then it need not go through torch's
    dispatcher, which takes half of a small call's time. What is not plain goes there, and has its errors from there."""
    try:
        if not (x.is_cpu and type(x) in _PLAIN and x.dtype in _SERVED and dispatch.get_backend() is None):
            return False
        rank, width = v.shape[0], x.shape[-1]
        rows = x.numel() // width if width else 0
        return (
            0 < rows <= _SERVED[x.dtype]
            and v.dtype is u.dtype is torch.int8
            and v_scale.dtype is u_scale.dtype is torch.float32
            and v.shape == (rank, width if pivot is None else width - rank)
            and u.shape[1] == rank
            and u.dim() == 2
            and v_scale.shape == u_scale.shape == (rank,)
            and v.is_cpu
            and u.is_cpu
            and v_scale.is_cpu
            and u_scale.is_cpu
            and type(v) in _PLAIN
            and type(u) in _PLAIN
            and (bias is None or (bias.is_cpu and bias.dtype is x.dtype and bias.shape == u.shape[:1]))
            and (pivot is None or (pivot.is_cpu and pivot.dtype in _INDICES and pivot.shape == (width,)))
            # of a single element a lazily negated view is contiguous, and its address that of the positive number
            and not (x.is_neg() or v_scale.is_neg() or u_scale.is_neg() or (bias is not None and bias.is_neg()))
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and torch._C._get_tracing_state() is None
            and not torch._C._autograd._profiler_enabled()
        )
    except (AttributeError, IndexError):  # no tensors, or of too few dimensions
        return False
