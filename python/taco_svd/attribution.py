"""What each singular direction is worth to the task: gradients with respect to singular values, without forming them.

For a linear map y = W x with W = U diag(sigma) V^T and loss L, dL/dsigma_k = sum over tokens of (g . u_k)(x . v_k)
with g = dL/dy: two skinny products per token batch (arXiv 2501.00339, eq. 5-7), while every sigma stays at its value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

import taco_kernels

from .architectures import LinearSite
from .decomposition import Decomposition


class SigmaGradients:
    """Collects dL/dsigma for the decompositions of several linear maps during one backward pass.

    Pass it to `SuffixRunner.backward` as the callback.
    """

    def __init__(self, decompositions: Mapping[LinearSite, Decomposition]) -> None:
        self.decompositions = decompositions
        self._signed: dict[LinearSite, torch.Tensor] = {}

    def __call__(self, site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        parts = self.decompositions[site]
        scores = taco_kernels.singular_attribution(x, gradient, parts.left.to(x.dtype), parts.right.to(x.dtype))
        signed = scores.signed.double()
        self._signed[site] = self._signed[site] + signed if site in self._signed else signed

    def gradient(self, site: LinearSite) -> torch.Tensor:
        """dL/dsigma of the calibration set's mean loss: float64 [k]."""
        return self._signed[site]

    def importance(self, site: LinearSite) -> torch.Tensor:
        """|sigma dL/dsigma|, the first-order change of the loss when a direction is dropped: float64 [k]."""
        return (self._signed[site] * self.decompositions[site].sigma.double()).abs()


def top_directions(importance: torch.Tensor, rank: int) -> torch.Tensor:
    """Indices of the `rank` most important directions, ascending; ties go to the larger singular value."""
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:rank].sort().values
