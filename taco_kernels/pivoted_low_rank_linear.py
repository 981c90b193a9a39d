"""``pivoted_low_rank_linear``: a factorised linear map whose right factor is the identity on some inputs.

Factors ``u v`` of a weight are only defined up to an invertible [rank, rank] matrix. Chosen such that ``v`` is the
identity on ``rank`` of the inputs, only ``v``'s other columns need storing: ``rank (out + in - rank)`` numbers instead
of ``rank (out + in)``, always fewer than the dense weight has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from taco_kernels import direct, dispatch, native
from taco_kernels._cpu import map_of
from taco_kernels._cuda import Member
from taco_kernels._cuda import gather as gather_on_gpu
from taco_kernels._cuda import low_rank as _cuda_call
from taco_kernels._factored import require_tensors, row_count, rows_2d, turned
from taco_kernels._library import (
    FLOATS,
    any_autocast,
    below_autograd,
    computing_dtype,
    define,
    implement,
    needs_grad,
    rows_of,
    transformed,
)

__all__ = ["pivoted_low_rank_linear", "pivoted_low_rank_linear_reference"]


def pivoted_low_rank_linear_reference(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The specification: same arguments and result as :func:`pivoted_low_rank_linear`, by the full right factor.

    Computed in float32 (float64 for float64) and rounded once.
    """
    check(x, v, u, pivot, bias, residual)
    wide = computing_dtype(x.dtype)
    rank = v.shape[0]
    full = torch.zeros(rank, x.shape[-1], dtype=wide, device=x.device)
    # by index_copy_, which takes no index from behind as Python's brackets do
    full.index_copy_(1, pivot[:rank].long(), torch.eye(rank, dtype=wide, device=x.device))
    full.index_copy_(1, pivot[rank:].long(), v.to(wide))
    y = x.to(wide) @ full.T @ u.to(wide).T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def check(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    pivot: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    name: str = "pivoted_low_rank_linear",
) -> None:
    """Raises TypeError or ValueError, with ``name`` in front, where the arguments do not fit together."""
    if x is None or v is None or u is None or pivot is None:
        require_tensors(name, x=x, v=v, u=u, pivot=pivot)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: x has dtype {x.dtype}; float32, float16, bfloat16 and float64 are supported")
    for label, t in (("v", v), ("u", u), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: {label} has dtype {t.dtype}, but x has {x.dtype}; all must agree")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: {label} is on {t.device}, but x is on {x.device}; all must agree")
    if pivot.device != x.device:
        raise ValueError(f"{name}: pivot is on {pivot.device}, but x is on {x.device}; all must agree")
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


# --- backends --------------------------------------------------------------------------------------------------------


def gathered(x: Tensor, pivot: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(x[..., pivot[:rank]], x[..., pivot[rank:]]) with the leading dimensions flattened.

    Several rows on a CPU, and any on a GPU, by the extension, where it is there: on a CPU torch's gather of 16 bits
    takes ten times as long, a quarter of the whole op, and that of 32 bits twice from 16 rows on; on a GPU it is bound
    by its index arithmetic. It reads memory past torch's dispatcher, so this is for tensors that have some. Both
    results are new memory.

    Raises IndexError or RuntimeError, as torch does, for an index out of range (on a GPU it asserts).
    """
    width = x.shape[-1]
    if x.is_cuda and x.numel() and x.dtype in dispatch.CPP_DTYPES and not dispatch.why_not("cuda", "cuda"):
        both = gather_on_gpu(x, pivot)
        return both[:, :rank], both[:, rank:]
    few = {2: 1, 4: 8}.get(x.dtype.itemsize)  # rows; torch serves all of float64
    if few is None or x.numel() <= few * width or x.device.type != "cpu" or native.module is None:
        return _selected(x, pivot, rank)
    x, rows, stride = rows_of(x)
    pivot = pivot.contiguous()
    first, rest = x.new_empty((rows, rank)), x.new_empty((rows, width - rank))
    native.module.cpu_gather(
        x.data_ptr(), stride, pivot.data_ptr(), first.data_ptr(), first.stride(0), rest.data_ptr(), rest.stride(0),
        rows, width, rank, x.element_size(), pivot.dtype == torch.int64, torch.get_num_threads(),
    )  # fmt: skip
    return first, rest


def _selected(x: Tensor, pivot: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """:func:`gathered` by torch's own operation, which it differentiates and traces."""
    both = rows_2d(x.index_select(-1, pivot))
    return both[:, :rank], both[:, rank:]


def behind_pivot(x: Tensor, v: Tensor, pivot: Tensor, differentiable: bool = False) -> Tensor:
    """``x[..., pivot[:rank]] + x[..., pivot[rank:]] @ v.T`` with the leading dimensions flattened, by the library."""
    # One product: it adds the identity's share while its sums are still at hand, in place where nothing records it.
    if differentiable:
        first, rest = _selected(x, pivot, v.shape[0])
        return torch.addmm(first, rest, v.T)
    first, rest = gathered(x, pivot, v.shape[0])
    return first.addmm_(rest, v.T)


def _library(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    pivot: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    differentiable: bool = False,
) -> Tensor:
    t = behind_pivot(x, v, pivot, differentiable)
    y = F.linear(t, u, bias).view(*x.shape[:-1], u.shape[0])
    return y if residual is None else y + residual


def _cpp(x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # every index is checked there, so that no pivot can make the kernel read elsewhere
    y = x.new_empty((*x.shape[:-1], u.shape[0]))
    x, rows, stride = rows_of(x)
    pivot = pivot.contiguous()
    keep: list[Tensor] = []  # copies that must outlive the call
    v_ptr, v_stride, u_ptr, u_stride, bias_ptr, y_ptr, rank, out_features = map_of(v, u, bias, y, keep)
    residual_ptr = residual_stride = 0
    if residual is not None:
        residual, _, residual_stride = rows_of(residual)
        residual_ptr = residual.data_ptr()
    native.module.cpu_pivoted_low_rank_linear(  # type: ignore[union-attr]
        x.data_ptr(), stride, pivot.data_ptr(), pivot.dtype == torch.int64, v_ptr, v_stride, u_ptr, u_stride, bias_ptr,
        residual_ptr, residual_stride, y_ptr, rows, x.shape[-1], rank, out_features, dispatch.CPP_DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _triton(x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if not (x.numel() and v.numel() and u.numel()):
        return _library(x, v, u, pivot, bias, residual)
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear as kernel

    y = kernel(rows_2d(x), v, u, pivot, bias, None if residual is None else rows_2d(residual))
    return y.view(*x.shape[:-1], u.shape[0])


def _cuda(x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if not (x.numel() and v.numel() and u.numel()):
        return _library(x, v, u, pivot, bias, residual)
    return _cuda_call(x, [Member(v, u, bias, pivot)], residual)[0]


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": pivoted_low_rank_linear_reference,
    "library": _library,
    "cpp": _cpp,
    "triton": _triton,
    "cuda": _cuda,
}


# --- registered op, fake, autograd -----------------------------------------------------------------------------------

_SCHEMA = "(Tensor x, Tensor v, Tensor u, Tensor pivot, Tensor? bias=None, Tensor? residual=None) -> Tensor"
_op = define("pivoted_low_rank_linear", _SCHEMA)
_direct = direct.entry("pivoted_low_rank_linear", dispatch.pivoted_rows)


def _compute(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    check(x, v, u, pivot, bias, residual)
    rows = row_count(x)
    device = x.device.type
    shape = None if device == "cpu" else ("pivoted_low_rank_linear", x.shape[-1], u.shape[0], v.shape[0])
    chosen = dispatch.choose(device, x.dtype, rows, turned(v) or turned(u), shape, v.shape[0], dispatch.pivoted_rows)
    # Behind a pivot Triton has kernels for few rows only.
    backend = "library" if chosen == "triton" and rows > dispatch.TRITON_MAX_ROWS else chosen
    y = BACKENDS[backend](x, v, u, pivot, bias, residual)
    if device == "cuda":
        direct.served("pivoted_low_rank_linear", backend, x, v, u, pivot, bias, residual)
    return y


def _compute_or_direct(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    # for compiled code that calls this op and not its native twin
    y = _direct(x, v, u, pivot, bias, residual)
    if y is not None:
        return _library(x, v, u, pivot, bias, residual) if y is False else y
    return _compute(x, v, u, pivot, bias, residual)


def _fake(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    check(x, v, u, pivot, bias, residual)
    return x.new_empty((*x.shape[:-1], u.shape[0]))


def _by_torch(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    # torch differentiates its own operations; training is bound by large products, not by launches
    check(x, v, u, pivot, bias, residual)
    return _library(x, v, u, pivot, bias, residual, differentiable=True)


def _autograd(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    if needs_grad(x, v, u, bias, residual) or transformed():
        return _by_torch(x, v, u, pivot, bias, residual)
    with below_autograd():
        return _op(x, v, u, pivot, bias, residual)


implement("pivoted_low_rank_linear", compute=_compute_or_direct, fake=_fake, autograd=_autograd, by_torch=_by_torch)
_native = direct.native_op("pivoted_low_rank_linear", _SCHEMA, _op, _fake)


# --- public function -------------------------------------------------------------------------------------------------


def pivoted_low_rank_linear(
    x: Tensor, v: Tensor, u: Tensor, pivot: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``(x[pivot[:rank]] + x[pivot[rank:]] v^T) u^T + bias + residual`` along the last dimension of ``x``.

    Args:
        x: [..., in], float32, float16, bfloat16 or float64, any strides.
        v: [rank, in - rank]: the right factor's columns for the inputs ``pivot[rank:]``; on the inputs
            ``pivot[:rank]`` it is the identity.
        u: [out, rank].
        pivot: [in], int32 or int64, a permutation of 0..in-1.
        bias: [out], optional.
        residual: [..., out], optional.

    Returns:
        [..., out], contiguous, of ``x``'s dtype. All tensors but ``pivot`` share it. Differentiable in every floating
        argument. The backends ``cpp``, ``triton`` and ``cuda`` keep the rank-sized intermediate in float32 or, on
        matrix units, as two numbers of the dtype; ``library`` rounds it to the dtype (``cpp`` too for many rows; see
        :func:`low_rank_linear` for both).

    Raises:
        TypeError: a dtype that is not supported, or tensors of different dtypes.
        ValueError: shapes or devices that do not fit together.
        IndexError or RuntimeError: an index of the pivot that is out of range; a GPU asserts or reads zero instead.
        RuntimeError: a backend was forced (``TACO_BACKEND``) that cannot serve this call.

    Source: interpolative decomposition (Cheng, Gimbutas, Martinsson, Rokhlin 2005) of the right factor.
    """
    if torch.compiler.is_compiling():
        native_suits = direct.suits_native("pivoted_low_rank_linear", x, v, u, bias, residual)
        return _native(x, v, u, pivot, bias, residual) if native_suits else _op(x, v, u, pivot, bias, residual)
    y = _direct(x, v, u, pivot, bias, residual)
    if y is not None:
        return _library(x, v, u, pivot, bias, residual) if y is False else y
    if any_autocast() or needs_grad(x, v, u, bias, residual) or transformed():
        return _op(x, v, u, pivot, bias, residual)
    with below_autograd():
        return _op(x, v, u, pivot, bias, residual)
