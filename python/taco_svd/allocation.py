"""Spends one budget over the whole model: for every linear map dense or factorised at some rank, for every layer in or
out, such that the predicted loss is least.

For a price per parameter each map's best option is found by itself; the price is bisected until the budget is met, and
what is left over then buys the ranks that win most per parameter. A budget may as well be one of bytes or of measured
seconds (`device_costs`): what an option costs is a `Costs` object's to say. Or it is the loss that is given, and the
highest price that stays within it is what is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .architectures import Architecture, LinearSite, linear_shape
from .budget import BRIDGE_EPS, Sizes
from .errors import TacoError
from .loss_curves import LossCurves
from .run_bridges import Run
from .structure import BridgeSpec, Structure

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

    def of_bridge(self, hidden: int, rank: int) -> float:
        """Of one bridge."""
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

    def of_bridge(self, hidden: int, rank: int) -> float:
        return hidden * (2 * rank + 1)

    def render(self, amount: float) -> str:
        return f"{int(amount):,} parameters"


class ByteCosts:
    """A budget of bytes of weights; a pivot's indices are int32.

    `total`: the dense model's, where not all of it has the item size (norms or routers in float32).
    """

    unit = "bytes"

    def __init__(self, sizes: Sizes, itemsize: int, total: int | None = None) -> None:
        self.itemsize = itemsize
        self.total: float = sizes.total * itemsize if total is None else total
        self.layer: float = sizes.layer * itemsize

    def of_map(self, out_features: int, in_features: int, rank: int | None, pivoted: bool) -> float:
        if rank is None:
            return out_features * in_features * self.itemsize
        numbers = _numbers(out_features, in_features, rank, pivoted) - pivoted * in_features
        return numbers * self.itemsize + pivoted * in_features * 4

    def of_bridge(self, hidden: int, rank: int) -> float:
        return hidden * (2 * rank + 1) * self.itemsize

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
    market = _Market(architecture, curves, layers, costs)
    low, high = 0.0, 1.0
    while market.cost(*market.choose(high)) > most:
        high *= 10
        if high > market.highest and not market.side_by_side:
            market.side_by_side, high = True, 1.0
        if high > market.highest:
            least, render = market.least, market.costs.render
            raise TacoError(
                f"A budget of {render(most)} ({most / market.dense:.1%}) cannot be reached: with "
                f"every linear map at its smallest rank {render(least)} ({least / market.dense:.1%}) remain; "
                "embeddings, norms and the head are not compressed."
            )
    _, high = _bisected(low, high, lambda price: market.cost(*market.choose(price)) > most)
    chosen, gone = market.choose(high)
    _spend_the_rest(chosen, market.every, most - market.cost(chosen, gone))
    return market.allocation(chosen, gone)


def allocate_within(
    architecture: Architecture, curves: LossCurves, most_loss: float, layers: list[int] | None = None
) -> Allocation:
    """The smallest structure, in parameters, whose predicted loss (KL, nats per token) is at most `most_loss`.

    Args: as of `allocate`.

    Raises:
        TacoError: no change is so cheap.
    """
    market = _Market(architecture, curves, layers, None)
    low, high = 0.0, 1e-12
    while market.loss(*market.choose(high)) <= most_loss and high <= market.highest:
        low, high = high, high * 10
    low, _ = _bisected(low, high, lambda price: market.loss(*market.choose(price)) <= most_loss)
    chosen, gone = market.choose(low)
    found = market.allocation(chosen, gone)
    if not (found.structure.low_rank or gone.layers):
        raise TacoError(
            f"A loss of {most_loss:.2g} nats per token is out of reach: every change that saves parameters is "
            "predicted to lose more. Allow more, or take --keep."
        )
    return found


def _bisected(low: float, high: float, too_low: Callable[[float], bool]) -> tuple[float, float]:
    """Neighbouring prices, of which the first is too low and the second is not."""
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 2
        if too_low(middle):
            low = middle
        else:
            high = middle
        if low and high / low < 1 + 1e-9:
            break
    return low, high


class _Market:
    """What can be chosen, and what is best at a price.

    Attributes:
        every: of each linear map, dense and every rank worth having, the dearest first.
        dense, least: cost of the dense model, and of that with every map at its smallest rank.
        highest: a price beyond which nothing changes.
        side_by_side: whether layers next to each other may go. Single losses of neighbours add up to less than both
            together cost; bridged runs were measured as runs.
    """

    def __init__(
        self, architecture: Architecture, curves: LossCurves, layers: list[int] | None, costs: Costs | None
    ) -> None:
        self._sizes = Sizes.of(architecture)
        self.costs: Costs = costs or ParameterCosts(self._sizes)
        self._depth = self._sizes.depth
        self._curves = curves
        self._allowed = set(range(self._depth) if layers is None else layers)
        self.every = {
            site: map_options(*linear_shape(architecture.module(site)), curve, self.costs)
            for site, curve in curves.maps.items()
            if site.layer in self._allowed
        }
        self._options = {site: lower_hull(choices) for site, choices in self.every.items()}
        self.dense: float = self.costs.total
        self.least = self.dense - sum(choices[0].cost - choices[-1].cost for choices in self._options.values())
        self.highest = 1e12 / min(1.0, self.costs.layer)  # seconds are small numbers, and their prices large ones
        self._hidden: int = architecture.model.config.hidden_size
        self._spans = {
            run: entry for run, entry in curves.bridged.items() if set(range(run[0], run[1] + 1)) <= self._allowed
        }
        self.side_by_side = not self._spans

    def choose(self, price: float) -> tuple[dict[LinearSite, Option], _Gone]:
        """Of each map that stays the option, and which layers go, at least loss plus price times cost."""
        chosen = {
            site: min(choices, key=lambda option: option.loss + price * option.cost)
            for site, choices in self._options.items()
        }
        stays = [price * self.costs.layer] * self._depth
        for site, option in chosen.items():
            stays[site.layer] += option.loss + price * (option.cost - self._options[site][0].cost)
        removal = self._curves.removal
        goes = [removal.get(layer, math.inf) if layer in self._allowed else math.inf for layer in range(self._depth)]
        bridges = {
            run: loss + price * self.costs.of_bridge(self._hidden, rank) for run, (rank, loss) in self._spans.items()
        }
        gone = cheapest_layers(stays, goes, bridges, self.side_by_side)
        return {site: option for site, option in chosen.items() if site.layer not in gone.layers}, gone

    def cost(self, chosen: Mapping[LinearSite, Option], gone: _Gone) -> float:
        return (
            self.dense
            - len(gone.layers) * self.costs.layer
            + sum(self.costs.of_bridge(self._hidden, self._spans[run][0]) for run in gone.bridged)
            - sum(self._options[site][0].cost - option.cost for site, option in chosen.items())
        )

    def loss(self, chosen: Mapping[LinearSite, Option], gone: _Gone) -> float:
        """Predicted: the sum of single losses."""
        return (
            sum(option.loss for option in chosen.values())
            + sum(self._curves.removal[layer] for layer in gone.plainly)
            + sum(self._spans[run][1] for run in gone.bridged)
        )

    def allocation(self, chosen: Mapping[LinearSite, Option], gone: _Gone) -> Allocation:
        """What was chosen, as a structure."""
        spans = self._spans
        low_rank: dict[int, dict[str, int]] = {}
        pivoted: dict[int, list[str]] = {}
        saved = len(gone.layers) * self._sizes.layer
        saved -= sum(self._hidden * (2 * spans[run][0] + 1) for run in gone.bridged)
        for site, option in chosen.items():
            if option.rank is not None:
                saved += self.every[site][0].parameters - option.parameters
                low_rank.setdefault(site.layer, {})[site.path] = option.rank
                if option.pivoted:
                    pivoted.setdefault(site.layer, []).append(site.path)
        structure = Structure(
            self._depth,
            tuple(layer for layer in range(self._depth) if layer not in gone.layers),
            bridges=tuple(
                BridgeSpec(first - 1, spans[first, last][0], True, BRIDGE_EPS) for first, last in gone.bridged
            ),
            low_rank=dict(sorted(low_rank.items())),
            pivoted={layer: tuple(paths) for layer, paths in sorted(pivoted.items())},
        )
        return Allocation(structure, self._sizes.total - saved, self.loss(chosen, gone), self.cost(chosen, gone))


@dataclass(frozen=True)
class _Gone:
    """Layers that are taken out: some with nothing in their place, some in runs with a bridge."""

    plainly: tuple[int, ...]
    bridged: tuple[Run, ...]

    @property
    def layers(self) -> set[int]:
        return {*self.plainly, *(layer for first, last in self.bridged for layer in range(first, last + 1))}


def cheapest_layers(
    stays: Sequence[float], goes: Sequence[float], bridges: Mapping[Run, float], side_by_side: bool = True
) -> _Gone:
    """Which layers to take out, and how, at least total cost; at least one stays.

    A bridge hangs on a layer that stays, and what follows its run stays too: a run that met another one would be one
    longer run, which was measured as such. By dynamic programming over the layers from the bottom.

    Args:
        stays, goes: per layer what keeping it and plainly removing it cost (infinity: not allowed).
        bridges: what runs (first, last) cost when a bridge stands for them.
        side_by_side: whether layers that are next to each other may be removed plainly.
    """
    depth = len(stays)
    empty = _Gone((), ())
    # for every number of layers decided: least cost and choice, by the kind of the last one; "none": all are gone
    table: list[dict[str, tuple[float, _Gone]]] = [{"none": (0.0, empty)}]
    for layer in range(depth):
        best: dict[str, tuple[float, _Gone]] = {}

        def offer(kind: str, cost: float, gone: _Gone, best: dict[str, tuple[float, _Gone]] = best) -> None:
            if cost < best.get(kind, (math.inf,))[0]:
                best[kind] = (cost, gone)

        for kind, (cost, gone) in table[layer].items():
            offer("stays", cost + stays[layer], gone)
            if kind == "stays" or (kind != "bridge" and side_by_side) or (kind == "none" and layer == 0):
                after = "none" if kind == "none" else "goes"
                offer(after, cost + goes[layer], _Gone((*gone.plainly, layer), gone.bridged))
        for (first, last), price in bridges.items():
            if last == layer and "stays" in table[first]:
                cost, gone = table[first]["stays"]
                offer("bridge", cost + price, _Gone(gone.plainly, (*gone.bridged, (first, last))))
        table.append(best)
    return min((entry for kind, entry in table[depth].items() if kind != "none"), key=lambda entry: entry[0])[1]


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
                # larger need not be better: below the rank where a pivot pays, factors take more than just above it
                if gain > (0.0 if best is None else best[0]):
                    best = (gain, site, larger)
        if best is None:
            return
        spare -= best[2].cost - chosen[best[1]].cost
        chosen[best[1]] = best[2]
