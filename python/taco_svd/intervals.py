"""Statistics of timings: medians of ratios with their intervals, and percentiles."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies minus one, as fractions: median over rounds and a bootstrap 95% interval."""

    median: float
    low: float
    high: float


def bootstrap(ratios: list[float], draws: int = 2000, seed: int = 0) -> Ratio:
    """Median of ratios, in the order of their rounds, and the 95% interval of that median, by resampling rounds.

    Resampling takes rounds to be independent. Where a neighbour on the machine slows one of the two for a while, rounds
    that follow each other are alike and say less than their number: the interval is widened by the square root of how
    many of them count as one.
    """
    values = torch.tensor(ratios, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    medians = values[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    median, wider = float(values.quantile(0.5)), rounds_like_one(ratios) ** 0.5
    return Ratio(median, median - wider * (median - low), median + wider * (high - median))


def rounds_like_one(ratios: list[float]) -> float:
    """How many rounds of a series tell as much of its median as one independent round: 1 where none resembles the last.

    The integrated autocorrelation time of the side of the median that a round lies on, which is what a median's error
    depends on. Correlations are summed by Geyer's initial monotone sequence: in pairs of lags, as long as the pairs are
    above zero and falling, since what is behind them is noise (Practical Markov Chain Monte Carlo, 1992).
    """
    values = torch.tensor(ratios, dtype=torch.float64)
    sides = (values - values.quantile(0.5)).sign()
    sides -= sides.mean()
    power = float(sides @ sides)
    if power == 0:
        return 1.0
    total, last = -1.0, float("inf")
    for lag in range(0, len(sides) // 2, 2):
        pair = sum(float(sides[: len(sides) - by] @ sides[by:]) for by in (lag, lag + 1)) / power
        if pair <= 0:
            break
        last = min(last, pair)
        total += 2 * last
    return max(1.0, total)


def percentiles(values: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, under ``p20``, ``p50`` and ``p80``; of a single value that value."""
    if len(values) < 2:
        return {"p20": values[0], "p50": values[0], "p80": values[0]}
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
