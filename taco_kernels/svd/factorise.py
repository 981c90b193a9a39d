"""Power iterations, projection and small problem: from products with M to its leading singular triplets.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), algorithms 4.4 and 5.1;
shifts as in dashSVD (see :func:`project`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taco_kernels.svd.operand import Operand, product
from taco_kernels.svd.orthonormal import condition, orthonormalise

__all__ = ["Projection", "project", "small_svd", "vectors"]

# Share of the squared error that low precision may add; far below the 1% that randomness is granted.
_EXCESS = 1e-3
# Test vectors whose images are computed in both precisions when M is a product: its roundoff cannot be known otherwise.
_PROBES = 8
_EIGENVALUE_STEPS = 12
# sigma_k / sigma_1 from which the eigenvalues of a float64 Gram matrix still give float32 singular triplets.
_GRAM_RANGE = 1e-4


@dataclass
class Projection:
    """``M ~ (left_fix left)^T core (right_fix right)``: bases as rows, see :func:`orthonormal.orthonormalise`.

    left [l, rows], right [l, columns], core and both fixes [l, l] in float64.
    """

    left: Tensor
    left_fix: Tensor
    right: Tensor
    right_fix: Tensor
    core: Tensor


def _excess(diagonal: Tensor | None, columns: int, noise: float) -> float:
    """Estimated share of the squared error that roundoff of the power iterations adds.

    A direction of singular value s comes out of a product with relative error ``noise * rms / s`` (rms: root mean
    square of the singular values in the basis), spread over all ``columns`` dimensions. What is outside the basis
    then enters with the mean square of the discarded singular values; the product in full precision that follows
    keeps their ratio.
    """
    if diagonal is None:
        return float("inf")
    squares = diagonal.square()
    smallest = float(squares.min())
    if not smallest > 0:
        return float("inf")
    return float(noise**2 * squares.mean() * squares.reciprocal().sum() / columns)


def _noise(m: Operand, seed: int, y: Tensor) -> float:
    """Relative error of a product in low precision, per vector: a bound for a plain matrix, measured for ``L A R``."""
    assert m.low is not None
    roundoff = torch.finfo(m.low).eps / 2
    if not m.weighted:
        return roundoff
    probes = min(_PROBES, len(y))
    exact = m.sketch((0, probes), seed)
    size = float(torch.linalg.vector_norm(exact))
    error = float(torch.linalg.vector_norm(y[:probes].to(exact.dtype) - exact))
    return max(roundoff, 2 * error / size) if size else float("inf")


def project(m: Operand, width: int, power_iters: int, seed: int) -> Projection:
    """Randomized range finder of ``width`` vectors with ``power_iters`` iterations, then M in both bases.

    An iteration multiplies by ``M M^T - a I``, a being half of the smallest eigenvalue of ``M M^T`` seen in the basis.
    That is hardly ever above half of the true one, so the order of the leading directions stays; it widens the
    relative gaps where they are smallest: on flat spectra two iterations do the work of three, at one small product
    each (shifted power iteration: Feng, Yu, Xie, Tang, "Algorithm 1043", ACM TOMS 50, 2024).

    All products but the last two run in ``m.low`` where that exists, as long as the spectrum met on the way shows that
    the result does not suffer; else the iterations start again in full precision. The last two decide the accuracy.
    """
    low = m.low is not None and power_iters > 0
    y = m.sketch((0, width), seed, low)
    noise = _noise(m, seed, y) if low else 0.0
    for iteration in range(power_iters):
        kind = m.low if low and m.low is not None else m.dtype
        x = condition(y, kind)[0]
        z, factor, diagonal = condition(m.backward(x, low), kind)
        if low and _excess(diagonal, m.columns, noise) > _EXCESS:
            m.drop_low()
            return project(m, width, power_iters, seed)
        y = m.forward(z, low and iteration + 1 < power_iters).to(m.dtype)
        if factor is not None:
            # z = factor (x M), so factor (x M M^T - shift x) spans the same as the shifted iterate.
            shift = 0.5 / _largest_eigenvalue(factor @ factor.T)
            y -= product((shift * factor).to(kind), x.T)
    left, left_fix = orthonormalise(y.to(m.dtype))
    b = m.backward(left)
    right, right_fix = orthonormalise(b)
    core = left_fix @ product(b, right).double() @ right_fix.T
    return Projection(left, left_fix, right, right_fix, core)


def _largest_eigenvalue(gram: Tensor) -> float:
    """Of a positive matrix [l, l], from a few multiplications of a vector: never above, and below by a few percent."""
    x = gram.sum(1)
    for _ in range(_EIGENVALUE_STEPS):
        x = gram @ (x / torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x))


def small_svd(core: Tensor, rank: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triplets of small matrices [batch, l, l] in float64, descending.

    Through the eigenvectors of the Gram matrix, the singular values refined as norms of their images, where float32
    results are wanted and the spectrum's range allows it (``exact`` false); else by a direct SVD.
    """
    if not exact:
        _, vectors = torch.linalg.eigh(core.mT @ core)
        vectors = vectors.flip(-1)[..., :rank]
        images = core @ vectors
        sigma = torch.linalg.vector_norm(images, dim=-2)
        if bool((sigma.amin(-1) > _GRAM_RANGE * sigma.amax(-1)).all()):
            sigma, order = sigma.sort(dim=-1, descending=True)
            order = order.unsqueeze(-2).expand_as(images)
            left = images.gather(-1, order) / sigma.unsqueeze(-2)
            return left, sigma, vectors.gather(-1, order).mT
    left, sigma, right = torch.linalg.svd(core)
    return left[..., :rank], sigma[..., :rank], right[..., :rank, :]


def vectors(p: Projection, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``(U [rows, k], Vh [k, columns])`` out of the small problem's left [l, k] and right [k, l]."""
    dtype = p.left.dtype
    u = product(p.left.T, (left.mT @ p.left_fix).to(dtype))
    vh = product((right @ p.right_fix).to(dtype), p.right.T)
    return u, vh
