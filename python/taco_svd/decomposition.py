"""Singular value decompositions of a weight: plain, whitened by its inputs, or weighted on both sides.

All return factors of the same kind, so that what follows (attribution, selection, replacement) does not know which
one it works on: ``W = left @ diag(sigma) @ right`` with the directions in an order that the method's metric gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Eigenvalues below this share of the largest are rounding of float32 statistics, not information.
RELATIVE_FLOOR = 1e-6


@dataclass(frozen=True)
class Decomposition:
    """``W = left @ diag(sigma) @ right`` in float32.

    Attributes:
        left: [out, k]; orthonormal columns for a plain SVD.
        sigma: [k], descending singular values, in the metric of the decomposition.
        right: [k, in].
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor

    def factors(self, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(u [out, rank], v [rank, in]) of the directions `keep` (indices), with the root of sigma in both."""
        root = self.sigma[keep].sqrt()
        return self.left[:, keep] * root, root[:, None] * self.right[keep]


def plain_svd(weight: torch.Tensor) -> Decomposition:
    """SVD of a weight [out, in]; the truncation minimises the Frobenius norm of the error in the weight."""
    left, sigma, right = torch.linalg.svd(weight.float(), full_matrices=False)
    return Decomposition(left, sigma, right)


def weighted_svd(
    weight: torch.Tensor, inputs: torch.Tensor | None = None, gradients: torch.Tensor | None = None
) -> Decomposition:
    """SVD of ``G^(1/2) W A^(1/2)``, taken back to the coordinates of W.

    With D the truncation error it minimises tr(G D A D^T): the second-order loss in the Kronecker-factored (K-FAC)
    approximation when A = E[x x^T] are the second moments of the inputs and G = E[g g^T] those of the gradients at
    the outputs. With G left out it is the SVD in whitened input coordinates (SVD-LLM, arXiv 2403.07378).

    Args:
        weight: [out, in].
        inputs: A, symmetric positive semi-definite [in, in], or None for the identity.
        gradients: G, symmetric positive semi-definite [out, out], or None for the identity.
    """
    # float64: the inverse roots below amplify rounding by the condition number of the statistics
    core = weight.double()
    left_back = right_back = None
    if gradients is not None:
        root, left_back = _root_and_inverse(gradients)
        core = root @ core
    if inputs is not None:
        root, right_back = _root_and_inverse(inputs)
        core = core @ root
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    if left_back is not None:
        left = left_back @ left
    if right_back is not None:
        right = right @ right_back
    return Decomposition(left.float(), sigma.float(), right.float())


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Shrinks second moments towards their mean diagonal: ``(1 - a) C + a mean(diag C) I``, in float64."""
    moment = moment.double()
    mean = moment.diagonal().mean()
    result = moment * (1 - damping)
    result.diagonal().add_(damping * mean)
    return result


def _root_and_inverse(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of a second-moment matrix and its inverse, with a floor under the eigenvalues.

    The symmetric root rather than Cholesky: it exists for rank-deficient moments too.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    largest = values[-1]
    if not torch.isfinite(largest) or largest <= 0:
        raise ValueError("second moments are zero or not finite; no weighting can be taken from them")
    values = values.clamp(min=float(largest) * RELATIVE_FLOOR).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
