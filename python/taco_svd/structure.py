"""What stands where in a compressed model: the part of a plan that a checkpoint needs to rebuild the modules.

Small, typed, JSON. It goes into `config.json`, so it is read from files that may be damaged or hostile: every
field is checked before anything is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .errors import TacoError

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)  # 1 had no pivoted factors, 2 none of 8-bit integers
MAX_RANK = 1 << 20
MAX_LAYERS = 1 << 16
MAX_PATH = 256


@dataclass(frozen=True)
class BridgeSpec:
    """A low-rank residual map that stands for a run of removed layers.

    Attributes:
        after: index, in the source model, of the kept layer whose output the bridge takes.
        rank: rank of the map.
        bias: whether it adds a bias.
        eps: epsilon of the RMS norm inside the bridge.
    """

    after: int
    rank: int
    bias: bool = True
    eps: float = 1e-6


@dataclass(frozen=True)
class NarrowSpec:
    """A linear map that lost rows or columns and is otherwise an ordinary matrix (MoDeGPT, arXiv 2408.09632).

    Attributes:
        rows, columns: size of the matrix that is stored.
        spread: "rows": the outputs go to chosen places of a vector of the original width, which is zero elsewhere;
            "columns": the inputs are chosen places of a vector of the original width; "none": the neighbours have
            shrunk as well.
    """

    rows: int
    columns: int
    spread: str = "none"


SPREADS = ("none", "rows", "columns")


@dataclass(frozen=True)
class Structure:
    """Which layers of the source model are kept, and what replaced their linear maps.

    Attributes:
        source_layers: number of decoder layers in the source model.
        kept: source indices of the layers that still exist, ascending.
        low_rank: for each kept source layer (by index) the rank of each factorised linear map (by dotted path).
        bridges: what stands for runs of removed layers, ascending by `after`.
        narrow: for each kept source layer the linear maps that have become narrower (see `NarrowSpec`).
        pivoted: for each kept source layer the factorised maps whose right factor is the identity on `rank` of its
            inputs (see `taco_kernels.pivoted_low_rank_linear`).
        int8: for each kept source layer the factorised maps whose factors are 8-bit integers (see
            `taco_kernels.low_rank_linear_int8`).
    """

    source_layers: int
    kept: tuple[int, ...]
    low_rank: dict[int, dict[str, int]] = field(default_factory=dict)
    bridges: tuple[BridgeSpec, ...] = ()
    narrow: dict[int, dict[str, NarrowSpec]] = field(default_factory=dict)
    pivoted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    int8: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.source_layers <= MAX_LAYERS:
            raise TacoError(f"structure: source_layers must be between 1 and {MAX_LAYERS}, got {self.source_layers}.")
        if not self.kept or list(self.kept) != sorted(set(self.kept)):
            raise TacoError("structure: `kept` must list at least one layer, in ascending order, none twice.")
        if self.kept[0] < 0 or self.kept[-1] >= self.source_layers:
            raise TacoError(f"structure: `kept` names a layer outside 0..{self.source_layers - 1}.")
        kept = set(self.kept)
        for layer, ranks in self.low_rank.items():
            if layer not in kept:
                raise TacoError(f"structure: layer {layer} has factorised linear maps but is not kept.")
            for path, rank in ranks.items():
                if not 0 < rank <= MAX_RANK:
                    raise TacoError(f"structure: layer {layer}, {path}: rank {rank} is not between 1 and {MAX_RANK}.")
        for layer, specs in self.narrow.items():
            if layer not in kept:
                raise TacoError(f"structure: layer {layer} has narrower linear maps but is not kept.")
            for path, spec in specs.items():
                if path in self.low_rank.get(layer, {}):
                    raise TacoError(f"structure: layer {layer}, {path}: both factorised and narrower.")
                if not (0 < spec.rows <= MAX_RANK and 0 < spec.columns <= MAX_RANK) or spec.spread not in SPREADS:
                    raise TacoError(f"structure: layer {layer}, {path}: {spec} is out of range.")
        for name in ("pivoted", "int8"):
            for layer, paths in getattr(self, name).items():
                lost = [path for path in paths if path not in self.low_rank.get(layer, {})]
                if lost or len(set(paths)) != len(paths):
                    raise TacoError(
                        f"structure: layer {layer}: `{name}` must name factorised maps, each once ({lost})."
                    )
        afters = [bridge.after for bridge in self.bridges]
        if afters != sorted(set(afters)):
            raise TacoError("structure: bridges must be ascending, one per place.")
        for bridge in self.bridges:
            if bridge.after not in kept:
                raise TacoError(f"structure: a bridge follows layer {bridge.after}, which is not kept.")
            if not 0 < bridge.rank <= MAX_RANK:
                raise TacoError(f"structure: bridge after layer {bridge.after}: rank {bridge.rank} is out of range.")
            if not 0 < bridge.eps <= 1:
                raise TacoError(f"structure: bridge after layer {bridge.after}: eps must be above 0 and at most 1.")

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.source_layers)) - set(self.kept)))

    def is_pivoted(self, layer: int, path: str) -> bool:
        return path in self.pivoted.get(layer, ())

    def is_int8(self, layer: int, path: str) -> bool:
        return path in self.int8.get(layer, ())

    def position(self, source_layer: int) -> int:
        """Where a kept source layer stands in the compressed stack."""
        return self.kept.index(source_layer)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            # so that releases which know no such factors read all others
            "format_version": FORMAT_VERSION if self.int8 else 2,
            "source_layers": self.source_layers,
            "kept": list(self.kept),
            "low_rank": {str(layer): dict(ranks) for layer, ranks in sorted(self.low_rank.items())},
            "bridges": [
                {"after": bridge.after, "rank": bridge.rank, "bias": bridge.bias, "eps": bridge.eps}
                for bridge in self.bridges
            ],
            "narrow": {
                str(layer): {
                    path: {"rows": spec.rows, "columns": spec.columns, "spread": spec.spread}
                    for path, spec in specs.items()
                }
                for layer, specs in sorted(self.narrow.items())
            },
            "pivoted": {str(layer): list(paths) for layer, paths in sorted(self.pivoted.items())},
        }
        if self.int8:
            values["int8"] = {str(layer): list(paths) for layer, paths in sorted(self.int8.items())}
        return values

    @classmethod
    def from_dict(cls, data: Any) -> Structure:
        """Reads what `to_dict` wrote.

        Raises:
            TacoError: for a missing, mistyped or out-of-range field, or a newer format.
        """
        if not isinstance(data, dict):
            raise TacoError("structure: expected a JSON object.")
        version = data.get("format_version")
        if isinstance(version, bool) or not isinstance(version, int) or version not in READABLE_VERSIONS:
            raise TacoError(
                f"This checkpoint has format version {str(version)[:40]}; this taco-kernels reads up to "
                f"{FORMAT_VERSION}. Install the taco-kernels release that wrote it."
            )
        try:
            return cls(
                source_layers=_integer(data["source_layers"]),
                kept=tuple(_integer(index) for index in _list(data["kept"])),
                low_rank={
                    _index(layer): {_path(path): _integer(rank) for path, rank in ranks.items()}
                    for layer, ranks in data.get("low_rank", {}).items()
                },
                bridges=tuple(
                    BridgeSpec(
                        after=_integer(bridge["after"]),
                        rank=_integer(bridge["rank"]),
                        bias=_boolean(bridge["bias"]),
                        eps=_number(bridge["eps"]),
                    )
                    for bridge in _list(data.get("bridges", []))
                ),
                narrow={
                    _index(layer): {
                        _path(path): NarrowSpec(_integer(spec["rows"]), _integer(spec["columns"]), str(spec["spread"]))
                        for path, spec in specs.items()
                    }
                    for layer, specs in data.get("narrow", {}).items()
                },
                pivoted=_paths(data.get("pivoted", {})),
                int8=_paths(data.get("int8", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TacoError(f"structure: not readable ({type(error).__name__}: {str(error)[:200]}).") from error


def _paths(value: Any) -> dict[int, tuple[str, ...]]:
    return {_index(layer): tuple(_path(path) for path in _list(paths)) for layer, paths in value.items()}


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, got {str(value)[:80]!r}")
    if abs(value) > 1 << 53:
        raise ValueError("an integer beyond 2^53")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {str(value)[:80]!r}")
    number = float(value) if isinstance(value, float) else float(_integer(value))
    if not math.isfinite(number):
        raise ValueError("a number that is not finite")
    return number


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {str(value)[:80]!r}")
    return value


def _list(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, got {str(value)[:80]!r}")
    return value


def _index(text: str) -> int:
    """A layer's index as `to_dict` writes it: no sign, no leading zero, no digits of other scripts."""
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or str(int(text)) != text:
        raise ValueError(f"not the index of a layer: {text[:80]!r}")
    return int(text)


def _path(value: str) -> str:
    if len(value) > MAX_PATH or not value.isascii() or not all(_is_name(part) for part in value.split(".")):
        raise ValueError(f"not a module path: {value[:80]!r}")
    return value


def _is_name(part: str) -> bool:
    # numbers are the names of modules in a list; dunder names are no modules at all
    return part.isdecimal() or (part.isidentifier() and not part.startswith("__"))
