"""The plan of a compression: every decision and what it was based on, as a small typed JSON record.

It can be saved, read by a person, edited (another rank here, a layer kept there), compared with another plan, and
applied again: `taco_svd.compress(model, tokenizer, plan=plan)`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import taco_kernels

from .errors import TacoError
from .json_values import without_infinities
from .methods import METHODS
from .model_size import parameter_count, weight_bytes
from .structure import Structure
from .untrusted import check_contained, read_json

PLAN_FILE = "taco_plan.json"
# What a plan's result tells of the model that was made from it; another model, made again from it, has its own.
OF_THE_MODEL = ("consistency", "drift", "measured_loss", "healing")
# ... and what, with it, was of the factors as they were made, and is not of what became of them.
OF_THE_FACTORS = (*OF_THE_MODEL, "predicted_loss", "cost_budget")


def versions(python: bool = False) -> dict[str, str]:
    """What computes here: this package, torch and transformers; and Python, where it is asked for."""
    found = {
        "taco_kernels": taco_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return found | {"python": platform.python_version()} if python else found


@dataclass(frozen=True)
class Plan:
    """Which layers are redundant, what stands in their place, and how the factors are found.

    Attributes:
        method: one of `methods.METHODS`.
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
            raise TacoError(f"plan: method must be one of {', '.join(METHODS)}, got {str(self.method)[:80]!r}.")
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
            raise TacoError(f"plan: unknown fields {', '.join(unknown)[:200]}.")
        values = dict(data)
        try:
            values["structure"] = Structure.from_dict(values["structure"])
            redundant = values["redundant"]
            if not isinstance(redundant, (list, tuple)) or not all(_is_integer(layer) for layer in redundant):
                raise TypeError("`redundant` must be a list of integers")
            values["redundant"] = tuple(values["redundant"])
            for name in ("importance", "calibration", "options", "source", "result", "versions"):
                if not isinstance(values.get(name, {}), dict):
                    raise TypeError(f"`{name}` must be an object")
                _check_fields(name, values.get(name, {}))
            ratio = values.get("compression_ratio")
            if ratio is not None:
                if not _is_number(ratio) or not 0 < ratio < 1:
                    raise ValueError("`compression_ratio` must be a number above 0 and below 1")
                values["compression_ratio"] = float(ratio)
            return cls(**values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TacoError(f"plan: not readable ({type(error).__name__}: {str(error)[:200]}).") from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, which has no infinities: numbers that are not finite become null."""
        values = without_infinities(self.to_dict())
        Path(path).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file, or the plan inside a compressed checkpoint directory.

        Raises:
            TacoError: no such file, or not a plan.
        """
        path = Path(path)
        if os.path.isdir(path):  # Path.is_dir raises for names that no file can have
            path = check_contained(path, PLAN_FILE)
        try:
            data = read_json(path)
        except FileNotFoundError as error:
            raise TacoError(
                f"No plan at {path}; is this a directory that `taco-svd compress` wrote? What another program saved of "
                f"such a model may lack it: copy {PLAN_FILE} from there."
            ) from error
        return cls.from_dict(data)

    def diff(self, other: Plan) -> dict[str, tuple[Any, Any]]:
        """What differs: dotted field name -> (here, there). Empty when the plans are the same."""
        return dict(_differences("", self.to_dict(), other.to_dict()))


def changed_plan(plan: Plan, structure: Structure, model: PreTrainedModel, **more: Any) -> Plan:
    """The plan that stands beside `model`, whose factors are no longer those that `plan` made: its sizes, and nothing
    that was measured before.

    Args:
        more: goes into the plan's result.
    """
    parameters = parameter_count(model)
    result = {key: value for key, value in plan.result.items() if key not in OF_THE_FACTORS}
    result |= {"parameters": parameters, "bytes": weight_bytes(model), **more}
    if plan.source.get("parameters"):
        result["share"] = parameters / plan.source["parameters"]
    return dataclasses.replace(plan, structure=structure, result=result)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # more than any machine counts: such integers cannot even become floating-point numbers
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63


def _is_loss(value: Any) -> bool:
    return value is None or _is_number(value)  # null: it was not finite


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and 0 <= value < 1 << 63


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_numbers(value: Any) -> bool:
    # greedy importance has no score for layers that it never tried
    return isinstance(value, (list, tuple)) and all(item is None or _is_number(item) for item in value)


def _is_records(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, dict) for item in value)


# What others read out of a plan's free objects, and of which type it must be; everything else may be any JSON.
_FIELDS = {
    "importance": {"measure": _is_text, "order": _is_numbers},
    "calibration": {
        "source": _is_text, "samples": _is_size, "seq_len": _is_size, "tokens": _is_size, "seed": _is_integer,
        "sha256": _is_text,
    },
    "options": {
        "input_damping": _is_number, "gradient_damping": _is_number,
        "consistency": lambda value: isinstance(value, bool),
        "one_shot": lambda value: isinstance(value, bool),
    },
    "source": {
        "name": _is_text, "model_type": _is_text, "architecture": _is_text, "layers": _is_size,
        "parameters": _is_size, "bytes": _is_size, "dtype": _is_text, "config": _is_object,
    },
    "result": {
        "parameters": _is_size, "bytes": _is_size, "share": _is_number, "dtype": _is_text,
        "predicted_loss": _is_loss, "measured_loss": _is_loss, "consistency": _is_records,
    },
}  # fmt: skip


def _check_fields(name: str, values: dict[str, Any]) -> None:
    if name == "versions" and not all(isinstance(version, str) for version in values.values()):
        raise TypeError("`versions` must hold texts")
    for key, fits in _FIELDS.get(name, {}).items():
        if key in values and not fits(values[key]):
            raise TypeError(f"`{name}.{key}` cannot be {str(values[key])[:80]!r}")


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
