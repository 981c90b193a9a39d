"""Orthonormal bases by CholeskyQR, with a shift where a Gram matrix is singular and Householder QR as the last resort.

Sources: CholeskyQR2 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44, 2015); shifted CholeskyQR (Fukaya, Kannan,
Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42, 2020). Both are one loop here: orthonormalise by the
Cholesky factor of the Gram matrix until the Gram matrix is close to the identity; shift it when it has no Cholesky
factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taco_kernels.svd.operand import product

__all__ = ["condition", "orthonormalise"]

# Two are enough for condition numbers up to eps^-1/2, four for anything that is not exactly singular (each shifted
# pass divides the condition number by about eps^-1/2).
_PASSES = 5
# A Gram matrix this close to the identity (Frobenius) has condition number below 3: its Cholesky factor is as good as
# exact, and can be applied to something smaller than the basis.
_CLOSE = 0.5
# Multiples of eps times the size of the (unit-diagonal) Gram matrix.
_SHIFTS = (1.0, 16.0, 256.0)


def _inverse_factor(gram: Tensor, eps: float) -> tuple[Tensor, Tensor, bool] | None:
    """``(L^-1, diag L, shifted)`` of ``gram = L L^T`` (float64); None where even shifts leave it without a factor."""
    if not bool(torch.isfinite(gram).all()):
        return None
    # Unit diagonal first: a shift must not drown rows that are merely short.
    norms = gram.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    scaled = gram / norms / norms[:, None]
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for shift in (0.0, *_SHIFTS):
        factor, info = torch.linalg.cholesky_ex(scaled + shift * eps * len(gram) * identity if shift else scaled)
        if int(info) == 0:
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            if bool(torch.isfinite(inverse).all()):
                return inverse / norms, factor.diagonal() * norms, shift > 0
    return None


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x / scale, scale)`` for the power of two above x's largest magnitude: sums of squares then stay in range."""
    largest = torch.linalg.vector_norm(x, float("inf"))
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return x / scale, scale


def condition(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A well-conditioned basis of the rows of x, in ``dtype``; one pass, for use between power iterations.

    Args:
        x: [r, n], r <= n; float32 or float64, or what ``dtype`` is.

    Returns:
        The basis [r, n]; then, in float64, the factor [r, r] that x was multiplied by from the left to get it, and the
        diagonal [r] of that factor's inverse. Both are None where x was close to singular.
    """
    full = x if x.dtype in (torch.float32, torch.float64) and x.dtype.itemsize >= dtype.itemsize else x.float()
    full, scale = _unit(full)
    found = _inverse_factor(product(full, full).double(), torch.finfo(full.dtype).eps)
    if found is None or found[2]:
        return orthonormalise(full)[0].to(dtype), None, None
    # Rounding the factor changes the basis, not what it spans; so the product may be as coarse as what follows.
    return product(found[0].to(dtype), full.to(dtype).T), found[0] / scale, found[1] * scale


def orthonormalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(basis, fix)`` such that the rows of ``fix @ basis`` are orthonormal and span those of x.

    Args:
        x: [r, n], r <= n, float32 or float64; any rank, zero too (then the span is completed arbitrarily).

    Returns:
        basis [r, n] of x's dtype, of condition number below 3 at worst and usually 1 + 1e-3; fix [r, r] in float64, to
        be multiplied into whatever r-sized matrix comes next instead of into the long basis.
    """
    identity = torch.eye(len(x), dtype=torch.float64, device=x.device)
    eps = torch.finfo(x.dtype).eps
    basis = _unit(x)[0]
    for _ in range(_PASSES):
        gram = product(basis, basis).double()
        if float(torch.linalg.matrix_norm(gram - identity)) < _CLOSE:  # false for NaN
            return basis, torch.linalg.solve_triangular(torch.linalg.cholesky(gram), identity, upper=False)
        found = _inverse_factor(gram, eps)
        if found is None:
            break
        basis = product(found[0].to(x.dtype), basis.T)
    return torch.linalg.qr(_unit(x)[0].T).Q.T.contiguous(), identity
