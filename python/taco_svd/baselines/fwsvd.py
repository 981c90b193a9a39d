"""FWSVD: SVD weighted by the Fisher information of each row.

Y. Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022, arXiv 2207.00112, eq. 7-9:
with the empirical Fisher information of every weight, I_ij = E[(dL/dW_ij)^2], and D = diag(sqrt(sum_j I_ij)), the
SVD of D W is truncated and D^-1 taken back into the left factor. Ranks are the same in every layer.
"""

from __future__ import annotations

import torch

from ..architectures import LinearSite
from ..decomposition import Decomposition, full_svd
from ..progress import Progress
from .base import Baseline, truncating, uniform
from .workspace import Workspace

# Rows with less Fisher information than this share of the largest are held at it: D must be inverted.
FLOOR = 1e-6


def fisher_weighted_svd(weight: torch.Tensor, rows: torch.Tensor) -> Decomposition:
    """SVD of ``diag(sqrt(rows)) W``, the scaling taken back.

    Args:
        weight: [out, in].
        rows: Fisher information of each row, [out], not negative.
    """
    rows = rows.double()
    largest = rows.max()
    if not largest > 0:  # nothing was learnt about any row: they weigh the same
        rows, largest = torch.ones_like(rows), torch.ones_like(largest)
    scale = rows.clamp(min=float(largest) * FLOOR).sqrt()
    left, sigma, right = full_svd(scale[:, None] * weight.double())
    return Decomposition((left / scale[:, None]).float(), sigma.float(), right.float())


def _decompose(workspace: Workspace, site: LinearSite, weight: torch.Tensor, progress: Progress) -> Decomposition:
    return fisher_weighted_svd(weight, workspace.moments(progress, ["fisher_rows"]).fisher_rows[site])


FWSVD = Baseline(
    "fwsvd",
    "Language model compression with weighted low-rank factorization, arXiv 2207.00112",
    uniform,
    truncating("Fisher-weighted singular value decomposition", _decompose, ["fisher_rows"]),
)
