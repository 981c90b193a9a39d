"""What each singular direction is worth to the task: gradients with respect to singular values, without forming them.

For a linear map y = W x with W = U diag(sigma) V^T and loss L, dL/dsigma_k = sum over tokens of (g . u_k)(x . v_k)
with g = dL/dy: two skinny products per token batch (arXiv 2501.00339, eq. 5-7), while every sigma stays at its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

import taco_kernels

from . import decomposition
from .architectures import LinearSite
from .decomposition import Decomposition, plain_svd
from .errors import TacoError

# Directions of a large matrix that are attributed, in ranks.
CANDIDATES = 3


def candidates_of(shape: Sequence[int], rank: int) -> int:
    """How many directions of a matrix are looked at for `rank`: three times as many, all of a small matrix."""
    smaller = min(shape)
    return smaller if smaller < decomposition.PLAIN_LEAST else min(smaller, CANDIDATES * rank)


def candidate_directions(weight: torch.Tensor, rank: int) -> Decomposition:
    """The leading directions of a weight among which paper mode looks for `rank`; all of a small matrix."""
    count = candidates_of(weight.shape, rank)
    parts = plain_svd(weight, count)
    if len(parts.sigma) == count:
        return parts
    # copies: views would hold all of them
    return Decomposition(parts.left[:, :count].clone(), parts.sigma[:count].clone(), parts.right[:count].clone())


class SigmaGradients:
    """Collects dL/dsigma for the decompositions of several linear maps during one backward pass.

    Pass it to `SuffixRunner.backward` as the callback.
    """

    def __init__(self, decompositions: Mapping[LinearSite, Decomposition]) -> None:
        self.decompositions = decompositions
        self._cast: dict[LinearSite, tuple[torch.Tensor, torch.Tensor]] = {}
        self._signed: dict[LinearSite, torch.Tensor] = {}

    def __call__(self, site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        parts = self.decompositions[site]
        if parts.left.dtype == x.dtype:
            left, right = parts.left, parts.right
        else:
            if site not in self._cast:
                self._cast[site] = parts.left.to(x.dtype), parts.right.to(x.dtype)
            left, right = self._cast[site]
        signed = taco_kernels.singular_attribution(x, gradient, left, right).signed.double()
        self._signed[site] = self._signed[site] + signed if site in self._signed else signed

    def gradient(self, site: LinearSite) -> torch.Tensor:
        """dL/dsigma of the calibration set's mean loss: float64 [k]."""
        return self._signed[site]

    def importance(self, site: LinearSite) -> torch.Tensor:
        """|sigma dL/dsigma|, the first-order change of the loss when a direction is dropped: float64 [k]."""
        found = (self._signed[site] * self.decompositions[site].sigma.double()).abs()
        if not bool(found.isfinite().all()):
            raise TacoError(
                f"layer {site.layer}, {site.path}: the gradients of the calibration loss are not finite, so directions "
                "cannot be chosen by them. Load the model in bfloat16 or float32 (--dtype), or take --method taco."
            )
        return found


def top_directions(importance: torch.Tensor, rank: int) -> torch.Tensor:
    """Indices of the `rank` most important directions, ascending; ties go to the larger singular value."""
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:rank].sort().values


def expected_missing(importance: torch.Tensor, sigma: torch.Tensor, rank: int, total: int) -> float:
    """How many of the `rank` most important of all `total` directions lie beyond the candidates, as a share of `rank`.

    The candidates are the leading directions, by singular value; what lies beyond has smaller ones. An estimate that
    errs upwards: it gives every direction beyond the smallest singular value among the candidates, and a gradient drawn
    from a distribution with a heavy (exponential) tail and the root mean square of the candidates' outer half. Kept
    directions found near the candidates' edge raise it too.

    Args:
        importance: |sigma dL/dsigma| of the candidates [k]; sigma: their singular values [k], descending.
    """
    beyond = total - len(sigma)
    if beyond <= 0:
        return 0.0
    if rank > len(sigma):
        return 1.0
    sigma = sigma.to(importance.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    threshold = float(importance.topk(rank).values[-1])
    gradients = importance / sigma
    outer = gradients[len(sigma) // 2 :]
    scale = float(sigma[-1] * outer.square().mean().sqrt())
    likely = math.exp(-math.sqrt(2) * threshold / scale) if scale > 0 else 0.0
    counted = float((gradients[len(sigma) * 3 // 4 :] * sigma[-1] >= threshold).double().mean())
    return max(likely, counted) * beyond / rank
