"""``low_rank_linear_concat``: several factorised linears of one input, their results side by side in one tensor.

What a serving stack's fused layers (q/k/v, gate/up) are. On a GPU with few rows it is one launch for all members, with
pivots or without; with many, the library's products write to their places in the result, and nothing is copied together
afterwards. Elsewhere the members are calls of their own, so that each has its direct call and its compiled twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taco_kernels import direct, dispatch
from taco_kernels._cuda import Member
from taco_kernels._cuda import low_rank as _cuda_call
from taco_kernels._factored import complain, fits, require_tensors, row_count, rows_2d
from taco_kernels._library import (
    any_autocast,
    below_autograd,
    define,
    implement,
    needs_grad,
    transformed,
)
from taco_kernels.low_rank_linear import low_rank_linear, low_rank_linear_reference
from taco_kernels.low_rank_linear_group import low_rank_linear_group, middles
from taco_kernels.pivoted_low_rank_linear import (
    behind_pivot,
    check,
    pivoted_low_rank_linear,
    pivoted_low_rank_linear_reference,
)

__all__ = ["low_rank_linear_concat", "low_rank_linear_concat_reference", "separately"]

_Tensors = Sequence[Tensor]
_Optionals = Sequence["Tensor | None"]


def low_rank_linear_concat_reference(
    x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals
) -> Tensor:
    """The specification: the members' references, one beside the other."""
    results = [
        low_rank_linear_reference(x, v, u, bias)
        if pivot is None
        else pivoted_low_rank_linear_reference(x, v, u, pivot, bias)
        for v, u, bias, pivot in zip(vs, us, biases, pivots, strict=True)
    ]
    return torch.cat(results, dim=-1)


def _check_counts(vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> None:
    if not (len(vs) == len(us) == len(biases) == len(pivots) > 0):
        raise ValueError(
            f"low_rank_linear_concat: {len(vs)} vs, {len(us)} us, {len(biases)} biases and {len(pivots)} pivots; "
            "there must be equally many, and at least one"
        )


def _check(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> None:
    _check_counts(vs, us, biases, pivots)
    for i, (v, u, bias, pivot) in enumerate(zip(vs, us, biases, pivots, strict=True)):
        if pivot is not None:
            check(x, v, u, pivot, bias, None, name=f"low_rank_linear_concat, member {i}")
        elif not fits(x, v, u, bias):
            complain("low_rank_linear_concat", x, v, u, bias, names=(f"vs[{i}]", f"us[{i}]", f"biases[{i}]"))


# --- backends --------------------------------------------------------------------------------------------------------


def separately(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> list[Tensor]:
    """The members' results, by their own ops; those without a pivot in one call."""
    _check_counts(vs, us, biases, pivots)  # these ops check the rest
    plain = [i for i, pivot in enumerate(pivots) if pivot is None]
    found: dict[int, Tensor] = {}
    if len(plain) == 1:
        found[plain[0]] = low_rank_linear(x, vs[plain[0]], us[plain[0]], biases[plain[0]])
    elif plain:
        group = low_rank_linear_group(x, [vs[i] for i in plain], [us[i] for i in plain], [biases[i] for i in plain])
        found.update(zip(plain, group, strict=True))
    for i, pivot in enumerate(pivots):
        if pivot is not None:
            found[i] = pivoted_low_rank_linear(x, vs[i], us[i], pivot, biases[i])
    return [found[i] for i in range(len(vs))]


def _apart(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> Tensor:
    results = separately(x, vs, us, biases, pivots)
    return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def _library(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> Tensor:
    y = x.new_empty((*x.shape[:-1], sum(u.shape[0] for u in us)))
    rows = rows_2d(x)
    places = y.view(rows.shape[0], y.shape[-1]).split([u.shape[0] for u in us], dim=1)
    plain = [i for i, pivot in enumerate(pivots) if pivot is None]
    found = dict(zip(plain, middles(rows, [vs[i] for i in plain]), strict=True)) if plain else {}
    for i, (v, u, bias, pivot) in enumerate(zip(vs, us, biases, pivots, strict=True)):
        middle = found.pop(i) if pivot is None else behind_pivot(x, v, pivot)
        if bias is None:
            torch.mm(middle, u.T, out=places[i])
        else:
            torch.addmm(bias, middle, u.T, out=places[i])
    return y


def _cuda(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> Tensor:
    # a sum over nothing has no kernel
    if not x.numel() or not all(u.numel() and v.numel() for v, u in zip(vs, us, strict=True)):
        return _library(x, vs, us, biases, pivots)
    members = [Member(*member) for member in zip(vs, us, biases, pivots, strict=True)]
    return _cuda_call(x, members, together=True)[0]


BACKENDS: dict[str, Callable[[Tensor, _Tensors, _Tensors, _Optionals, _Optionals], Tensor]] = {
    "reference": low_rank_linear_concat_reference,
    "library": _library,
    "cpp": _apart,
    "triton": _apart,
    "cuda": _cuda,
}


# --- registered op, fake, autograd -----------------------------------------------------------------------------------

_op = define(
    "low_rank_linear_concat",
    "(Tensor x, Tensor[] vs, Tensor[] us, Tensor?[] biases, Tensor?[] pivots) -> Tensor",
)


def _compute(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> Tensor:
    _check(x, vs, us, biases, pivots)
    rows = row_count(x)
    rank = sum(u.shape[1] for u in us)
    shape = None
    if x.device.type != "cpu":
        shape = ("low_rank_linear_concat", x.shape[-1], sum(u.shape[0] for u in us), rank)
    return BACKENDS[dispatch.choose(x.device.type, x.dtype, rows, False, shape, rank)](x, vs, us, biases, pivots)


def _fake(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> Tensor:
    _check(x, vs, us, biases, pivots)
    return x.new_empty((*x.shape[:-1], sum(u.shape[0] for u in us)))


def _autograd(x: Tensor, vs: _Tensors, us: _Tensors, biases: _Optionals, pivots: _Optionals) -> Tensor:
    if needs_grad(x, *vs, *us, *biases) or transformed():
        return _apart(x, vs, us, biases, pivots)
    with below_autograd():
        return _op(x, vs, us, biases, pivots)


implement("low_rank_linear_concat", compute=_compute, fake=_fake, autograd=_autograd, by_torch=_apart)


# --- public function -------------------------------------------------------------------------------------------------


def low_rank_linear_concat(
    x: Tensor,
    vs: Sequence[Tensor],
    us: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    pivots: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """``torch.cat([x @ v.T @ u.T + bias for v, u, bias in zip(vs, us, biases)], dim=-1)``, without the copy on a GPU.

    Args:
        x: [..., in], any strides.
        vs: one right factor for each member: [rank_i, in], or [rank_i, in - rank_i] where the member has a pivot.
        us: one left factor [out_i, rank_i] for each member.
        biases: one [out_i] or None for each member; None stands for no bias anywhere.
        pivots: one [in] (int32 or int64, see :func:`taco_kernels.pivoted_low_rank_linear`) or None for each member;
            None stands for no pivot anywhere.

    Returns:
        [..., sum of out_i], contiguous, of ``x``'s dtype.

    dtypes, rounding, reproducibility and errors are those of :func:`taco_kernels.low_rank_linear` and
    :func:`taco_kernels.pivoted_low_rank_linear`; differentiable in every floating tensor.

    Raises:
        ValueError: not equally many factors, biases and pivots, or none at all.

    Source: as :func:`taco_kernels.low_rank_linear` and, with a pivot, :func:`taco_kernels.pivoted_low_rank_linear`; one
    launch for the members is this project's own.
    """
    require_tensors("low_rank_linear_concat", x=x)
    if biases is None:
        biases = [None] * len(vs)
    if pivots is None:
        pivots = [None] * len(vs)
    if torch.compiler.is_compiling() and direct.exporting():  # for whatever device the program will run on
        return _op(x, vs, us, biases, pivots)
    apart = len(vs) == 1 or x.device.type != "cuda" or needs_grad(x, *vs, *us, *biases) or transformed()
    if apart or torch._C._get_tracing_state() is not None:  # torch.jit.trace knows no lists of optional tensors
        return _apart(x, vs, us, biases, pivots)
    if any_autocast() or torch.compiler.is_compiling():
        return _op(x, vs, us, biases, pivots)
    with below_autograd():
        return _op(x, vs, us, biases, pivots)
