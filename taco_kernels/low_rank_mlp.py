"""``low_rank_mlp``: the gated MLP of a decoder layer with all three projections factorised.

Read top to bottom: reference -> calls into the backends -> registered op, fake, autograd -> public function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from taco_kernels import direct, dispatch, native
from taco_kernels._cpu import map_of
from taco_kernels._cuda import Member
from taco_kernels._cuda import low_rank as _cuda_call
from taco_kernels._factored import complain, factors_fit, fits, gradients, require_tensors, row_count, rows_2d, turned
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
from taco_kernels.low_rank_linear import BACKENDS as LINEAR
from taco_kernels.low_rank_linear_group import BACKENDS as GROUP

__all__ = ["ACTIVATIONS", "low_rank_mlp", "low_rank_mlp_reference"]

Projection: TypeAlias = "tuple[Tensor, Tensor, Tensor | None]"
"""(v, u, bias) of one factorised linear"""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)
    # torch's own has no derivative, and a second one may be asked for.
    s = torch.sigmoid(z.to(computing_dtype(z.dtype)))
    return (grad * (s * (1 + z * (1 - s)))).to(z.dtype)


# gradient of the activation: (gradient of its result, its argument) -> gradient of its argument
_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _silu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
}


# --- reference -------------------------------------------------------------------------------------------------------


def low_rank_mlp_reference(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str = "silu") -> Tensor:
    """The specification: same arguments and result as :func:`low_rank_mlp`, in plain torch.

    Everything between ``x`` and the result is computed in float32 (float64 for float64) and rounded once.
    """
    wide = computing_dtype(x.dtype)

    def linear(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ v.to(wide).T @ u.to(wide).T
        return y if bias is None else y + bias

    rows = rows_2d(x).to(wide)
    hidden = ACTIVATIONS[act](linear(rows, *gate)) * linear(rows, *up)
    return linear(hidden, *down).to(x.dtype).view(*x.shape[:-1], down[1].shape[0])


# --- backends --------------------------------------------------------------------------------------------------------


def _composed(two: Callable[..., list[Tensor]], one: Callable[..., Tensor], x: Tensor, *factors: Any) -> Tensor:
    """Two linears of one input, activation and product, a third linear; every intermediate rounded to x's dtype."""
    gate, up, down, act = factors
    opened, raised = two(x, *zip(gate, up, strict=True))
    return one(ACTIVATIONS[act](opened).mul_(raised), *down, None)


# Where a CPU has kernels for more rows than a few, or packs a few rows of x (csrc/cpu/few_rows.inl), its three maps are
# better computed one by one, since the kernel for a whole MLP does neither: beyond so many rows, from so large ranks of
# gate and up on. (Two Zen 4 cores, fp32, Llama-2-7B's MLP: 8 rows x1.1 to x1.2, 16 rows x1.2 to x1.35.)
# With AVX2 alone from 3 rows on (two Zen 2 cores, both dtypes: 4 to 12 rows x1.02 to x1.45, 1 to 3 rows level).
COMPOSED_ROWS: dispatch.RowLimits = ((0, 4, dispatch.ANY),)
if dispatch.isa == "avx2":  # one number of rows, whatever the dtype
    COMPOSED_ROWS = ((0, native.module.cpu_many_rows_from(0) - 1, dispatch.ANY),)  # type: ignore[union-attr]


def _composes(dtype: torch.dtype) -> bool:
    packs = dtype == torch.float32 and dispatch.isa.startswith("avx512")
    return packs or dispatch.multiplies_many_rows(dtype)


def _fused_rows(dtype: torch.dtype) -> dispatch.RowLimits:
    """For how many rows one kernel does all of an MLP on a CPU, by the ranks of gate and up."""
    return COMPOSED_ROWS if _composes(dtype) else dispatch.cpu_rows(dtype)


_CPP_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}


def _cpp(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str) -> Tensor:
    # Only the product in the middle is rounded to x's dtype; gate, up and all rank-sized intermediates stay float32.
    y = x.new_empty((*x.shape[:-1], down[1].shape[0]))
    x, rows, x_stride = rows_of(x)
    keep: list[Tensor] = []
    maps = (map_of(*gate, None, keep), map_of(*up, None, keep), map_of(*down, y, keep))
    native.module.cpu_low_rank_mlp(  # type: ignore[union-attr]
        x.data_ptr(), x_stride, rows, x.shape[-1], *maps, _CPP_ACTIVATIONS[act], dispatch.CPP_DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _triton(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str) -> Tensor:
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.low_rank_mlp import low_rank_mlp as kernel

    return kernel(rows_2d(x), gate, up, down, act).view(*x.shape[:-1], down[1].shape[0])


def _cuda(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str) -> Tensor:
    if not (x.numel() and gate[1].numel() and up[1].numel() and down[1].numel()):
        return low_rank_mlp_reference(x, gate, up, down, act)
    (hidden,) = _cuda_call(x, [Member(*gate), Member(*up)], act=act)
    return _cuda_call(hidden, [Member(*down)])[0]


_BACKENDS: dict[str, Callable[[Tensor, Projection, Projection, Projection, str], Tensor]] = {
    "reference": low_rank_mlp_reference,
    "library": functools.partial(_composed, GROUP["library"], LINEAR["library"]),
    "cpp": _cpp,
    "triton": _triton,
    "cuda": _cuda,
}


def _check(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str) -> None:
    # One quick expression on the hot path; the slow function writes the message.
    if not (
        act in ACTIVATIONS
        and fits(x, *gate)
        and fits(x, *up)
        and up[1].shape[0] == gate[1].shape[0]
        and down[0] is not None
        and down[1] is not None
        and factors_fit(up[1].shape[0], x.dtype, x.device, *down)
    ):
        _complain(x, gate, up, down, act)


def _complain(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str) -> None:
    op = "low_rank_mlp"
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act is {act!r}; choose one of {', '.join(ACTIVATIONS)}")
    require_tensors(op, down_v=down[0], down_u=down[1])
    for name, factors in (("gate", gate), ("up", up)):
        complain(op, x, *factors, names=(f"{name}_v", f"{name}_u", f"{name}_bias"))
    width = gate[1].shape[0]
    if up[1].shape[0] != width:
        raise ValueError(f"{op}: up_u {tuple(up[1].shape)} must have as many rows as gate_u {tuple(gate[1].shape)}")
    hidden = x.new_empty((1, width))
    names = ("down_v", "down_u", "down_bias")
    complain(op, hidden, *down, names=names, x_name="the product of gate and up", in_name="width")


# --- registered op, fake, autograd -----------------------------------------------------------------------------------

_op = define(
    "low_rank_mlp",
    "(Tensor x, Tensor gate_v, Tensor gate_u, Tensor? gate_bias, Tensor up_v, Tensor up_u, "
    "Tensor? up_bias, Tensor down_v, Tensor down_u, Tensor? down_bias, str act='silu') -> Tensor",
)
_direct = direct.entry("low_rank_mlp", _fused_rows)


def _unpack(arguments: Sequence[Any]) -> tuple[Projection, Projection, Projection, str]:
    """(gate, up, down, act) of the op's arguments behind x; torch leaves out an ``act`` that is the default."""
    act = arguments[9] if len(arguments) > 9 else "silu"
    return tuple(arguments[:3]), tuple(arguments[3:6]), tuple(arguments[6:9]), act


def _compute(x: Tensor, *arguments: Any) -> Tensor:
    gate, up, down, act = _unpack(arguments)
    _check(x, gate, up, down, act)
    rows = row_count(x)
    device, shape = x.device.type, None
    ranks = gate[1].shape[1] + up[1].shape[1]
    transposed = any(map(turned, (*gate[:2], *up[:2], *down[:2])))
    if device != "cpu":
        shape = ("low_rank_mlp", x.shape[-1], 2 * gate[1].shape[0], ranks)
    elif (
        dispatch.get_backend() is None and _composes(x.dtype) and not dispatch.within(_fused_rows(x.dtype), ranks, rows)
    ):
        two = GROUP[dispatch.choose(device, x.dtype, rows, transposed, rank=ranks)]
        one = LINEAR[dispatch.choose(device, x.dtype, rows, transposed, rank=down[1].shape[1])]
        return _composed(two, one, x, gate, up, down, act)
    return _BACKENDS[dispatch.choose(device, x.dtype, rows, transposed, shape)](x, gate, up, down, act)


def _compute_on_cpu(x: Tensor, *arguments: Any) -> Tensor:
    gate, up, down, act = _unpack(arguments)
    y = _direct(x, *gate, *up, *down, act)  # for compiled code, which comes here and not through the public function
    return _compute(x, *arguments) if y is None else y


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    gate, up, down, act = _unpack(arguments)
    _check(x, gate, up, down, act)
    return x.new_empty((*x.shape[:-1], down[1].shape[0]))


class _LowRankMlp(torch.autograd.Function):
    """Saves only the op's inputs: [rows, width] intermediates would be the largest tensors of a training step."""

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        with below_autograd():
            return _op(x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *arguments = inputs
        gate, up, down, ctx.act = _unpack(arguments)
        ctx.save_for_backward(x, *gate, *up, *down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        gate, up, down, _ = _unpack(factors)
        need_x, *needs = ctx.needs_input_grad[:10]
        rows, grad_rows = rows_2d(x), rows_2d(grad)
        open_needed, raised_needed = need_x or any(needs[:3]), need_x or any(needs[3:6])

        def linear(v: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(F.linear(rows, v), u, bias)

        opened, raised = linear(*gate), linear(*up)
        gated = ACTIVATIONS[ctx.act](opened)
        wanted = (open_needed or raised_needed, *needs[6:9])
        grad_hidden, *down_grads = gradients(gated * raised, down[0], down[1], grad_rows, wanted)
        grad_x: Tensor | None = None
        found: list[list[Tensor | None]] = [[None] * 3, [None] * 3]
        if grad_hidden is not None:
            sides = (
                (gate, open_needed, lambda: _ACTIVATION_GRADIENTS[ctx.act](grad_hidden * raised, opened), needs[:3]),
                (up, raised_needed, lambda: grad_hidden * gated, needs[3:6]),
            )
            for i, ((v, u, _), needed, grad_of, wants) in enumerate(sides):
                if needed:
                    part, *found[i] = gradients(rows, v, u, grad_of(), (need_x, *wants))
                    if part is not None:
                        grad_x = part if grad_x is None else grad_x + part
        return None if grad_x is None else grad_x.view(x.shape), *found[0], *found[1], *down_grads, None


def _by_torch(x: Tensor, *arguments: Any) -> Tensor:
    gate, up, down, act = _unpack(arguments)
    _check(x, gate, up, down, act)
    return low_rank_mlp_reference(x, gate, up, down, act)


def _autograd(x: Tensor, *arguments: Any) -> Tensor:
    if transformed():
        return _by_torch(x, *arguments)
    gate, up, down, act = _unpack(arguments)
    if needs_grad(x, *gate, *up, *down):
        return apply_function(_LowRankMlp, x, *gate, *up, *down, act)
    with below_autograd():
        return _op(x, *gate, *up, *down, act)


implement("low_rank_mlp", compute=_compute, on_cpu=_compute_on_cpu, fake=_fake, autograd=_autograd, by_torch=_by_torch)


# --- public function -------------------------------------------------------------------------------------------------


def low_rank_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str = "silu") -> Tensor:
    """``down(act(gate(x)) * up(x))``, each of the three a factorised linear ``(v, u, bias or None)``.

    Args:
        x: [..., in], any strides.
        gate: v [rank_g, in], u [width, rank_g], bias [width] or None.
        up: v [rank_u, in], u [width, rank_u], bias [width] or None.
        down: v [rank_d, width], u [out, rank_d], bias [out] or None.
        act: the activation: "silu", "gelu_tanh" (its tanh form), "gelu" (exact) or "relu".

    Returns:
        [..., out], contiguous, of ``x``'s dtype.

    dtypes, reproducibility and gradients are those of :func:`taco_kernels.low_rank_linear`. All sums are float32;
    ``reference`` rounds once, the other backends round the product of gate and up to the dtype as well (as a dense
    MLP does), and ``library`` and ``cpp`` also what it is made of.

    Raises:
        TypeError: a dtype that is not supported, or tensors of different dtypes.
        ValueError: shapes or devices that do not fit together, or an unknown activation.
        RuntimeError: a backend was forced (``TACO_BACKEND``) that cannot serve this call.

    Source: gated linear units (arXiv:2002.05202, equation 6) with the factors of :func:`taco_kernels.low_rank_linear`.
    """
    arguments = (*gate, *up, *down, act)
    if torch.compiler.is_compiling():
        return _op(x, *arguments)
    y = _direct(x, *arguments)
    if y is not None:
        return y
    if transformed():  # transforms are met in the op's dispatch
        return _op(x, *arguments)
    if needs_grad(x, *gate, *up, *down):
        return _op(x, *arguments) if seen_as_op() else apply_function(_LowRankMlp, x, *arguments)
    with below_autograd():
        return _op(x, *arguments)
