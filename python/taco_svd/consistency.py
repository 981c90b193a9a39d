"""Consistency: re-fits a linear map, in closed form, to make good what the layers below it lost.

A map that writes to the residual stream is changed from W to W + D such that, on the inputs s that the compressed
model really gives it, the stream comes as close as a linear map can bring it to the dense model's:
D = argmin E|e - D s|^2 + lambda |D|^2, with e = what is still missing. The ridge anchors the fit at the weight that is
there. Its strength is chosen on windows that the fit does not see; where no strength helps on them, nothing changes.
(Least squares towards dense outputs on compressed inputs: SVD-LLM v2, AA-SVD; folded into a kept projection:
ReplaceMe, arXiv 2505.02819.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .team import Team

# Ridge strengths that are tried, as multiples of the inputs' mean second moment.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
# Above this many features the moments are kept in float32: two float64 matrices would be larger than the layer.
WIDE = 4096


@dataclass
class FitMoments:
    """Sums over tokens: inputs s [in] against inputs, what is missing e [out] against inputs, and |e|^2.

    With `affine` a constant input is appended, whose weight is a change of the bias.
    """

    affine: bool = False
    tokens: int = 0
    ss: torch.Tensor | None = None
    es: torch.Tensor | None = None
    ee: float = 0.0

    def add(self, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        """inputs [..., in] and missing [..., out] of the same tokens."""
        s = inputs.flatten(0, -2)
        wide = torch.float64 if s.shape[1] <= WIDE else torch.float32
        s = s.to(wide)
        e = missing.flatten(0, -2).to(wide)
        if self.affine:
            s = torch.cat([s, s.new_ones(s.shape[0], 1)], 1)
        # in place: of a wide layer one such matrix is larger than the layer
        self.ss = s.T @ s if self.ss is None else self.ss.addmm_(s.T, s)
        self.es = e.T @ s if self.es is None else self.es.addmm_(e.T, s)
        self.ee += float(e.square().sum(dtype=torch.float64))
        self.tokens += s.shape[0]

    def sum_over(self, team: Team) -> None:
        """Adds up what the processes of a team have gathered."""
        assert self.ss is not None and self.es is not None
        team.sum_(self.ss)
        team.sum_(self.es)
        self.ee, self.tokens = team.sum(self.ee), round(team.sum(self.tokens))

    def error_with(self, change: torch.Tensor | None) -> float:
        """Mean |e - D s|^2 per token for a change D [out, in], or mean |e|^2 without one."""
        if change is None or self.ss is None or self.es is None:
            return self.ee / max(1, self.tokens)
        left = change.to(self.ss.dtype)
        total = self.ee - 2 * float((left * self.es).sum()) + float(((left @ self.ss) * left).sum())
        return max(0.0, total) / self.tokens

    def second_moment(self) -> torch.Tensor:
        """E[s s^T] of the inputs, [in, in], without the constant."""
        assert self.ss is not None
        size = self.ss.shape[0] - self.affine
        return self.ss[:size, :size] / max(1, self.tokens)


@dataclass(frozen=True)
class Refit:
    """A change of a linear map and what it does on windows that the fit did not see.

    Attributes:
        change: [out, in], or [out, in + 1] with the bias's change last; None where none helped.
        ridge: the strength that was chosen.
        before, after: mean squared error of the residual stream, per token, on the held-out windows.
    """

    change: torch.Tensor | None
    ridge: float | None
    before: float
    after: float


def refit(fit: FitMoments, held_out: FitMoments, ridges: tuple[float, ...] = RIDGES) -> Refit:
    """The best change of a map by the held-out windows, among ridge strengths and no change at all."""
    assert fit.ss is not None and fit.es is not None
    before = held_out.error_with(None)
    best = Refit(None, None, before, before)
    mean = float(fit.ss.diagonal().mean())
    if not mean > 0:
        return best
    for ridge in ridges:
        regular = fit.ss.clone()
        regular.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(regular)
        del regular
        if int(failed):
            continue
        change = torch.cholesky_solve(fit.es.T, factor).T
        del factor
        after = held_out.error_with(change)
        if after < best.after:
            best = Refit(change, ridge, before, after)
    return best
