"""Consistency: re-fits a linear map, in closed form, to make good what the layers below it lost.

A map that writes to the residual stream is changed from W to W + D such that, on the inputs s that the compressed
model really gives it, the stream comes as close as a linear map can bring it to the dense model's:
D = argmin E|e - D s|^2 + lambda |D|^2, with e = what is still missing. The ridge anchors the fit at the weight that is
there. Its strength is chosen on windows that the fit does not see; where no strength helps on them, nothing changes.
The moments of wide maps are larger than a layer: they are factored where they lie (`triangle`), and strengths are
compared on a random sketch of the outputs.
(Least squares towards dense outputs on compressed inputs: SVD-LLM v2, AA-SVD; folded into a kept projection:
ReplaceMe, arXiv 2505.02819.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .team import Team
from .triangle import cholesky_below_, restore_below_, solve_below

# Ridge strengths that are tried, as multiples of the inputs' mean second moment.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
# Above this many features the moments are kept in float32: two float64 matrices would be larger than the layer.
WIDE = 4096
# Ridge strengths are compared on so many random combinations of the outputs where there are more than twice as many.
SKETCHED_OUTPUTS = 512
# Outputs that are handled at once.
OUTPUT_BLOCK = 1024


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
        s = self._widened(inputs.flatten(0, -2))
        e = missing.flatten(0, -2).to(s.dtype)
        # in place: of a wide layer one such matrix is larger than the layer
        self.ss = s.T @ s if self.ss is None else self.ss.addmm_(s.T, s)
        self.es = e.T @ s if self.es is None else self.es.addmm_(e.T, s)
        self.ee += float(e.square().sum(dtype=torch.float64))
        self.tokens += s.shape[0]

    def _widened(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [tokens, in] in the dtype of the sums, with the constant."""
        s = inputs.to(torch.float64 if inputs.shape[1] <= WIDE else torch.float32)
        return torch.cat([s, s.new_ones(s.shape[0], 1)], 1) if self.affine else s

    def missing(self, outputs: slice) -> torch.Tensor:
        """The sums of what is missing against the inputs, of some outputs: [outputs, in]."""
        assert self.es is not None
        return self.es[outputs]

    def combined(self, signs: torch.Tensor) -> torch.Tensor:
        """The same of combinations of all outputs, whose weights are `signs` [combinations, out]."""
        assert self.es is not None
        return signs.to(self.es) @ self.es

    def sum_over(self, team: Team) -> None:
        """Adds up what the processes of a team have gathered."""
        assert self.ss is not None and self.es is not None
        team.sum_(self.ss)
        team.sum_(self.es)
        self.ee, self.tokens = team.sum(self.ee), round(team.sum(self.tokens))

    def error_less(self, gain: float) -> float:
        """Mean |e|^2 per token when its sum is less by `gain`."""
        return max(0.0, self.ee - gain) / max(1, self.tokens)

    def gain(self, change: torch.Tensor, es: torch.Tensor) -> float:
        """By how much a change D [rows, in] lowers the sum of squares, with `es` [rows, in] for what is missing."""
        assert self.ss is not None
        total = 0.0
        for rows in _blocks(len(change)):
            left = change[rows].to(self.ss.dtype)
            # D s s^T D^T - 2 D s e^T, both at once
            total += float((es[rows].mul(2).addmm_(left, self.ss, alpha=-1).mul_(left)).sum(dtype=torch.float64))
        return total

    def second_moment(self) -> torch.Tensor:
        """E[s s^T] of the inputs, [in, in], without the constant."""
        assert self.ss is not None
        return self._inputs(self.ss / max(1, self.tokens))

    def take_second_moment(self) -> torch.Tensor:
        """As `second_moment`, in the memory of the sums, which are gone afterwards."""
        assert self.ss is not None
        taken, self.ss, self.es = self.ss.div_(max(1, self.tokens)), None, None
        return self._inputs(taken)

    def _inputs(self, moment: torch.Tensor) -> torch.Tensor:
        size = len(moment) - self.affine
        return moment[:size, :size]


@dataclass
class HeldOutMoments(FitMoments):
    """Moments of windows that only judge. Few tokens are kept as they are: that takes less memory than their sums."""

    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        s, e = inputs.flatten(0, -2), missing.flatten(0, -2)
        if self.ss is None and 2 * (self.tokens + len(s)) <= s.shape[1]:
            self.kept.append((s.clone(), e.clone()))
            self.ee += float(e.square().sum(dtype=torch.float64))
            self.tokens += len(s)
            return
        self._sum_up()
        super().add(s, e)

    def _sum_up(self) -> None:
        if self.kept:
            kept, self.kept = self.kept, []
            self.tokens, self.ee = 0, 0.0
            for s, e in kept:
                super().add(s, e)

    def missing(self, outputs: slice) -> torch.Tensor:
        return self._against(lambda e: e[:, outputs]) if self.kept else super().missing(outputs)

    def combined(self, signs: torch.Tensor) -> torch.Tensor:
        return self._against(lambda e: e @ signs.T.to(e)) if self.kept else super().combined(signs)

    def _against(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The sums over the kept tokens of `pick(e)` [tokens, outputs] against the inputs: [outputs, in]."""
        pairs = [(self._widened(s), e) for s, e in self.kept]
        return torch.stack([pick(e.to(s.dtype)).T @ s for s, e in pairs]).sum(0)

    def sum_over(self, team: Team) -> None:
        if team.size > 1:
            self._sum_up()
            super().sum_over(team)

    def gain(self, change: torch.Tensor, es: torch.Tensor) -> float:
        if not self.kept:
            return super().gain(change, es)
        total = 2 * sum(float((es[rows] * change[rows]).sum(dtype=torch.float64)) for rows in _blocks(len(change)))
        for inputs, _ in self.kept:
            s = self._widened(inputs)
            for rows in _blocks(len(change)):
                total -= float((s @ change[rows].T.to(s.dtype)).square().sum(dtype=torch.float64))
        return total


def _blocks(outputs: int) -> list[slice]:
    return [slice(start, start + OUTPUT_BLOCK) for start in range(0, outputs, OUTPUT_BLOCK)]


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


def refit(fit: FitMoments, held_out: FitMoments, ridges: tuple[float, ...] = RIDGES, team: Team | None = None) -> Refit:
    """The best change of a map by the held-out windows, among ridge strengths and no change at all.

    Beside both moments it takes memory for a few matrices of the map's own size. Strengths are compared by what they
    gain on a sketch of the outputs (random signs: its expectation is the gain itself), the best is judged on all of
    them. The processes of a `team`, which all have the moments, share strengths and outputs, and end with the same.
    The change is made in the memory of `fit.es`, which is gone afterwards.
    """
    assert fit.ss is not None and fit.es is not None
    team = team or Team()
    before = held_out.error_less(0.0)
    none = Refit(None, None, before, before)
    mean = float(fit.ss.diagonal().mean())
    if not mean > 0:
        return none
    diagonal = fit.ss.diagonal().clone()
    change, fit.es = fit.es, None
    if len(change) > 2 * SKETCHED_OUTPUTS:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (SKETCHED_OUTPUTS, len(change)), generator=generator).mul_(2).sub_(1)
        signs = signs.to(change) / SKETCHED_OUTPUTS**0.5
        wanted, judged = signs @ change, held_out.combined(signs)
    else:
        wanted, judged = change, held_out.missing(slice(None))
    gains: dict[float, float] = {}
    factored: float | None = None
    try:
        for ridge in ridges[team.rank :: team.size]:
            restore_below_(fit.ss, diagonal + ridge * mean)
            if cholesky_below_(fit.ss):
                factored = ridge
                gains[ridge] = held_out.gain(solve_below(fit.ss, wanted.T).T, judged)
        gains = {ridge: gain for found in team.gather(gains) for ridge, gain in found.items() if gain > 0}
        if not gains:
            return none
        best = max(sorted(gains), key=lambda ridge: gains[ridge])
        if factored != best:
            restore_below_(fit.ss, diagonal + best * mean)
            cholesky_below_(fit.ss)
        gain = 0.0
        for number, rows in enumerate(_blocks(len(change))):
            if team.deals(number):
                change[rows] = solve_below(fit.ss, change[rows].T).T
                gain += held_out.gain(change[rows], held_out.missing(rows))
        for number, rows in enumerate(_blocks(len(change))):
            team.broadcast_(change[rows], number % team.size)
        after = held_out.error_less(team.sum(gain))
        return Refit(change, best, before, after) if after < before else none
    finally:
        restore_below_(fit.ss, diagonal)
