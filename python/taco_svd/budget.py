"""Spends one budget over the whole model: for every linear map dense or factorised at some rank, for every layer in or
out, such that the predicted loss is least.

For a price per parameter each map's best option is found by itself; the price is bisected until the budget is met, and
what is left over then buys the ranks that win most per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .allocation import Sizes
from .architectures import Architecture, LinearSite, linear_shape
from .errors import TacoError
from .loss_curves import LossCurves
from .structure import Structure

# A map is factorised only if that saves at least this share of it: two products for less are not worth their launch.
LEAST_SAVING = 0.05
# ... and pivoted only if the pivot saves this share of the factors: gathering inputs is not free either.
LEAST_PIVOT_SAVING = 0.05
# From this size on ranks are multiples of what the hardware's matrix units take at once.
LARGE_MAP = 512
RANK_MULTIPLE = 16


@dataclass(frozen=True)
class Option:
    """A way to store one linear map: `rank` None is dense."""

    rank: int | None
    pivoted: bool
    parameters: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """What the allocator chose.

    Attributes:
        structure: layers that stay, ranks, pivots.
        parameters: of the whole model.
        predicted_loss: sum of the single losses (KL, nats per token) of everything chosen.
    """

    structure: Structure
    parameters: int
    predicted_loss: float


def factor_parameters(out_features: int, in_features: int, rank: int) -> tuple[int, bool]:
    """(numbers that two factors of that rank take, whether they are pivoted): the pivot's indices count as numbers."""
    plain = rank * (out_features + in_features)
    pivoted = plain - rank * rank + in_features
    return (pivoted, True) if plain - pivoted >= LEAST_PIVOT_SAVING * plain else (plain, False)


def map_options(out_features: int, in_features: int, curve: torch.Tensor) -> list[Option]:
    """Dense, and every rank worth having, with what they cost; the largest first."""
    size = out_features * in_features
    full = min(out_features, in_features)
    step = RANK_MULTIPLE if full >= LARGE_MAP else 1
    found = [Option(None, False, size, 0.0)]
    for rank in range(full - full % step if step > 1 else full, 0, -step):
        parameters, pivoted = factor_parameters(out_features, in_features, rank)
        if parameters <= (1 - LEAST_SAVING) * size:
            found.append(Option(rank, pivoted, parameters, float(curve[rank])))
    return sorted(found, key=lambda option: -option.parameters)


def lower_hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over size, the largest first.

    Those above it are never best at any price.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda entry: (-entry.parameters, entry.loss)):
        if hull and option.parameters == hull[-1].parameters:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(larger: Option, smaller: Option) -> float:
    """Loss per parameter saved."""
    return (smaller.loss - larger.loss) / (larger.parameters - smaller.parameters)


def allocate(
    architecture: Architecture, curves: LossCurves, most_parameters: int, layers: list[int] | None = None
) -> Allocation:
    """The structure of least predicted loss that has at most `most_parameters`.

    Args:
        curves: losses of single changes; maps that are not in it stay dense.
        layers: which layers may be touched; default all.

    Raises:
        TacoError: the budget cannot be reached; says what can.
    """
    sizes = Sizes.of(architecture)
    depth = sizes.depth
    allowed = set(range(depth) if layers is None else layers)
    every = {
        site: map_options(*linear_shape(architecture.module(site)), curve)
        for site, curve in curves.maps.items()
        if site.layer in allowed
    }
    options = {site: lower_hull(choices) for site, choices in every.items()}
    dense = sizes.total
    least = dense - sum(choices[0].parameters - choices[-1].parameters for choices in options.values())

    def choose(price: float) -> tuple[dict[LinearSite, Option], set[int]]:
        chosen = {
            site: min(choices, key=lambda option: option.loss + price * option.parameters)
            for site, choices in options.items()
        }
        removed: set[int] = set()
        for layer in sorted(allowed, key=lambda index: curves.removal.get(index, float("inf"))):
            here = [option for site, option in chosen.items() if site.layer == layer]
            maps = sum(options[site][0].parameters for site in options if site.layer == layer)
            stays = sum(option.loss for option in here) + price * (
                sizes.layer - maps + sum(option.parameters for option in here)
            )
            if curves.removal.get(layer, float("inf")) < stays and len(removed) < depth - 1:
                removed.add(layer)
        return {site: option for site, option in chosen.items() if site.layer not in removed}, removed

    def parameters(chosen: Mapping[LinearSite, Option], removed: set[int]) -> int:
        return (
            dense
            - len(removed) * sizes.layer
            - sum(options[site][0].parameters - option.parameters for site, option in chosen.items())
        )

    low, high = 0.0, 1.0
    while parameters(*choose(high)) > most_parameters:
        high *= 10
        if high > 1e12:
            raise TacoError(
                f"A budget of {most_parameters:,} parameters ({most_parameters / dense:.1%}) cannot be reached: with "
                f"every linear map at its smallest rank {least:,} ({least / dense:.1%}) remain; embeddings, norms and "
                "the head are not compressed."
            )
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 2
        if parameters(*choose(middle)) <= most_parameters:
            high = middle
        else:
            low = middle
        if low and high / low < 1 + 1e-9:
            break
    chosen, removed = choose(high)
    _spend_the_rest(chosen, every, most_parameters - parameters(chosen, removed))
    low_rank: dict[int, dict[str, int]] = {}
    pivoted: dict[int, list[str]] = {}
    for site, option in chosen.items():
        if option.rank is not None:
            low_rank.setdefault(site.layer, {})[site.path] = option.rank
            if option.pivoted:
                pivoted.setdefault(site.layer, []).append(site.path)
    structure = Structure(
        depth,
        tuple(layer for layer in range(depth) if layer not in removed),
        low_rank=dict(sorted(low_rank.items())),
        pivoted={layer: tuple(paths) for layer, paths in sorted(pivoted.items())},
    )
    loss = sum(option.loss for option in chosen.values()) + sum(curves.removal[layer] for layer in removed)
    return Allocation(structure, parameters(chosen, removed), loss)


def _spend_the_rest(chosen: dict[LinearSite, Option], options: Mapping[LinearSite, list[Option]], spare: int) -> None:
    """Moves maps to larger options, the best bargain first, while the budget allows it."""
    while True:
        best: tuple[float, LinearSite, Option] | None = None
        for site, option in chosen.items():
            for larger in options[site]:
                cost = larger.parameters - option.parameters
                if not 0 < cost <= spare:
                    continue
                gain = (option.loss - larger.loss) / cost
                if best is None or gain > best[0]:
                    best = (gain, site, larger)
        if best is None:
            return
        spare -= best[2].parameters - chosen[best[1]].parameters
        chosen[best[1]] = best[2]
