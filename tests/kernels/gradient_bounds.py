"""How far rounding may take each entry of an op's gradients: the backward passes in float64, each value with its error.

Every op here gives its result and a function from the gradient of the result to those of its tensors, in their order.
What is written out is what the ops do at worst: each intermediate is rounded to the dtype of the tensors. Leading
dimensions are flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kernel_cases import assert_within
from torch import Tensor

from taco_kernels.low_rank_mlp import ACTIVATIONS

U32 = torch.finfo(torch.float32).eps / 2
# Most of an activation's slope and of the slope's own: silu' < 1.1, gelu' < 1.13, silu'' <= 1/2, gelu'' <= sqrt(2/pi).
STEEPEST, MOST_CURVED = 1.13, 0.8


@dataclass(frozen=True)
class Rounded:
    """A float64 value, and the largest error of the same expression computed in ``dtype``, entry by entry."""

    value: Tensor
    error: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> Tensor:
        """The largest that the number can be that was computed."""
        return self.value.abs() + self.error

    @property
    def T(self) -> Rounded:
        return Rounded(self.value.T, self.error.T, self.dtype)

    def __getitem__(self, index: tuple[slice | Tensor, ...]) -> Rounded:
        return Rounded(self.value[index], self.error[index], self.dtype)

    def __matmul__(self, other: Rounded) -> Rounded:
        error = self.error @ other.size + self.value.abs() @ other.error
        error = error + _sums(self.value.shape[-1]) * (self.size @ other.size)
        return _stored(self.value @ other.value, error, self.dtype)

    def __mul__(self, other: Rounded) -> Rounded:
        error = self.error * other.size + self.value.abs() * other.error
        return _stored(self.value * other.value, error, self.dtype)

    def __add__(self, other: Rounded) -> Rounded:
        return _stored(self.value + other.value, self.error + other.error, self.dtype)

    def __sub__(self, other: Rounded) -> Rounded:
        return _stored(self.value - other.value, self.error + other.error, self.dtype)

    def sum(self, dim: int) -> Rounded:
        error = self.error.sum(dim, keepdim=True) + _sums(self.value.shape[dim]) * self.size.sum(dim, keepdim=True)
        return _stored(self.value.sum(dim, keepdim=True), error, self.dtype)

    def to(self, dtype: torch.dtype) -> Rounded:
        """Rounded to a dtype; exact where that is a wider one."""
        if torch.finfo(dtype).eps < torch.finfo(self.dtype).eps:
            return Rounded(self.value, self.error, dtype)
        return _stored(self.value, self.error, dtype)


Pullback = Callable[[Rounded], list[Rounded]]


def _sums(terms: int) -> float:
    """Relative error of a float32 sum of so many products, in any order."""
    return (terms + 1) * U32


def _stored(value: Tensor, error: Tensor, dtype: torch.dtype) -> Rounded:
    kind = torch.finfo(dtype)
    return Rounded(value, error + kind.eps / 2 * (value.abs() + error) + kind.tiny * kind.eps, dtype)


def known(t: Tensor) -> Rounded:
    """An argument, which has no error."""
    value = t.detach().double()
    value = value.reshape(-1, value.shape[-1]) if value.dim() > 2 else value
    return Rounded(value, torch.zeros_like(value), t.dtype)


def assert_gradients_within(actual: Sequence[Tensor], exact: Sequence[Tensor], bounds: Sequence[Rounded]) -> None:
    """Gradients against those of float64, entry by entry; fails as well where the expressions here give another one."""
    for a, e, bound in zip(actual, exact, bounds, strict=True):
        largest = float(bound.value.abs().max())
        torch.testing.assert_close(bound.value.view_as(e), e, rtol=1e-9, atol=1e-9 * largest)
        assert_within(a, e, bound.error.view_as(e))


def linear(x: Rounded, v: Rounded, u: Rounded, bias: Rounded, *residual: Rounded) -> tuple[Rounded, Pullback]:
    """low_rank_linear, with a residual or without."""
    middle = x @ v.T
    y = middle @ u.T + bias
    for more in residual:
        y = y + more

    def pull(grad: Rounded) -> list[Rounded]:
        inner = grad @ u
        return [inner @ v, inner.T @ x, grad.T @ middle, grad.sum(0), *[grad] * len(residual)]

    return y, pull


def pivoted(x: Rounded, v: Rounded, u: Rounded, bias: Rounded, pivot: Tensor) -> tuple[Rounded, Pullback]:
    """pivoted_low_rank_linear without a residual."""
    rank = v.value.shape[0]
    rest = x[:, pivot[rank:]]
    middle = rest @ v.T + x[:, pivot[:rank]]

    def pull(grad: Rounded) -> list[Rounded]:
        inner = grad @ u
        grad_x = _beside([inner, inner @ v])[:, pivot.argsort()]
        return [grad_x, inner.T @ rest, grad.T @ middle, grad.sum(0)]

    return middle @ u.T + bias, pull


def _beside(parts: Sequence[Rounded]) -> Rounded:
    values, errors = zip(*((part.value, part.error) for part in parts), strict=True)
    return Rounded(torch.cat(values, 1), torch.cat(errors, 1), parts[0].dtype)


def group(x: Rounded, *factors: Rounded, pivots: Sequence[Tensor | None] = ()) -> tuple[Rounded, Pullback]:
    """low_rank_linear_group or _concat, results side by side; the factors are v, u and bias of each member."""
    parts, pulls = [], []
    for i in range(len(factors) // 3):
        member, pivot = factors[3 * i : 3 * i + 3], pivots[i] if pivots else None
        y, pull_member = linear(x, *member) if pivot is None else pivoted(x, *member, pivot)
        parts.append(y)
        pulls.append(pull_member)

    def pull(grad: Rounded) -> list[Rounded]:
        start, grad_x, found = 0, None, []
        for part, pull_member in zip(parts, pulls, strict=True):
            stop = start + part.value.shape[1]
            of_x, *others = pull_member(grad[:, start:stop])
            grad_x, start = of_x if grad_x is None else grad_x + of_x, stop
            found += others
        return [grad_x, *found]

    return _beside(parts), pull


def bridge(h: Rounded, v: Rounded, u: Rounded, bias: Rounded, eps: float = 1e-6) -> tuple[Rounded, Pullback]:
    """low_rank_bridge, whose norm is computed in float32."""
    hidden = h.value.shape[1]
    wide = h.to(torch.float32)
    inverse = torch.rsqrt(h.value.square().mean(-1, keepdim=True) + eps)
    # a sum of squares, half of whose relative error the root has; division, addition, root and inverse
    scale = Rounded(inverse, (_sums(hidden) / 2 + 4 * U32) * inverse, torch.float32)
    normed = wide * scale
    y, pull_map = linear(normed.to(h.dtype), v, u, bias)
    one = torch.ones(1, 1, dtype=torch.float64) / hidden
    share = Rounded(one, U32 * one, torch.float32)

    def pull(grad: Rounded) -> list[Rounded]:
        grad_normed, *others = pull_map(grad)
        grad_normed = grad_normed.to(torch.float32)
        mean = (normed * grad_normed).sum(1) * share
        return [(grad.to(torch.float32) + scale * (grad_normed - normed * mean)).to(h.dtype), *others]

    return y + h, pull


def _activated(z: Rounded, act: str) -> Rounded:
    y = ACTIVATIONS[act](z.value)
    return _stored(y, STEEPEST * z.error + 16 * U32 * (y.abs() + z.size), z.dtype)


def _slope(z: Rounded, act: str) -> Rounded:
    """Not stored: it is computed and multiplied in float32."""
    at = z.value.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[act](at).sum(), at)
    if act == "relu":  # 0 or 1, and either where the sign is not known
        error = (z.value.abs() <= z.error).double()
    else:
        error = (MOST_CURVED * z.error).clamp(max=2 * STEEPEST) + 16 * U32
    return Rounded(slope, error, z.dtype)


def mlp(x: Rounded, *factors: Rounded, act: str = "silu") -> tuple[Rounded, Pullback]:
    """low_rank_mlp; the factors are v, u and bias of gate, up and down."""
    opened, pull_gate = linear(x, *factors[:3])
    raised, pull_up = linear(x, *factors[3:6])
    gated = _activated(opened, act)
    y, pull_down = linear(gated * raised, *factors[6:])

    def pull(grad: Rounded) -> list[Rounded]:
        grad_hidden, *of_down = pull_down(grad)
        from_gate, *of_gate = pull_gate(grad_hidden * raised * _slope(opened, act))
        from_up, *of_up = pull_up(grad_hidden * gated)
        return [from_gate + from_up, *of_gate, *of_up, *of_down]

    return y, pull
