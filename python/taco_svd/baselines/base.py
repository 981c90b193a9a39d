"""A baseline: a name, a paper, how it spends a budget, and how it carries that out (`methods` has its facts)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..architectures import Architecture, LinearSite, dense_weight
from ..decomposition import Decomposition
from ..plan import Plan
from ..progress import Progress
from ..structure import Structure
from ..surgery import put_factors
from .budget import Budget
from .workspace import Workspace

Allocate = Callable[[Workspace, Budget, Progress], "Decision"]
CarryOut = Callable[[Workspace, Architecture, Plan, Progress], None]


@dataclass(frozen=True)
class Decision:
    """What goes into a plan: the structure, and numbers that shape the factors or tell how it was found."""

    structure: Structure
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A published method.

    Attributes:
        name: on the command line.
        paper: title and arXiv number.
        allocate: turns a budget into a structure; None where layers are removed whole.
        carry_out: fills a structural copy of the dense model, in place; None where the pipeline's own step does.
    """

    name: str
    paper: str
    allocate: Allocate | None = None
    carry_out: CarryOut | None = None


def uniform(workspace: Workspace, budget: Budget, progress: Progress) -> Decision:
    """Every layer of the budget at the same ranks."""
    ranks = budget.ranks()
    return Decision(low_rank(workspace, {layer: dict(ranks) for layer in budget.layers}))


def low_rank(workspace: Workspace, ranks: dict[int, dict[str, int]]) -> Structure:
    """All layers stay; the named linear maps are factorised."""
    depth = len(workspace.architecture.layers)
    return Structure(depth, tuple(range(depth)), {layer: paths for layer, paths in sorted(ranks.items()) if paths})


def truncating(
    title: str,
    decompose: Callable[[Workspace, LinearSite, torch.Tensor, Progress], Decomposition],
    kinds: Iterable[str],
) -> CarryOut:
    """A `carry_out` that decomposes every planned map by itself and keeps the largest singular values.

    `decompose(workspace, site, weight [out, in], progress)` is called on the weights of the dense model; it needs
    statistics of these kinds.
    """

    def carry_out(workspace: Workspace, architecture: Architecture, plan: Plan, progress: Progress) -> None:
        planned = [
            (architecture.site(layer, path), rank)
            for layer, ranks in plan.structure.low_rank.items()
            for path, rank in ranks.items()
        ]
        workspace.moments(progress, kinds)
        with progress.step(title) as report:
            for done, (site, rank) in enumerate(planned):
                weight = dense_weight(workspace.architecture.module(site)).detach()
                parts = decompose(workspace, site, weight, progress)
                put_factors(architecture, site, *parts.factors(torch.arange(rank, device=parts.sigma.device)))
                report(done + 1, len(planned))

    return carry_out
