"""Spends one budget over the whole model: for every linear map dense or factorised at some rank, for every layer in or
out, such that the predicted loss is least.

For a price per parameter each map's best option is found by itself; the price is bisected until the budget is met, and
what is left over then buys the ranks that win most per parameter. A budget may as well be one of bytes or of measured
seconds (`device_costs`): what an option costs is a `Costs` object's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
    cost: float


class Costs(Protocol):
    """What a budget counts.

    Attributes:
        unit: what `render` calls it in messages and plans.
        total, layer: of the dense model, and of one of its layers.
    """

    unit: str
    total: float
    layer: float

    def of_map(self, out_features: int, in_features: int, rank: int | None, pivoted: bool) -> float:
        """Of one linear map, dense (rank None) or factorised."""
        ...

    def render(self, amount: float) -> str:
        """An amount for people."""
        ...


class ParameterCosts:
    """A budget of parameters: the indices of a pivot count as numbers."""

    unit = "parameters"

    def __init__(self, sizes: Sizes) -> None:
        self.total: float = sizes.total
        self.layer: float = sizes.layer

    def of_map(self, out_features: int, in_features: int, rank: int | None, pivoted: bool) -> float:
        return out_features * in_features if rank is None else _numbers(out_features, in_features, rank, pivoted)

    def render(self, amount: float) -> str:
        return f"{int(amount):,} parameters"


class ByteCosts:
    """A budget of bytes of weights; a pivot's indices are int32."""

    unit = "bytes"

    def __init__(self, sizes: Sizes, itemsize: int) -> None:
        self.itemsize = itemsize
        self.total: float = sizes.total * itemsize
        self.layer: float = sizes.layer * itemsize

    def of_map(self, out_features: int, in_features: int, rank: int | None, pivoted: bool) -> float:
        if rank is None:
            return out_features * in_features * self.itemsize
        numbers = _numbers(out_features, in_features, rank, pivoted) - pivoted * in_features
        return numbers * self.itemsize + pivoted * in_features * 4

    def render(self, amount: float) -> str:
        return f"{int(amount):,} bytes"


def _numbers(out_features: int, in_features: int, rank: int, pivoted: bool) -> int:
    plain = rank * (out_features + in_features)
    return plain - rank * rank + in_features if pivoted else plain


@dataclass(frozen=True)
class Allocation:
    """What the allocator chose.

    Attributes:
        structure: layers that stay, ranks, pivots.
        parameters: of the whole model.
        predicted_loss: sum of the single losses (KL, nats per token) of everything chosen.
        cost: in the budget's unit.
    """

    structure: Structure
    parameters: int
    predicted_loss: float
    cost: float


def factor_parameters(out_features: int, in_features: int, rank: int) -> tuple[int, bool]:
    """(numbers that two factors of that rank take, whether they are pivoted): the pivot's indices count as numbers."""
    plain, pivoted = (_numbers(out_features, in_features, rank, is_pivoted) for is_pivoted in (False, True))
    return (pivoted, True) if plain - pivoted >= LEAST_PIVOT_SAVING * plain else (plain, False)


def map_options(out_features: int, in_features: int, curve: torch.Tensor, costs: Costs | None = None) -> list[Option]:
    """Dense, and every rank worth having, with what they cost (default: parameters); the dearest first.

    What costs no less than the dense map is left out: with measured seconds, factors that are not faster.
    """
    size = out_features * in_features
    full = min(out_features, in_features)
    step = RANK_MULTIPLE if full >= LARGE_MAP else 1
    dense = size if costs is None else costs.of_map(out_features, in_features, None, False)
    found = [Option(None, False, size, 0.0, dense)]
    for rank in range(full - full % step if step > 1 else full, 0, -step):
        parameters, pivoted = factor_parameters(out_features, in_features, rank)
        if parameters <= (1 - LEAST_SAVING) * size:
            cost = parameters if costs is None else costs.of_map(out_features, in_features, rank, pivoted)
            if cost < dense:
                found.append(Option(rank, pivoted, parameters, float(curve[rank]), cost))
    return sorted(found, key=lambda option: -option.cost)


def lower_hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over cost, the dearest first.

    Those above it are never best at any price.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda entry: (-entry.cost, entry.loss)):
        if hull and option.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(larger: Option, smaller: Option) -> float:
    """Loss per unit of cost saved."""
    return (smaller.loss - larger.loss) / (larger.cost - smaller.cost)


def allocate(
    architecture: Architecture,
    curves: LossCurves,
    most: float,
    layers: list[int] | None = None,
    costs: Costs | None = None,
) -> Allocation:
    """The structure of least predicted loss that costs at most `most`.

    Args:
        curves: losses of single changes; maps that are not in it stay dense.
        layers: which layers may be touched; default all.
        costs: what the budget counts; default parameters.

    Raises:
        TacoError: the budget cannot be reached; says what can.
    """
    sizes = Sizes.of(architecture)
    costs = costs or ParameterCosts(sizes)
    depth = sizes.depth
    allowed = set(range(depth) if layers is None else layers)
    every = {
        site: map_options(*linear_shape(architecture.module(site)), curve, costs)
        for site, curve in curves.maps.items()
        if site.layer in allowed
    }
    options = {site: lower_hull(choices) for site, choices in every.items()}
    dense = costs.total
    least = dense - sum(choices[0].cost - choices[-1].cost for choices in options.values())

    def choose(price: float) -> tuple[dict[LinearSite, Option], set[int]]:
        chosen = {
            site: min(choices, key=lambda option: option.loss + price * option.cost)
            for site, choices in options.items()
        }
        removed: set[int] = set()
        for layer in sorted(allowed, key=lambda index: curves.removal.get(index, float("inf"))):
            here = [option for site, option in chosen.items() if site.layer == layer]
            maps = sum(options[site][0].cost for site in options if site.layer == layer)
            stays = sum(option.loss for option in here) + price * (
                costs.layer - maps + sum(option.cost for option in here)
            )
            if curves.removal.get(layer, float("inf")) < stays and len(removed) < depth - 1:
                removed.add(layer)
        return {site: option for site, option in chosen.items() if site.layer not in removed}, removed

    def cost(chosen: Mapping[LinearSite, Option], removed: set[int]) -> float:
        return (
            dense
            - len(removed) * costs.layer
            - sum(options[site][0].cost - option.cost for site, option in chosen.items())
        )

    low, high = 0.0, 1.0
    while cost(*choose(high)) > most:
        high *= 10
        if high > 1e12 / min(1.0, costs.layer):  # seconds are small numbers, and their prices large ones
            raise TacoError(
                f"A budget of {costs.render(most)} ({most / dense:.1%}) cannot be reached: with "
                f"every linear map at its smallest rank {costs.render(least)} ({least / dense:.1%}) remain; "
                "embeddings, norms and the head are not compressed."
            )
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 2
        if cost(*choose(middle)) <= most:
            high = middle
        else:
            low = middle
        if low and high / low < 1 + 1e-9:
            break
    chosen, removed = choose(high)
    _spend_the_rest(chosen, every, most - cost(chosen, removed))
    low_rank: dict[int, dict[str, int]] = {}
    pivoted: dict[int, list[str]] = {}
    saved = len(removed) * sizes.layer
    for site, option in chosen.items():
        if option.rank is not None:
            saved += every[site][0].parameters - option.parameters
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
    return Allocation(structure, sizes.total - saved, loss, cost(chosen, removed))


def _spend_the_rest(chosen: dict[LinearSite, Option], options: Mapping[LinearSite, list[Option]], spare: float) -> None:
    """Moves maps to larger options, the best bargain first, while the budget allows it."""
    while True:
        best: tuple[float, LinearSite, Option] | None = None
        for site, option in chosen.items():
            for larger in options[site]:
                cost = larger.cost - option.cost
                if not 0 < cost <= spare:
                    continue
                gain = (option.loss - larger.loss) / cost
                if best is None or gain > best[0]:
                    best = (gain, site, larger)
        if best is None:
            return
        spare -= best[2].cost - chosen[best[1]].cost
        chosen[best[1]] = best[2]
