"""ASVD: SVD of weights scaled by the size of their activations.

Z. Yuan et al., "ASVD: activation-aware singular value decomposition for compressing large language models",
arXiv 2312.05821, eq. 4 and 7: S = diag(mean |x_j| ^ alpha) with alpha = 0.5; the SVD of W S is truncated and S^-1
taken back into the right factor. Ranks are the same in every layer (the paper's search for ranks by perplexity is
left out, so that methods are compared at one allocation).
"""

from __future__ import annotations

import torch

from ..architectures import LinearSite
from ..decomposition import Decomposition, full_svd
from ..progress import Progress
from .base import Baseline, truncating, uniform
from .workspace import Workspace

ALPHA = 0.5
# Channels that were (almost) never active are held at this share of the largest: S must be inverted.
FLOOR = 1e-6


def activation_scaled_svd(weight: torch.Tensor, magnitude: torch.Tensor, alpha: float = ALPHA) -> Decomposition:
    """SVD of ``W diag(magnitude^alpha)``, the scaling taken back.

    Args:
        weight: [out, in].
        magnitude: mean absolute activation of each input channel, [in].
    """
    magnitude = magnitude.double()
    largest = float(magnitude.max())
    if not largest > 0:
        magnitude, largest = torch.ones_like(magnitude), 1.0
    scale = magnitude.clamp(min=largest * FLOOR) ** alpha
    left, sigma, right = full_svd(weight.double() * scale)
    return Decomposition(left.float(), sigma.float(), (right / scale).float())


def _decompose(workspace: Workspace, site: LinearSite, weight: torch.Tensor, progress: Progress) -> Decomposition:
    return activation_scaled_svd(weight, workspace.moments(progress, ["magnitude"]).magnitude[site])


ASVD = Baseline(
    "asvd",
    "ASVD: activation-aware singular value decomposition, arXiv 2312.05821",
    uniform,
    truncating("activation-scaled singular value decomposition", _decompose, ["magnitude"]),
)
