"""SVD of a weight in the coordinates in which its inputs are white, by Cholesky, as SVD-LLM and ZS-SVD take it."""

from __future__ import annotations

import torch

from ..architectures import LinearSite, dense_weight
from ..decomposition import Decomposition, full_svd
from ..errors import TacoError
from ..progress import Progress
from .workspace import Workspace

# First addition to the diagonal where a moment matrix is not positive definite, as a share of its mean; then tenfold.
JITTER = 1e-10


def cholesky(moment: torch.Tensor) -> torch.Tensor:
    """Lower factor L with ``L L^T = moment + jitter I``, float64; the jitter is the least of a tenfold row that works.

    Raises:
        TacoError: the moments are zero or not finite.
    """
    moment = moment.double()
    mean = float(moment.diagonal().mean())
    if not 0 < mean < float("inf"):
        raise TacoError("The calibration inputs of a matrix are all zero or not finite; try another --calibration.")
    identity = torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
    jitter = 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(moment + jitter * mean * identity)
        if int(info) == 0:
            return factor
        jitter = max(JITTER, 10 * jitter)


def whitened_svd(weight: torch.Tensor, moment: torch.Tensor) -> Decomposition:
    """SVD of ``W L`` with ``L L^T = E[x x^T]``, taken back: truncation minimises E|(W - W_r) x|^2.

    Args:
        weight: [out, in].
        moment: E[x x^T], [in, in].
    """
    factor = cholesky(moment)
    left, sigma, right = full_svd(weight.double() @ factor)
    # right L^-1, from a triangular system with L^T
    right = torch.linalg.solve_triangular(factor.T, right.T, upper=True).T
    return Decomposition(left.float(), sigma.float(), right.float())


def whitened(workspace: Workspace, site: LinearSite, progress: Progress) -> Decomposition:
    """The whitened SVD of a dense map, made once per workspace."""
    moments = workspace.moments(progress, ["second"])

    def make() -> Decomposition:
        weight = dense_weight(workspace.architecture.module(site)).detach()
        return whitened_svd(weight, moments.inputs(site))

    return workspace.keep_decomposition(("whitened", site), make)
