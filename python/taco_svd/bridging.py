"""Fits a low-rank bridge in place of a run of removed layers, in closed form.

Reduced-rank regression of what the removed layers added to the residual stream on the normalised stream before
them: with x = rmsnorm(h_in) of the *compressed* prefix and target d = h_out(dense) - h_in, both centred,
M = C_dx (C_xx + l I)^-1 is the best linear map; its truncation in the metric of the input moments (and, where given,
of the moments of the loss gradient at the output) is one weighted SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .decomposition import damped, weighted_svd
from .team import Team

RIDGE = 1e-3
WIDE = 2048


@dataclass
class BridgeMoments:
    """Running sums over tokens that the fit needs, where the hidden states are; float64 up to `WIDE` features."""

    eps: float
    tokens: int = 0
    sum_x: torch.Tensor | None = None
    sum_d: torch.Tensor | None = None
    xx: torch.Tensor | None = None
    dx: torch.Tensor | None = None

    def add(self, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Adds tokens: the hidden states the bridge will see, and those it should produce; both [..., hidden]."""
        # beyond `WIDE` products of float64 matrices would take longer than the model itself
        wide = torch.float64 if entering.shape[-1] <= WIDE else torch.float32
        h = entering.flatten(0, -2).to(wide)
        x = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        d = leaving.flatten(0, -2).to(wide) - h
        sums = (x.sum(0), d.sum(0), x.T @ x, d.T @ x)
        if self.sum_x is None:
            self.sum_x, self.sum_d, self.xx, self.dx = sums
        else:
            assert self.sum_d is not None and self.xx is not None and self.dx is not None
            self.sum_x = self.sum_x + sums[0]
            self.sum_d = self.sum_d + sums[1]
            self.xx = self.xx + sums[2]
            self.dx = self.dx + sums[3]
        self.tokens += h.shape[0]

    def sum_over(self, team: Team) -> None:
        """Adds up what the processes of a team have gathered."""
        for sums in (self.sum_x, self.sum_d, self.xx, self.dx):
            assert sums is not None
            team.sum_(sums)
        self.tokens = round(team.sum(self.tokens))


def fit_bridge(
    moments: BridgeMoments, rank: int, gradients: torch.Tensor | None = None, sketched: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u [hidden, rank], v [rank, hidden], bias [hidden]), float32, of the best bridge of that rank.

    Args:
        gradients: second moments of dL/dh_out [hidden, hidden], damped, or None for plain least squares.
        sketched: whether directions within 1% of the best will do, where they are found several times faster.
    """
    assert moments.sum_x is not None and moments.sum_d is not None
    assert moments.xx is not None and moments.dx is not None
    count = moments.tokens
    mean_x, mean_d = moments.sum_x.double() / count, moments.sum_d.double() / count
    xx = damped(moments.xx.double() / count - torch.outer(mean_x, mean_x), RIDGE, torch.float64)
    dx = moments.dx.double() / count - torch.outer(mean_d, mean_x)
    full = torch.linalg.solve(xx, dx.T).T
    parts = weighted_svd(full, xx, gradients, rank if sketched else None)
    u, v = parts.factors(torch.arange(rank, device=full.device))
    bias = mean_d.float() - u @ (v @ mean_x.float())
    return u, v, bias
