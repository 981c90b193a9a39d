"""``low_rank_linear_group``: several factorised linears of one input (q, k and v; gate and up) as one op.

Read top to bottom: reference -> calls into the backends -> registered op, fake, autograd -> public function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taco_kernels import direct, dispatch, native
from taco_kernels._cpu import map_of
from taco_kernels._cuda import Member
from taco_kernels._cuda import low_rank as _cuda_call
from taco_kernels._factored import complain, fits, gradients, row_count, rows_2d, turned
from taco_kernels._library import (
    any_autocast,
    apply_function,
    below_autograd,
    define,
    implement,
    needs_grad,
    rows_of,
    transformed,
)
from taco_kernels.low_rank_linear import low_rank_linear, low_rank_linear_reference

__all__ = ["low_rank_linear_group", "low_rank_linear_group_reference"]


# --- reference -------------------------------------------------------------------------------------------------------


def low_rank_linear_group_reference(
    x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """The specification: each member is :func:`low_rank_linear_reference` of the same ``x``."""
    return [low_rank_linear_reference(x, *member) for member in zip(vs, us, biases, strict=True)]


# --- backends --------------------------------------------------------------------------------------------------------

_Backend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence["Tensor | None"]], list[Tensor]]


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix that ``parts`` are consecutive slices of rows of, as a view; None where they are no such thing."""
    first = parts[0]
    stride, width = first.stride(0), first.shape[1]
    if first.stride(1) != 1 or not stride:
        return None
    expected = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if (
            part.stride() != (stride, 1)
            or part.data_ptr() != expected
            or part.untyped_storage().data_ptr() != storage
            or not part.shape[0]
        ):
            return None
        expected += part.shape[0] * stride * part.element_size()
    return first.as_strided((sum(part.shape[0] for part in parts), width), (stride, 1))


def middles(rows: Tensor, vs: Sequence[Tensor]) -> list[Tensor]:
    """``rows @ v.T`` for each member.

    One product for all members costs one launch and one pass over x instead of several; gluing the factors together for
    it at every call would cost more than it saves, so that is left to whoever keeps them.
    """
    together = joined(vs)
    if together is None:
        return [F.linear(rows, v) for v in vs]
    return list(F.linear(rows, together).split([v.shape[0] for v in vs], dim=1))


def _library(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        F.linear(middle, u, bias).view(*x.shape[:-1], u.shape[0])
        for middle, u, bias in zip(middles(rows_2d(x), vs), us, biases, strict=True)
    ]


def _cpp(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    ys = [x.new_empty((*x.shape[:-1], u.shape[0])) for u in us]
    x, rows, x_stride = rows_of(x)
    keep: list[Tensor] = []
    members = tuple(map_of(*member, keep) for member in zip(vs, us, biases, ys, strict=True))
    native.module.cpu_low_rank_linear_group(  # type: ignore[union-attr]
        x.data_ptr(), x_stride, rows, x.shape[-1], members, dispatch.CPP_DTYPES[x.dtype], torch.get_num_threads()
    )
    return ys


def _triton(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.low_rank_linear_group import low_rank_linear_group as kernel

    return [y.view(*x.shape[:-1], y.shape[1]) for y in kernel(rows_2d(x), vs, us, biases)]


def _cuda(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    # A sum over nothing has no kernel: such members go through the reference.
    found: dict[int, Tensor] = {}
    some = [i for i, u in enumerate(us) if x.numel() and u.numel()]
    if some:
        found = dict(zip(some, _cuda_call(x, [Member(vs[i], us[i], biases[i]) for i in some]), strict=True))
    return [
        found[i] if i in found else low_rank_linear_reference(x, *member)
        for i, member in enumerate(zip(vs, us, biases, strict=True))
    ]


BACKENDS: dict[str, _Backend] = {
    "reference": low_rank_linear_group_reference,
    "library": _library,
    "cpp": _cpp,
    "triton": _triton,
    "cuda": _cuda,
}


def _check(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if not (len(vs) == len(us) == len(biases) > 0):
        raise ValueError(
            f"low_rank_linear_group: {len(vs)} vs, {len(us)} us and {len(biases)} biases; "
            "there must be equally many, and at least one"
        )
    for i, (v, u, bias) in enumerate(zip(vs, us, biases, strict=True)):
        if not fits(x, v, u, bias):
            complain("low_rank_linear_group", x, v, u, bias, names=(f"vs[{i}]", f"us[{i}]", f"biases[{i}]"))


# --- registered op, fake, autograd -----------------------------------------------------------------------------------

_SCHEMA = "(Tensor x, Tensor[] vs, Tensor[] us, Tensor?[] biases) -> Tensor[]"
_op = define("low_rank_linear_group", _SCHEMA)
_direct = direct.entry("low_rank_linear_group", dispatch.cpu_rows)


def _compute(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    _check(x, vs, us, biases)
    rows = row_count(x)
    device, shape = x.device.type, None
    rank = sum(u.shape[1] for u in us)
    if device != "cpu":
        shape = ("low_rank_linear_group", x.shape[-1], sum(u.shape[0] for u in us), rank)
    backend = dispatch.choose(device, x.dtype, rows, any(map(turned, (*vs, *us))), shape, rank)
    ys = BACKENDS[backend](x, vs, us, biases)
    if device == "cuda":
        direct.served("low_rank_linear_group", backend, x, vs, us, biases)
    return ys


def _compute_or_direct(
    x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    ys = _direct(x, vs, us, biases)  # for compiled code that calls this op and not its native twin
    if ys is not None:
        return _library(x, vs, us, biases) if ys is False else ys
    return _compute(x, vs, us, biases)


def _fake(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    _check(x, vs, us, biases)
    return [x.new_empty((*x.shape[:-1], u.shape[0])) for u in us]


class _LowRankLinearGroup(torch.autograd.Function):
    """Saves only the op's inputs. Arguments are flat (x, all vs, all us, all biases): autograd sees tensors only."""

    @staticmethod
    def forward(x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        count = len(flat) // 3
        with below_autograd():
            return tuple(_op(x, flat[:count], flat[count : 2 * count], flat[2 * count :]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # An output that nobody used must not cost three products with zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: 1 + 2 * len(output)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        count = len(grads)
        rows = rows_2d(x)
        need_x, *needs = ctx.needs_input_grad
        grad_x: Tensor | None = None
        found: list[Tensor | None] = [None] * (3 * count)
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            wanted = (need_x, *needs[i::count])
            part, *found[i::count] = gradients(rows, factors[i], factors[count + i], rows_2d(grad), wanted)
            if part is not None:
                grad_x = part if grad_x is None else grad_x + part
        return None if grad_x is None else grad_x.view(x.shape), *found


def _by_torch(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    _check(x, vs, us, biases)
    return low_rank_linear_group_reference(x, vs, us, biases)


def _autograd(x: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    if transformed():
        return _by_torch(x, vs, us, biases)
    if needs_grad(x, *vs, *us, *biases):
        return list(apply_function(_LowRankLinearGroup, x, *vs, *us, *biases))
    with below_autograd():
        return _op(x, vs, us, biases)


implement("low_rank_linear_group", compute=_compute_or_direct, fake=_fake, autograd=_autograd, by_torch=_by_torch)
_native = direct.native_op("low_rank_linear_group", _SCHEMA, _op, _fake)


# --- public function -------------------------------------------------------------------------------------------------


def low_rank_linear_group(
    x: Tensor,
    vs: Sequence[Tensor],
    us: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """``[x @ v.T @ u.T + bias for v, u, bias in zip(vs, us, biases)]``: factorised linears that share their input.

    At decode one call is one or two launches instead of two for each member, and ``x`` is read once for all.

    Args:
        x: [..., in], any strides.
        vs: one right factor [rank_i, in] for each member; ranks may differ.
        us: one left factor [out_i, rank_i] for each member.
        biases: one [out_i] or None for each member; None stands for no bias anywhere.

    Returns:
        one tensor [..., out_i] for each member, contiguous, of ``x``'s dtype.

    dtypes, rounding, reproducibility and errors are those of :func:`taco_kernels.low_rank_linear`; differentiable in
    every tensor. With torch's own products the members' first products become one where ``vs`` are consecutive slices
    of rows of one tensor (``torch.cat(vs).split(ranks)``).

    Source: as :func:`taco_kernels.low_rank_linear`.
    """
    if biases is None:
        biases = [None] * len(vs)
    if torch.compiler.is_compiling():
        native_suits = direct.suits_native("low_rank_linear_group", x, *vs, *us, *biases)
        return _native(x, vs, us, biases) if native_suits else _op(x, vs, us, biases)
    ys = _direct(x, vs, us, biases)
    if ys is not None:
        return _library(x, vs, us, biases) if ys is False else ys
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace knows no lists of optional tensors
        _check(x, vs, us, biases)
        return [low_rank_linear(x, *member) for member in zip(vs, us, biases, strict=True)]
    if transformed():  # transforms are met in the op's dispatch
        return _op(x, vs, us, biases)
    if needs_grad(x, *vs, *us, *biases):
        # Autocast must cast before autograd records, and it sits in the op's dispatch.
        if any_autocast():
            return _op(x, vs, us, biases)
        return list(apply_function(_LowRankLinearGroup, x, *vs, *us, *biases))
    with below_autograd():
        return _op(x, vs, us, biases)
