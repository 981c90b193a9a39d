"""The plan of a compression: every decision and what it was based on, as a small typed JSON record.

It can be saved, read by a person, edited (another rank here, a layer kept there), compared with another plan, and
applied again: `taco_svd.compress(model, tokenizer, plan=plan)`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import TacoError
from .structure import Structure

PLAN_FILE = "taco_plan.json"
# Ours and the paper's first, then published methods to compare with (`baselines`).
METHODS = (
    "taco", "paper", "removal", "svd", "bridge",
    "sleb", "fwsvd", "asvd", "svd-llm", "zs-svd", "kfac", "modegpt", "replaceme",
)  # fmt: skip
# Methods that take layers out whole: no compression ratio applies to them.
REMOVING_METHODS = ("removal", "bridge", "sleb", "replaceme")


@dataclass(frozen=True)
class Plan:
    """Which layers are redundant, what stands in their place, and how the factors are found.

    Attributes:
        method: one of `METHODS`.
        structure: kept layers, ranks, bridges.
        redundant: source indices of the redundant layers (removed or factorised), ascending.
        compression_ratio: the paper's c, where ranks came from it.
        importance: measure, scores and order of the layers (see `importance.LayerImportance`).
        calibration: source, samples, seq_len, tokens, seed, sha256 of the calibration windows.
        options: what else shapes the factors (damping and the like).
        source: the dense model: name, model_type, config, parameters, bytes, dtype.
        result: parameters and bytes of the compressed model.
        versions: of this package, torch and transformers.
    """

    method: str
    structure: Structure
    redundant: tuple[int, ...]
    compression_ratio: float | None = None
    importance: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise TacoError(f"plan: method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        outside = [layer for layer in self.redundant if not 0 <= layer < self.structure.source_layers]
        if outside or list(self.redundant) != sorted(set(self.redundant)):
            raise TacoError(
                f"plan: `redundant` must list layers in 0..{self.structure.source_layers - 1}, ascending, none twice."
            )

    def to_dict(self) -> dict[str, Any]:
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        values["structure"] = self.structure.to_dict()
        values["redundant"] = list(self.redundant)
        return values

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Reads what `to_dict` wrote.

        Raises:
            TacoError: when a field is missing, unknown or of the wrong type.
        """
        if not isinstance(data, dict):
            raise TacoError("plan: expected a JSON object.")
        names = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise TacoError(f"plan: unknown fields {', '.join(unknown)}.")
        values = dict(data)
        try:
            values["structure"] = Structure.from_dict(values["structure"])
            if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in values["redundant"]):
                raise TypeError("`redundant` must be a list of integers")
            values["redundant"] = tuple(values["redundant"])
            for name in ("importance", "calibration", "options", "source", "result", "versions"):
                if not isinstance(values.get(name, {}), dict):
                    raise TypeError(f"`{name}` must be an object")
            ratio = values.get("compression_ratio")
            if ratio is not None:
                values["compression_ratio"] = float(ratio)
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise TacoError(f"plan: not readable ({type(error).__name__}: {error}).") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file, or the plan inside a compressed checkpoint directory.

        Raises:
            TacoError: no such file, or not a plan.
        """
        path = Path(path)
        if path.is_dir():
            path = path / PLAN_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TacoError(f"No plan at {path}; is this a directory that `taco-svd compress` wrote?") from error
        except (OSError, ValueError) as error:
            raise TacoError(f"{path} is not a readable plan ({error}).") from error
        return cls.from_dict(data)

    def diff(self, other: Plan) -> dict[str, tuple[Any, Any]]:
        """What differs: dotted field name -> (here, there). Empty when the plans are the same."""
        return dict(_differences("", self.to_dict(), other.to_dict()))


def _differences(name: str, here: Any, there: Any) -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(here, dict) and isinstance(there, dict):
        found: list[tuple[str, tuple[Any, Any]]] = []
        for key in sorted(set(here) | set(there)):
            found += _differences(f"{name}.{key}" if name else str(key), here.get(key), there.get(key))
        return found
    if isinstance(here, tuple):
        here = list(here)
    if isinstance(there, tuple):
        there = list(there)
    return [] if here == there else [(name, (here, there))]
