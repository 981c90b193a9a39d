"""What the report takes from files: plans, healing records, comparisons. Whatever is not as expected is left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .errors import TacoError
from .healing_run import CURVE_FILE
from .plan import Plan
from .untrusted import read_json


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer beyond all numbers
        return None
    return found if math.isfinite(found) else None


def consistency(plan: Plan) -> list[dict[str, Any]]:
    """Records {layer, path, before, after, adopted}; whatever else stands there is left out."""
    records = plan.result.get("consistency")
    found = []
    for record in records if isinstance(records, list) else []:
        if not isinstance(record, dict):
            continue
        before, after = number(record.get("before")), number(record.get("after"))
        if before is None or after is None:
            continue
        found.append(
            {
                "layer": str(record.get("layer", "")),
                "path": str(record.get("path", "")),
                "before": before,
                "after": after,
                "adopted": bool(record.get("adopted")),
            }
        )
    return found


def healing(directory: str | Path, plan: Plan) -> dict[str, Any] | None:
    """The healing record, with its curve where the file is there and says the same."""
    record = plan.result.get("healing")
    if not isinstance(record, dict):
        return None
    points = [record.get("before"), record.get("after")]
    values = [record.get("trained_parameters"), record.get("tokens")]
    values += [point.get(key) for point in points if isinstance(point, dict) for key in ("kl", "nll")]
    if len(values) != 6 or any(number(value) is None for value in values):
        return None
    curve = None
    keys = ("tokens", "kl", "objective")
    try:
        found = read_json(Path(directory) / CURVE_FILE)["curve"]
        if found and all(number(point.get(key)) is not None for point in found for key in keys):
            curve = found
    except (OSError, TacoError, KeyError, TypeError, AttributeError):
        pass  # without its curve the record still says what healing did
    return {**record, "text": str(record.get("text")), "curve": curve}


def _comparison(path: str | Path) -> dict[str, Any]:
    try:
        values = read_json(Path(path), constants=True)
    except (OSError, TacoError) as error:
        raise TacoError(f"{path} is not readable as the JSON of `taco-svd compare --save` ({error}).") from error
    if not isinstance(values, dict) or not isinstance(values.get("models"), list):
        raise TacoError(f"{path} is not what `taco-svd compare --save` writes: it has no list `models`.")
    return values


def comparison_cut(path: str | Path | None) -> tuple[int | None, int | None]:
    """(window, number of windows) that a comparison measured with; None where it does not say."""
    found: list[int | None] = [None, None]
    for row in _comparison(path)["models"] if path is not None else []:
        score = row.get("perplexity") if isinstance(row, dict) else None
        for index, key in enumerate(("window", "windows")):
            value = score.get(key) if isinstance(score, dict) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found[index] = value
    return found[0], found[1]


def comparison_rows(path: str | Path | None) -> list[dict[str, Any]]:
    """Rows name, perplexity, standard_error, parameters, decode of a comparison.

    Latency is the ratio to the dense model's in the same rounds: two runs find the machine in different states, and of
    several settings, each timed in a run of its own, only the last one's seconds of the dense model are kept.

    Raises:
        TacoError: not a comparison.
    """
    if path is None:
        return []
    found: list[dict[str, Any]] = []
    for row in _comparison(path)["models"]:
        try:
            score = row["perplexity"]
            value, parameters = number(score["perplexity"]), number(row["parameters"])
            ratio = row.get("against_dense")
            decode = number(ratio["decode"]["median"]) if ratio else None
            name, share = str(row["model"]), number(row.get("share"))
            if name == "dense" and row.get("latency"):
                decode = 1.0
            error = number(score.get("standard_error"))
        except (KeyError, TypeError, AttributeError) as problem:
            raise TacoError(f"{path}: a row of `models` is not readable ({problem!r}).") from problem
        if value is None or parameters is None:
            continue  # an infinite perplexity has no place in a picture
        label = name if name == "dense" or share is None else f"{name} {share:.0%}"
        found.append(
            {
                "name": label,
                "perplexity": value,
                "standard_error": error,
                "parameters": int(parameters),
                "decode": decode,
            }
        )
    return found


def comparison_note(path: str | Path | None, text_name: str) -> str | None:
    if path is None:
        return None
    theirs = str(_comparison(path).get("text"))
    same = "" if theirs == text_name else " The texts differ: do not compare the perplexities."
    return (
        f"The comparison's perplexities are on {theirs}, this model's was measured in this run on {text_name}.{same} "
        "Latencies are ratios to the dense model's in the same run."
    )
