"""Factorises the linear maps that a plan names, by the plan's method: plain or by attribution (taco: `sequential`).

Each way fills the same `LowRankLinear` modules; they differ in which decomposition of a weight is taken, which of its
directions are kept, and on which state of the model the statistics are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .architectures import Architecture, LinearSite, dense_weight, linear_shape
from .attributed import Attributed
from .attribution import SigmaGradients, top_directions
from .built import restore_layer
from .decomposition import plain_svd
from .errors import TacoError
from .memory import release
from .plan import Plan
from .progress import Progress, Report
from .replacement import LowRankLinear
from .store import Store
from .structure import Structure
from .suffix import SuffixRunner
from .surgery import put_factors

# Paper mode: the share of the kept directions that may be expected beyond the candidates before all are attributed.
MISSING_SHARE = 0.01


def factorise(
    architecture: Architecture,
    plan: Plan,
    runner: SuffixRunner,
    progress: Progress,
    store: Store | None = None,
    attributed: Attributed | None = None,
) -> None:
    """Puts factors in place of every linear map that `plan.structure.low_rank` names, in place.

    With a `store` finished layers (paper mode: blocks) are kept there, and taken from there. Maps that are `attributed`
    already (paper mode, `one_shot`) are not again.

    Raises:
        TacoError: when the plan's method makes no low-rank layers.
    """
    if plan.method == "svd":
        _factorise_plain(architecture, plan, progress, store)
    elif plan.method == "paper":
        _factorise_paper(architecture, plan, runner, progress, store, attributed)
    else:
        raise TacoError(f"The plan has low-rank layers, which method {plan.method!r} does not make.")


def check_ranks(architecture: Architecture, structure: Structure) -> None:
    """Raises a `TacoError` where a plan names a map that the model has not, a rank beyond its size, a bridge over
    nothing, or nothing at all.
    """
    for layer, ranks in structure.low_rank.items():
        for path, rank in ranks.items():
            if path not in architecture.paths:
                raise TacoError(f"The plan names {path!r}; this model has {', '.join(architecture.paths)}.")
            shape = linear_shape(architecture.module(architecture.site(layer, path)))
            if rank > min(shape):
                raise TacoError(f"The plan wants rank {rank} for layer {layer}, {path}, a {shape[0]} x {shape[1]} map.")
    hidden = architecture.model.config.hidden_size
    for bridge in structure.bridges:
        if bridge.rank > hidden:
            raise TacoError(f"The plan wants a bridge of rank {bridge.rank} in a stream of {hidden} features.")
        if bridge.after + 1 in structure.kept or bridge.after + 1 >= structure.source_layers:
            raise TacoError(
                f"The plan has a bridge after layer {bridge.after}, and the layer behind it is not taken out: there is "
                "nothing for it to stand for. Take the bridge out of the plan, or the layer out of `kept`."
            )
    if not (structure.low_rank or structure.removed or structure.narrow):
        raise TacoError("The plan keeps every layer as it is: there is nothing to do.")


def _rank_of(plan: Plan, site: LinearSite) -> int:
    return plan.structure.low_rank[site.layer][site.path]


def _planned_sites(architecture: Architecture, plan: Plan) -> list[LinearSite]:
    return [site for site in architecture.sites() if site.path in plan.structure.low_rank.get(site.layer, {})]


def _factorise_plain(architecture: Architecture, plan: Plan, progress: Progress, store: Store | None) -> None:
    """Largest singular values of each weight."""
    sites = _planned_sites(architecture, plan)
    layers = sorted({site.layer for site in sites})
    with progress.step("singular value decomposition") as report:
        for done, layer in enumerate(layers):
            if not _restored(store, f"built/{layer}", architecture, plan, layer):
                for site in [site for site in sites if site.layer == layer]:
                    rank = _rank_of(plan, site)
                    parts = plain_svd(dense_weight(architecture.module(site)).detach(), rank)
                    put_factors(architecture, site, *parts.factors(torch.arange(rank, device=parts.sigma.device)))
                _keep(store, f"built/{layer}", architecture, plan, layer)
            report(done + 1, len(layers))


def _restored(
    store: Store | None, entry: str, architecture: Architecture, plan: Plan, layer: int, block: str | None = None
) -> bool:
    """Puts a layer (or one of its blocks) from the store into place, where it is there."""
    if store is None or entry not in store:
        return False
    restore_layer(store, entry, architecture, plan.structure, layer, block)
    return True


def _keep(
    store: Store | None,
    entry: str,
    architecture: Architecture,
    plan: Plan,
    layer: int,
    block: str | None = None,
    note: Any = None,
) -> None:
    """Stores the factors of a layer (or of one of its blocks); those in use are the stored ones from then on."""
    if store is None:
        return
    own: dict[str, torch.Tensor] = {}
    for site in architecture.sites([layer], block):
        module = architecture.module(site)
        if isinstance(module, LowRankLinear):
            own |= {f"{site.path}.{name}": tensor for name, tensor in module.state_dict().items()}
    store.put(entry, own, note)
    restore_layer(store, entry, architecture, plan.structure, layer, block)


def _factorise_paper(
    architecture: Architecture,
    plan: Plan,
    runner: SuffixRunner,
    progress: Progress,
    store: Store | None,
    attributed: Attributed | None,
) -> None:
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
    full: set[str] = set()
    with progress.step("gradient attribution" + ("" if len(groups) == 1 else ", layer by layer")) as report:
        for done, sites in enumerate(groups):
            one_block = {(site.layer, site.block) for site in sites}
            entry, (layer, block) = "", min(one_block)
            if len(one_block) == 1:  # in one shot all are finished at once
                entry = f"built/{layer}-{block}"
                if _restored(store, entry, architecture, plan, layer, block):
                    assert store is not None
                    full = set(store.note(entry))
                    continue
            ranks = plan.structure.low_rank
            found = Attributed(architecture, ranks) if attributed is None else attributed.narrowed(ranks)

            def within(part: float, done: int = done) -> None:
                report(int((done + part) * batches), len(groups) * batches)

            _attribute(found, [site for site in sites if site not in found.importance], full, runner, within)
            # The definition is over all directions. Where candidates may lack some, all are looked at after all, and
            # at once for the same map of the layers below.
            narrow = [site for site in sites if found.lacking(site) > MISSING_SHARE]
            full.update(site.path for site in narrow)
            _attribute(found, narrow, full, runner)
            for site in sites:
                directions = top_directions(found.importance[site], _rank_of(plan, site))
                put_factors(architecture, site, *found.decomposition(site).factors(directions))
                release()  # the decomposition and its work space, between factors that stay
            if entry:
                _keep(store, entry, architecture, plan, layer, block, sorted(full))


def _attribute(
    found: Attributed,
    sites: list[LinearSite],
    full: set[str],
    runner: SuffixRunner,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Passes over the calibration set, as many as memory asks for; maps whose path is in `full` by all directions."""
    passes = []
    for whole in (False, True):
        groups = found.groups([site for site in sites if (site.path in full) == whole], whole)
        passes += [(group, whole) for group in groups]
    for number, (group, whole) in enumerate(passes):

        def within(batch: int, batches: int, number: int = number) -> None:
            if progress is not None:
                progress((number + batch / batches) / len(passes))

        def run(gradients: SigmaGradients, group: list[LinearSite] = group, within: Report = within) -> None:
            runner.backward(group, gradients, within)

        found.gather(group, run, whole)
