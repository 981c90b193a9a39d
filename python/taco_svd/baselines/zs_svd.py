"""ZS-SVD: singular values dropped over the whole model such that the predicted changes of the loss cancel.

A. Abbasi et al., "Zero sum SVD: balancing loss sensitivity for low rank LLM compression", arXiv 2602.02848: in the
whitened coordinates of W L (E[x x^T] = L L^T), dropping sigma_i changes the loss by -sigma_i u_i^T (dL/dW L^-T) v_i to
first order. Every matrix offers its smallest remaining singular value; of the offers whose change has the sign that
takes the running sum back towards zero the smallest is dropped, until the budget is met. A matrix saves nothing until
its rank is below the break-even rank mn / (m + n), and stays dense where it does not get there. (Without the paper's
int8 remapping and its optional gradient correction, which change the number format or need further passes.)
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from ..architectures import LinearSite
from ..decomposition import Decomposition
from ..errors import TacoError
from ..progress import Progress
from .base import Baseline, Decision, low_rank, truncating
from .budget import Budget
from .whitening import whitened
from .workspace import Workspace

Key = TypeVar("Key")


def drop_effects(parts: Decomposition, weight_gradient: torch.Tensor) -> torch.Tensor:
    """-sigma_i dL/dsigma_i for each direction of a decomposition, from dL/dW [out, in]: float64 [k].

    With W = left diag(sigma) right, dL/dsigma_i = left_i^T (dL/dW) right_i^T, whatever the metric of the
    decomposition: the whitening is inside `right`.
    """
    inner = torch.einsum("oi,on,in->i", parts.left.double(), weight_gradient.double(), parts.right.double())
    return -parts.sigma.double() * inner


def zero_sum_ranks(
    effects: Mapping[Key, Sequence[float]], shapes: Mapping[Key, tuple[int, int]], parameters: int
) -> dict[Key, int]:
    """Ranks such that all matrices together keep at most `parameters`; break-even ranks and above mean dense.

    Args:
        effects: per matrix the predicted change of the loss when a direction is dropped, by descending sigma.
        shapes: per matrix (out, in).

    Returns:
        rank per matrix; those that stay dense are left out.

    Raises:
        TacoError: rank 1 everywhere is more than that.
    """
    ranks = {key: len(values) for key, values in effects.items()}
    kept = sum(m * n for m, n in shapes.values())
    # offers by the sign of their effect, the smallest first; the counter keeps ties in order
    offers: dict[bool, list[tuple[float, int, Key]]] = {True: [], False: []}
    counter = 0

    def offer(key: Key) -> None:
        nonlocal counter
        if ranks[key] > 1:
            effect = effects[key][ranks[key] - 1]
            heapq.heappush(offers[effect >= 0], (abs(effect), counter, key))
            counter += 1

    def cost(key: Key) -> int:
        m, n = shapes[key]
        return min(m * n, ranks[key] * (m + n))

    for key in effects:
        offer(key)
    total = 0.0
    while kept > parameters:
        wanted = offers[total <= 0] or offers[total > 0]
        if not wanted:
            raise TacoError("--method zs-svd cannot meet the budget with rank 1 everywhere; keep more.")
        _, _, key = heapq.heappop(wanted)
        total += effects[key][ranks[key] - 1]
        before = cost(key)
        ranks[key] -= 1
        kept += cost(key) - before
        offer(key)
    return {key: rank for key, rank in ranks.items() if rank * sum(shapes[key]) < shapes[key][0] * shapes[key][1]}


def _allocate(workspace: Workspace, budget: Budget, progress: Progress) -> Decision:
    sites = workspace.sites(budget.layers)
    moments = workspace.moments(progress, ("second", "weight_gradient"))
    effects: dict[LinearSite, list[float]] = {}
    with progress.step("whitened singular value decomposition") as report:
        for done, site in enumerate(sites):
            parts = whitened(workspace, site, progress)
            effects[site] = drop_effects(parts, moments.weight_gradient[site]).tolist()
            report(done + 1, len(sites))
    ranks = zero_sum_ranks(effects, {site: budget.shapes[site.path] for site in sites}, budget.parameters)
    by_layer: dict[int, dict[str, int]] = {}
    for site, rank in ranks.items():
        by_layer.setdefault(site.layer, {})[site.path] = rank
    return Decision(low_rank(workspace, by_layer))


def _decompose(workspace: Workspace, site: LinearSite, weight: torch.Tensor, progress: Progress) -> Decomposition:
    return whitened(workspace, site, progress)


ZS_SVD = Baseline(
    "zs-svd",
    "Zero sum SVD: balancing loss sensitivity for low rank LLM compression, arXiv 2602.02848",
    _allocate,
    truncating("factors", _decompose, ("second", "weight_gradient")),
)
