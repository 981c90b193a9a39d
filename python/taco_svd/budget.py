"""What a budget of size means: how many layers and which ranks, and the structures that these make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .architectures import Architecture, dense_weight, linear_shape
from .errors import TacoError
from .methods import METHODS
from .structure import BridgeSpec, Structure

DEFAULT_COMPRESSION_RATIO = 0.7
# What all bridges together may cost of the parameters of the layers that stay (DESIGN: the 0.3% target).
BRIDGE_SHARE = 0.003
BRIDGE_EPS = 1e-6


def paper_rank(out_features: int, in_features: int, compression_ratio: float) -> int:
    """k = floor(mn(1-c)/(m+n)): the rank whose factors have a share 1-c of the matrix's parameters, at least 1.

    arXiv 2501.00339, section 3.
    """
    exact = out_features * in_features * (1 - compression_ratio) / (out_features + in_features)
    return max(1, math.floor(exact + 1e-9))  # the small term: 1 - 0.7 is not 0.3 in binary


@dataclass(frozen=True)
class Sizes:
    """Parameter counts that budgets are solved with (tied parameters counted once)."""

    total: int
    layer: int
    linear_shapes: tuple[tuple[int, int], ...]
    depth: int
    hidden: int

    @classmethod
    def of(cls, architecture: Architecture) -> Sizes:
        layer = architecture.layers[0]
        return cls(
            total=sum(parameter.numel() for parameter in architecture.model.parameters()),
            layer=sum(parameter.numel() for parameter in layer.parameters()),
            linear_shapes=tuple(linear_shape(layer.get_submodule(path)) for path in architecture.paths),
            depth=len(architecture.layers),
            hidden=architecture.model.config.hidden_size,
        )

    def factorised_saving(self, compression_ratio: float) -> int:
        """Parameters saved by factorising one layer's linear maps at ratio c."""
        return sum(m * n - paper_rank(m, n, compression_ratio) * (m + n) for m, n in self.linear_shapes)

    def bridged_saving(self, count: int, rank: int | None) -> float:
        """Parameters saved by taking out `count` layers with bridges in their place, however the layers lie."""
        kept = self.depth - count
        least = min(count, kept) * self.hidden * (2 * (rank or 1) + 1)  # each run of layers has a bridge
        default = BRIDGE_SHARE * kept * self.layer if rank is None else 0.0
        return count * self.layer - max(default, least)


def layers_and_ratio(
    sizes: Sizes,
    method: str,
    keep: float | None,
    layers: int | None,
    compression_ratio: float | None,
    bridge_rank: int | None = None,
) -> tuple[int, float | None]:
    """How many layers are redundant and at which ratio their matrices are factorised.

    Args:
        keep: share of all parameters that may remain, or None.
        layers: number of redundant layers, or None.
        compression_ratio: the paper's c, or None.
        bridge_rank: of method "bridge", where it was given.

    Returns:
        (number of redundant layers, c); c is None for methods that remove layers whole.

    Raises:
        TacoError: out of range, contradictory, or not reachable; says what is.
    """
    removes = METHODS[method].removes
    if bridge_rank is not None:
        _check_bridge_rank(bridge_rank, sizes.hidden)
    if keep is not None and layers is not None:
        raise TacoError("Give --keep or --layers, not both.")
    if keep is None and layers is None:
        raise TacoError("Say how much to compress: --keep 0.8 (share of parameters) or --layers N.")
    if compression_ratio is not None:
        if removes:
            raise TacoError(f"--compression-ratio has no meaning for --method {method}: it removes layers whole.")
        if keep is not None:
            raise TacoError("--compression-ratio goes with --layers; with --keep it follows from the budget.")
        if not 0 < compression_ratio < 1:
            raise TacoError(f"--compression-ratio must be above 0 and below 1, got {compression_ratio}.")
    # one layer must stay; a bridge also needs a kept layer before it
    most = sizes.depth - 1
    if layers is not None:
        if not 1 <= layers <= most:
            raise TacoError(f"--layers must be between 1 and {most} for a model of {sizes.depth} layers, got {layers}.")
        return layers, None if removes else (compression_ratio or DEFAULT_COMPRESSION_RATIO)
    assert keep is not None
    if not 0 < keep < 1:
        raise TacoError(f"--keep must be above 0 and below 1, got {keep}.")
    must_save = (1 - keep) * sizes.total
    if removes:
        bridged = METHODS[method].bridges  # the bridges' own parameters must fit as well
        saved = [sizes.bridged_saving(n, bridge_rank) if bridged else n * sizes.layer for n in range(most + 1)]
        count = next((n for n in range(1, most + 1) if saved[n] >= must_save - 1e-9 * sizes.layer), None)
        if count is None:
            raise TacoError(_unreachable(keep, 1 - max(saved) / sizes.total, method))
        return count, None
    strongest = sizes.factorised_saving(0.999999)
    # such a method changes all layers; what is counted here are those that are listed as least important
    touched = sizes.depth if METHODS[method].whole_model else most
    if touched * strongest < must_save:
        raise TacoError(_unreachable(keep, 1 - touched * strongest / sizes.total, method))
    count = min(most, math.ceil(must_save / sizes.factorised_saving(DEFAULT_COMPRESSION_RATIO) - 1e-9))
    # the saving grows with c in steps (ranks are whole numbers): bisect for the smallest c that is enough
    low, high = 0.0, 0.999999
    for _ in range(60):
        middle = (low + high) / 2
        if count * sizes.factorised_saving(middle) >= must_save:
            high = middle
        else:
            low = middle
    return count, high


def _unreachable(keep: float, least: float, method: str) -> str:
    how = "rank 1 everywhere" if METHODS[method].whole_model else "all layers but one redundant"
    return (
        f"--keep {keep:.4g} cannot be reached by --method {method}: with {how}, "
        f"{least:.1%} of the parameters remain (embeddings and the head are not compressed)."
    )


def low_rank_structure(architecture: Architecture, redundant: list[int], compression_ratio: float) -> Structure:
    """All layers stay; every linear map of a redundant layer is factorised at the paper's rank for ratio c."""
    ranks = {
        path: paper_rank(*linear_shape(architecture.module(architecture.site(0, path))), compression_ratio)
        for path in architecture.paths
    }
    depth = len(architecture.layers)
    return Structure(depth, tuple(range(depth)), {layer: dict(ranks) for layer in redundant})


def runs(layers: list[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive layers as (first, last), ascending."""
    found: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer - 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return found


def removal_structure(architecture: Architecture, redundant: list[int]) -> Structure:
    """The redundant layers are gone and nothing stands in their place."""
    depth = len(architecture.layers)
    return Structure(depth, tuple(layer for layer in range(depth) if layer not in redundant))


def bridge_structure(architecture: Architecture, redundant: list[int], rank: int | None) -> Structure:
    """Every run of redundant layers is replaced by one bridge; a run at the very bottom by nothing.

    Without a rank, the largest (a multiple of 8 where it is 8 or more) such that all bridges together cost at most
    `BRIDGE_SHARE` of the parameters of the layers that stay.
    """
    depth = len(architecture.layers)
    kept = tuple(layer for layer in range(depth) if layer not in redundant)
    places = [first - 1 for first, _ in runs(redundant) if first > 0]
    hidden = architecture.model.config.hidden_size
    if not places:
        return Structure(depth, kept)
    if rank is None:
        budget = BRIDGE_SHARE * len(kept) * Sizes.of(architecture).layer / len(places)
        rank = max(1, min(hidden // 2, int((budget - hidden) // (2 * hidden))))
        if rank >= 8:
            rank -= rank % 8
    _check_bridge_rank(rank, hidden)
    return Structure(depth, kept, {}, tuple(BridgeSpec(place, rank, True, BRIDGE_EPS) for place in places))


def _check_bridge_rank(rank: int, hidden: int) -> None:
    if not 1 <= rank <= hidden:
        raise TacoError(f"--bridge-rank must be between 1 and the hidden size {hidden}, got {rank}.")


def structure_parameters(architecture: Architecture, structure: Structure) -> int:
    """Parameters of the model that a structure describes (tied parameters counted once)."""
    sizes = Sizes.of(architecture)
    total = sizes.total - len(structure.removed) * sizes.layer
    for ranks in structure.low_rank.values():
        for path, rank in ranks.items():
            m, n = dense_weight(architecture.module(architecture.site(0, path))).shape
            total += rank * (m + n) - m * n
    for specs in structure.narrow.values():
        for path, spec in specs.items():
            dense = architecture.module(architecture.site(0, path))
            m, n = dense_weight(dense).shape
            stored = {"rows": spec.rows, "columns": spec.columns, "none": 0}[spec.spread]
            lost_bias = (m - spec.rows) * (getattr(dense, "bias", None) is not None)
            total += spec.rows * spec.columns + stored - m * n - lost_bias
    hidden = architecture.model.config.hidden_size
    return total + sum(bridge.rank * 2 * hidden + hidden * bridge.bias for bridge in structure.bridges)
