"""KFAC-SVD with LEMS: truncation in the K-FAC metric, ranks from measured and extrapolated errors.

M. Thoma et al., "Advancing SVD-based LLM compression via layer-wise error model search", ICML 2026
(github.com/lems-svd/lems).

- Decomposition: SVD of G^(1/2) W A^(1/2) with A = E[x x^T] and G = E[g g^T] of the gradients at the outputs, window
  edges left out and token norms clipped, shrunk towards their mean diagonal by 0.1 and 0.3.
- Errors: the squared singular values that a rank drops (its tail energy), scaled such that they give the
  Kullback-Leibler divergence of the model's predictions that was measured with the matrix at a tenth of its break-even
  rank, times a factor for depth, 1 + gamma h: h falls from 1 for the lowest layer to 0 for the highest, as the sum of
  (k + 1)^-alpha over the layers from it upwards.
- Allocation: per matrix one of its ranks, or dense; the least sum of errors within the budget. The paper solves it as
  an integer program; here by a Lagrange multiplier, what is left over spent by the largest gain per parameter.
- Ten pairs (alpha, gamma) are tried and judged by the measured divergence of the whole model. (The paper draws them by
  Optuna; here they are the points of a fixed low-discrepancy sequence.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn import functional

from ..architectures import Architecture, LinearSite, dense_weight
from ..decomposition import Decomposition, damped, weighted_svd
from ..errors import TacoError
from ..loss_curves import tail_energies
from ..module_tree import structural_copy
from ..progress import Progress
from ..suffix import SuffixRunner
from ..surgery import put_factors
from .base import Baseline, Decision, low_rank, truncating
from .budget import Budget
from .workspace import Workspace

INPUT_DAMPING, GRADIENT_DAMPING = 0.1, 0.3
# Where the divergence is measured, and the least share a matrix may keep, both of the break-even rank. The latter is
# 0.1 where the budget itself is below a half.
MEASURED_SHARE = 0.1
LEAST_SHARE, LEAST_SHARE_SMALL = 0.3, 0.1
ALPHAS, GAMMAS, TRIALS = (0.0, 3.0), (0.0, 7.0), 10
# Windows on which divergences are measured: one run per matrix.
WINDOWS = 8

Key = TypeVar("Key")


def _decomposition(workspace: Workspace, site: LinearSite, progress: Progress) -> Decomposition:
    moments = workspace.moments(progress, ("second", "clipped_gradients"))

    def make() -> Decomposition:
        return weighted_svd(
            dense_weight(workspace.architecture.module(site)).detach(),
            damped(moments.inputs(site), INPUT_DAMPING),
            damped(moments.clipped_gradients[site], GRADIENT_DAMPING),
        )

    return workspace.keep_decomposition(("kfac", site), make)


def depth_factor(layer: int, depth: int, alpha: float, gamma: float) -> float:
    """1 + gamma h, h = sum_{k >= layer} (k + 1)^-alpha brought to 1 for the lowest and 0 for the highest layer."""
    if depth == 1:
        return 1.0
    terms = [(k + 1.0) ** -alpha for k in range(depth)]
    highest, lowest = terms[-1], sum(terms)
    return 1 + gamma * (sum(terms[layer:]) - highest) / (lowest - highest)


@dataclass(frozen=True)
class Options:
    """The ranks that a matrix may have: costs in parameters (ascending) and predicted errors; the last is dense."""

    ranks: tuple[int, ...]
    costs: torch.Tensor
    errors: torch.Tensor


def options_of(tail: torch.Tensor, shape: tuple[int, int], scale: float, least: float) -> Options:
    """All ranks from `least` times break-even up to where factors cost as much as the matrix, and dense."""
    m, n = shape
    top = (m * n - 1) // (m + n)
    ranks = tuple(range(min(top, max(1, round(least * m * n / (m + n)))), top + 1))
    costs = torch.tensor([*(rank * (m + n) for rank in ranks), m * n], dtype=torch.float64)
    errors = torch.cat([tail[list(ranks)] * scale, tail.new_zeros(1)])
    return Options((*ranks, 0), costs, errors)


def least_error(options: Mapping[Key, Options], parameters: int) -> dict[Key, int]:
    """Index of the option of each matrix: little total error within the budget.

    For each multiplier every matrix takes the option of least error + multiplier * cost; the multiplier is bisected,
    the rest of the budget goes to the largest gains per parameter.

    Raises:
        TacoError: the cheapest options together cost more.
    """

    def choose(multiplier: float) -> dict[Key, int]:
        return {key: int((o.errors + multiplier * o.costs).argmin()) for key, o in options.items()}

    def spent(choice: Mapping[Key, int]) -> float:
        return sum(float(options[key].costs[index]) for key, index in choice.items())

    low, high = 0.0, 1e-12
    while spent(choose(high)) > parameters:
        high *= 4
        if high > 1e30:
            raise TacoError("--method kfac cannot meet the budget with the least ranks that it allows; keep more.")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(choose(middle)) <= parameters else (middle, high)
    choice = choose(high)
    left = parameters - spent(choice)
    while True:
        best: tuple[float, Key, int] | None = None
        for key, o in options.items():
            now = choice[key]
            more = o.costs[now + 1 :] - o.costs[now]
            gains = torch.where(more <= left, (o.errors[now] - o.errors[now + 1 :]) / more, -1.0)
            if len(gains) and float(gains.max()) > 0 and (best is None or float(gains.max()) > best[0]):
                best = (float(gains.max()), key, now + 1 + int(gains.argmax()))
        if best is None:
            return choice
        _, key, index = best
        left -= float(options[key].costs[index] - options[key].costs[choice[key]])
        choice[key] = index


@torch.no_grad()
def divergence(runner: SuffixRunner, reference: list[torch.Tensor]) -> float:
    """Mean over tokens of KL(reference || model), nats; `reference` are log-probabilities per batch."""
    total, tokens = 0.0, 0
    for index, dense in enumerate(reference):
        log_probabilities = functional.log_softmax(runner.logits(index).float(), dim=-1)
        total += float(functional.kl_div(log_probabilities, dense, reduction="sum", log_target=True))
        tokens += dense.shape[0] * dense.shape[1]
    return total / tokens


@torch.no_grad()
def _log_probabilities(runner: SuffixRunner) -> list[torch.Tensor]:
    return [functional.log_softmax(runner.logits(index).float(), dim=-1) for index in range(len(runner.batches))]


def scales(workspace: Workspace, progress: Progress, layers: tuple[int, ...]) -> dict[LinearSite, float]:
    """Per matrix: measured divergence over tail energy, at a tenth of the break-even rank."""
    sites = workspace.sites(layers)

    def make() -> dict[LinearSite, float]:
        tokens = workspace.calibration.tokens[:WINDOWS]
        trial = Architecture(structural_copy(workspace.architecture.model))
        reference = workspace.keep("log-probabilities", lambda: _log_probabilities(workspace.runner(0, WINDOWS)))
        measured_scales: dict[LinearSite, float] = {}
        runners: dict[int, SuffixRunner] = {}
        with progress.step("divergence of the model, one matrix at a time") as report:
            for done, site in enumerate(sites):
                if site.layer not in runners:
                    runners = {site.layer: SuffixRunner(trial, tokens, site.layer)}
                dense = trial.module(site)
                m, n = dense_weight(dense).shape
                rank = max(1, round(MEASURED_SHARE * m * n / (m + n)))
                parts = _decomposition(workspace, site, progress)
                put_factors(trial, site, *parts.factors(torch.arange(rank, device=parts.sigma.device)))
                tail = float(tail_energies(parts.sigma)[rank])
                measured = divergence(runners[site.layer], reference)
                trial.replace(site, dense)
                measured_scales[site] = measured / tail if tail > 0 else 0.0
                report(done + 1, len(sites))
        return measured_scales

    return workspace.keep(("kfac scales", layers), make)


def _trials() -> list[tuple[float, float]]:
    """Ten points (alpha, gamma) of the additive recurrence of the plastic number (R2), which fills a square evenly."""
    plastic = 1.32471795724474602596
    return [
        tuple(  # type: ignore[misc]
            low + (high - low) * ((0.5 + (trial + 1) / plastic**power) % 1)
            for power, (low, high) in ((1, ALPHAS), (2, GAMMAS))
        )
        for trial in range(TRIALS)
    ]


def _allocate(workspace: Workspace, budget: Budget, progress: Progress) -> Decision:
    scale = scales(workspace, progress, budget.layers)
    sites = workspace.sites(budget.layers)
    depth = len(workspace.architecture.layers)
    # what is reckoned from here on is small, and reckoned on the CPU
    tails = {site: tail_energies(_decomposition(workspace, site, progress).sigma.cpu()) for site in sites}
    reference = workspace.keep("log-probabilities", lambda: _log_probabilities(workspace.runner(0, WINDOWS)))
    least = LEAST_SHARE if budget.share >= 0.5 else LEAST_SHARE_SMALL
    best: tuple[float, dict[int, dict[str, int]], float, float] | None = None
    seen: dict[str, float] = {}
    with progress.step("trial allocations") as report:
        for done, (alpha, gamma) in enumerate(_trials()):
            options = {
                site: options_of(
                    tails[site],
                    budget.shapes[site.path],
                    scale[site] * depth_factor(site.layer, depth, alpha, gamma),
                    least,
                )
                for site in sites
            }
            ranks: dict[int, dict[str, int]] = {}
            for site, index in least_error(options, budget.parameters).items():
                if options[site].ranks[index]:  # 0 stands for dense
                    ranks.setdefault(site.layer, {})[site.path] = options[site].ranks[index]
            if str(ranks) not in seen:
                seen[str(ranks)] = _measure(workspace, ranks, reference, progress)
            if best is None or seen[str(ranks)] < best[0]:
                best = (seen[str(ranks)], ranks, alpha, gamma)
            report(done + 1, TRIALS)
    assert best is not None
    measured, ranks, alpha, gamma = best
    return Decision(low_rank(workspace, ranks), {"alpha": alpha, "gamma": gamma, "divergence": measured})


def _measure(
    workspace: Workspace, ranks: dict[int, dict[str, int]], reference: list[torch.Tensor], progress: Progress
) -> float:
    """Divergence of the whole model at these ranks."""
    trial = Architecture(structural_copy(workspace.architecture.model))
    for layer, paths in ranks.items():
        for path, rank in paths.items():
            site = trial.site(layer, path)
            parts = _decomposition(workspace, site, progress)
            put_factors(trial, site, *parts.factors(torch.arange(rank, device=parts.sigma.device)))
    return divergence(SuffixRunner(trial, workspace.calibration.tokens[:WINDOWS], 0), reference)


def _decompose(workspace: Workspace, site: LinearSite, weight: torch.Tensor, progress: Progress) -> Decomposition:
    return _decomposition(workspace, site, progress)


KFAC = Baseline(
    "kfac",
    "Advancing SVD-based LLM compression via layer-wise error model search (KFAC-SVD, LEMS), ICML 2026",
    _allocate,
    truncating("factors", _decompose, ("second", "clipped_gradients")),
)
