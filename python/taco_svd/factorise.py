"""Factorises the linear maps that a plan names, by the plan's method: plain, by attribution, or weighted.

Each way fills the same `LowRankLinear` modules; they differ in which decomposition of a weight is taken, which of its
directions are kept, and on which state of the model the statistics are gathered.
"""

from __future__ import annotations

import torch
from torch import nn

from .architectures import Architecture, LinearSite, dense_weight, linear_shape
from .attribution import SigmaGradients, top_directions
from .decomposition import Decomposition, damped, plain_svd, sketch_pays, weighted_svd
from .errors import TacoError
from .plan import Plan
from .progress import Progress
from .replacement import LowRankLinear
from .statistics import SecondMoments, groups_within_memory
from .structure import Structure
from .suffix import SuffixRunner

# Shrinkage of the second moments in taco mode: on classics-16l's validation text 0.1 / 0.01 was the best of
# {0, 0.01, 0.1} x {0.01, 0.1, 0.3}, within 0.1 perplexity of each other.
INPUT_DAMPING = 0.1
GRADIENT_DAMPING = 0.01


def factorise(architecture: Architecture, plan: Plan, runner: SuffixRunner, progress: Progress) -> None:
    """Puts factors in place of every linear map that `plan.structure.low_rank` names, in place.

    Raises:
        TacoError: when the plan's method makes no low-rank layers.
    """
    ways = {"svd": _factorise_plain, "paper": _factorise_paper, "taco": _factorise_weighted}
    if plan.method not in ways:
        raise TacoError(f"The plan has low-rank layers, which method {plan.method!r} does not make.")
    ways[plan.method](architecture, plan, runner, progress)


def check_ranks(architecture: Architecture, structure: Structure) -> None:
    """Raises a `TacoError` where a plan names a map that the model has not, or a rank beyond its size."""
    for layer, ranks in structure.low_rank.items():
        for path, rank in ranks.items():
            if path not in architecture.paths:
                raise TacoError(f"The plan names {path!r}; this model has {', '.join(architecture.paths)}.")
            shape = linear_shape(architecture.module(LinearSite(layer, path, "")))
            if rank > min(shape):
                raise TacoError(f"The plan wants rank {rank} for layer {layer}, {path}, a {shape[0]} x {shape[1]} map.")


def _factored(dense: nn.Module, parts: Decomposition, directions: torch.Tensor) -> LowRankLinear:
    """The module that stands for a dense map with these directions of its decomposition."""
    weight = dense_weight(dense)
    bias = getattr(dense, "bias", None)
    u, v = parts.factors(directions)
    module = LowRankLinear(
        weight.shape[1], weight.shape[0], len(directions), bias is not None, device="meta", dtype=weight.dtype
    ).to_empty(device=weight.device)
    with torch.no_grad():
        module.u.copy_(u)
        module.v.copy_(v)
        if module.bias is not None and isinstance(bias, torch.Tensor):
            module.bias.copy_(bias)
    module.train(dense.training)
    return module


def _rank_of(plan: Plan, site: LinearSite) -> int:
    return plan.structure.low_rank[site.layer][site.path]


def _planned_sites(architecture: Architecture, plan: Plan) -> list[LinearSite]:
    return [site for site in architecture.sites() if site.path in plan.structure.low_rank.get(site.layer, {})]


def _factorise_plain(architecture: Architecture, plan: Plan, runner: SuffixRunner, progress: Progress) -> None:
    """Largest singular values of each weight."""
    sites = _planned_sites(architecture, plan)
    with progress.step("singular value decomposition") as report:
        for done, site in enumerate(sites):
            parts = plain_svd(dense_weight(architecture.module(site)).detach())
            architecture.replace(
                site, _factored(architecture.module(site), parts, _leading(parts, _rank_of(plan, site)))
            )
            report(done + 1, len(sites))


def _factorise_paper(architecture: Architecture, plan: Plan, runner: SuffixRunner, progress: Progress) -> None:
    """arXiv 2501.00339, algorithm 1: layers from the top down, MLP then attention, |sigma dL/dsigma|.

    With the option `one_shot` the gradients of all maps come from one pass over the dense model instead.
    """
    planned = _planned_sites(architecture, plan)
    groups = [
        [site for site in planned if (site.layer, site.block) == (layer, block)]
        for layer in sorted(plan.structure.low_rank, reverse=True)
        for block in ("mlp", "attention")
    ]
    groups = [planned] if plan.options.get("one_shot") else [sites for sites in groups if sites]
    batches = len(runner.batches)
    with progress.step("gradient attribution" + ("" if len(groups) == 1 else ", layer by layer")) as report:
        for done, sites in enumerate(groups):
            parts = {site: plain_svd(dense_weight(architecture.module(site)).detach()) for site in sites}
            gradients = SigmaGradients(parts)

            def within(part: int, _: int, done: int = done) -> None:
                report(done * batches + part, len(groups) * batches)

            runner.backward(sites, gradients, within)
            for site in sites:
                directions = top_directions(gradients.importance(site), _rank_of(plan, site))
                architecture.replace(site, _factored(architecture.module(site), parts[site], directions))


def _factorise_weighted(architecture: Architecture, plan: Plan, runner: SuffixRunner, progress: Progress) -> None:
    """Truncation in the K-FAC metric, with statistics of the dense model for every map of every layer.

    One backward pass gathers them all where memory allows, else one per group of maps; the maps are replaced at the
    end, so that groups do not see each other's factors.
    """
    groups = groups_within_memory(architecture, _planned_sites(architecture, plan))
    input_damping = float(plan.options.get("input_damping", INPUT_DAMPING))
    gradient_damping = float(plan.options.get("gradient_damping", GRADIENT_DAMPING))
    made: dict[LinearSite, LowRankLinear] = {}
    batches = len(runner.batches)
    total = sum(batches + len(sites) for sites in groups)
    finished = 0
    with progress.step("activation and gradient statistics, weighted singular value decomposition") as report:
        for sites in groups:
            moments = SecondMoments()

            def within(part: int, _: int, before: int = finished) -> None:
                report(before + part, total)

            runner.backward(sites, moments, within)
            moments.finish()
            finished += batches
            for site in sites:
                dense = architecture.module(site)
                rank = _rank_of(plan, site)
                weight = dense_weight(dense).detach()
                # float32 is enough for triangular roots of damped moments, and half the memory
                dtype = torch.float32 if sketch_pays(weight.shape[0], weight.shape[1], rank) else torch.float64
                parts = weighted_svd(
                    weight,
                    damped(moments.inputs(site), input_damping, dtype),
                    damped(moments.gradients(site), gradient_damping, dtype),
                    rank,
                )
                made[site] = _factored(dense, parts, _leading(parts, rank))
                finished += 1
                report(finished, total)
    for site, module in made.items():
        architecture.replace(site, module)


def _leading(parts: Decomposition, rank: int) -> torch.Tensor:
    return torch.arange(rank, device=parts.sigma.device)
