"""A rank for a tolerance: the basis grows block by block until the residual is small, then the result is certified.

Source: the blocked QB factorisation of Yu, Gu, Li, "Efficient randomized algorithms for the fixed-precision low-rank
matrix approximation" (SIAM J. Matrix Anal. Appl. 39, 2018). It stops by ``||M - Q^T Q M||_F^2 = ||M||_F^2 - ||Q
M||_F^2`` (rows of Q orthonormal), which loses digits to cancellation; so it only steers, and the certificate is
computed directly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taco_kernels.svd.factorise import small_svd
from taco_kernels.svd.operand import Operand, product, scaled
from taco_kernels.svd.orthonormal import condition, orthonormalise

__all__ = ["IDENTITY_LIMIT", "adaptive_svd", "certified_error"]

# Relative residual down to which the identity above steers in a dtype: its square must stand clear of some hundred
# rounding errors of the squared norms.
IDENTITY_LIMIT = {torch.float32: 5e-3, torch.float64: 1e-7}
_FIRST_BLOCK = 32


def _orthonormal_rows(x: Tensor) -> Tensor:
    basis, fix = orthonormalise(x)
    return product(fix.to(x.dtype), basis.T)


def _without(x: Tensor, q: Tensor) -> Tensor:
    """x minus its part in the span of q's orthonormal rows."""
    return x - product(product(x, q), q.T) if len(q) else x


def _grow(m: Operand, q: Tensor, count: int, power_iters: int, seed: int) -> Tensor:
    """``count`` more orthonormal rows, for the part of M that q [r, rows] does not hold."""
    y = _without(m.sketch((len(q), len(q) + count), seed), q)
    for _ in range(power_iters):
        z = condition(m.backward(_without(condition(y, m.dtype)[0], q)), m.dtype)[0]
        y = _without(m.forward(z), q)
    # Twice: where little of M is left, the first pass leaves mostly what q already holds.
    return _orthonormal_rows(_fresh(_without(_orthonormal_rows(y), q)))


def _fresh(rows: Tensor) -> Tensor:
    """Of orthonormal rows that have lost their part in a basis, what lay outside of it already.

    Where M has no more directions than the basis (rows of zeros, say), rows of rounding errors had taken the places
    that were left, and may be any part of the basis again: hardly anything of them remains, and it is no direction.
    """
    values, vectors = torch.linalg.eigh(product(rows, rows).double())
    fresh = values > 0.25
    return rows if bool(fresh.all()) else product(vectors[:, fresh].T.to(rows.dtype), rows.T)


def _scaled_up(bound: float, exponent: int) -> float:
    """A bound times 2^exponent, not below it: what is too small for a number becomes the smallest one."""
    found = float(scaled(torch.tensor(bound, dtype=torch.float64, device="cpu"), exponent))
    return math.nextafter(found, math.inf) if bound and found < math.ldexp(1.0, -1000) else found


def _squared_norm(m: Operand) -> float:
    return sum(
        float(torch.linalg.vector_norm(m.panel(begin, end, m.dtype), dtype=torch.float64)) ** 2
        for begin, end in m.panels()
    )


def certified_error(m: Operand, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Upper bound of ``||M - u diag(s) vh||_F`` for these very numbers, all rounding errors included.

    The difference is formed row by row in float64. To its norm are added the errors that the standard model of floating
    point arithmetic allows: ``gamma_(k+2) sum_i s_i |u_i| |v_i|`` for the product of the factors, ``gamma_(m+n)``
    times the product of the norms for ``L A R`` (Higham, Accuracy and Stability of Numerical Algorithms, sections 3.1
    and 3.5).
    """
    u, s, vh = u.double(), s.double(), vh.double()
    squares = 0.0
    for begin, end in m.panels():
        difference = m.panel(begin, end, torch.float64) - (u[begin:end] * s) @ vh
        squares += float(torch.linalg.vector_norm(difference)) ** 2
    roundoff = torch.finfo(torch.float64).eps / 2
    terms = float((s * torch.linalg.vector_norm(u, dim=0) * torch.linalg.vector_norm(vh, dim=1)).sum())
    inner = m.inner + 4 if m.weighted else 0
    slack = (len(s) + 4) * roundoff * terms + inner * roundoff * math.prod(m.sizes())
    # One more factor for the sums of squares, of rows * columns terms.
    bound = (math.sqrt(squares) + slack) * (1 + (m.rows * m.columns + 8) * roundoff)
    # where a singular value is beyond the dtype's range, nothing bounds the difference: NaN would say nothing at all
    return math.inf if math.isnan(bound) else bound


def adaptive_svd(
    m: Operand, limit: int, tolerance: float, oversample: int, power_iters: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, float]:
    """``(U, S, Vh, certified error)`` of as few triplets, at most ``limit``, as reach ``tolerance * ||M||_F``.

    S and the error are those of ``2^m.exponent M``. The results are rounded to ``dtype`` before they are certified.
    If ``limit`` triplets are not enough, the error returned is above the tolerance.
    """
    total = _squared_norm(m)
    target = tolerance**2 * total
    widest = min(limit + oversample, m.rows, m.columns)
    q = torch.empty((0, m.rows), dtype=m.dtype, device=m.device)
    b = torch.empty((0, m.columns), dtype=m.dtype, device=m.device)
    residual = total
    # A little below the target: rank `limit` of a basis no wider than that would just miss it.
    while len(q) < widest and (residual > 0.98 * target or not len(q)):
        count = min(max(_FIRST_BLOCK, len(q) // 2), widest - len(q))
        more = _grow(m, q, count, power_iters, seed)
        if not len(more):
            break
        image = m.backward(more)
        residual -= float(torch.linalg.vector_norm(image, dtype=torch.float64)) ** 2
        q, b = torch.cat([q, more]), torch.cat([b, image])
    right, fix = orthonormalise(b)
    core = product(b, right).double() @ fix.T
    p, s, w = (t[0] for t in small_svd(core[None], len(core), exact=True))
    tails = total - s.square().cumsum(0)
    rank = min(int((tails > target).sum()) + 1, limit, len(s))
    while True:
        u = product(q.T, p[:, :rank].T.to(m.dtype)).to(dtype)
        vh = product((w[:rank] @ fix).to(m.dtype), right.T).to(dtype)
        # as they are returned: at the ends of dtype's range the last scaling rounds, too
        sigma = scaled(s[:rank], m.exponent).to(dtype)
        error = certified_error(m, u, scaled(sigma, -m.exponent), vh)
        if error <= tolerance * math.sqrt(total) or rank >= min(limit, len(s)):
            return u, sigma, vh, _scaled_up(error, m.exponent)
        rank = min(rank + max(1, rank // 50), limit, len(s))
