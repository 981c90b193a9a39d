"""What is asked for: unknown words, options of another method, layers that are not there, sizes out of reach."""

from __future__ import annotations

from transformers import PreTrainedModel

from .allocation import Sizes, layers_and_ratio
from .architectures import Architecture
from .baselines import BASELINES, everywhere, uniform_budget
from .checkpoint import parameter_count, weight_bytes
from .errors import TacoError
from .importance import MEASURES
from .plan import METHODS


def check_choices(
    method: str,
    importance: str,
    bridge_rank: int | None,
    one_shot: bool,
    consistency: bool,
    layers: int | list[int] | None,
    keep: float | str | None,
    timed: bool,
) -> None:
    """Raises TacoError for words that are unknown and options of another method."""
    if method not in METHODS:
        raise TacoError(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
    if importance not in MEASURES:
        raise TacoError(f"--importance must be one of {', '.join(MEASURES)}, got {importance!r}.")
    if bridge_rank is not None and method != "bridge":
        raise TacoError("--bridge-rank goes with --method bridge.")
    if one_shot and method != "paper":
        raise TacoError("--one-shot goes with --method paper (the other methods need one pass at most anyway).")
    if not consistency and method not in ("taco", "bridge"):
        raise TacoError("--no-consistency goes with --method taco or bridge; the others re-fit nothing.")
    if importance != MEASURES[0]:
        if isinstance(layers, (list, tuple)):
            raise TacoError("--importance finds redundant layers, and these are named.")
        baseline = BASELINES.get(method)
        own = method == "replaceme" or (baseline is not None and baseline.importance is not None)
        if own or timed or everywhere(method, None if keep is None else 1.0):
            what = "has its own way to find redundant layers" if own else "compresses all layers here"
            raise TacoError(f"--importance has nothing to decide: --method {method} {what}.")


def named_layers(architecture: Architecture, layers: int | list[int] | None) -> list[int] | None:
    """The layers that were named; None where there are none, or only their number.

    Raises:
        TacoError: one is named twice, or not there.
    """
    if not isinstance(layers, (list, tuple)):
        return None
    chosen, depth = list(layers), len(architecture.layers)
    if len(set(chosen)) != len(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise TacoError(f"The layers to replace must be different and in 0..{depth - 1}, got {chosen}.")
    return chosen


def count_and_ratio(
    architecture: Architecture,
    method: str,
    keep: float | None,
    layers: int | None,
    compression_ratio: float | None,
    bridge_rank: int | None,
) -> tuple[int, float | None]:
    """As `layers_and_ratio`; a baseline that compresses all layers alike has no ratio.

    Raises:
        TacoError: out of range, contradictory, or not reachable.
    """
    if everywhere(method, keep) and layers is None and compression_ratio is None:
        assert keep is not None
        uniform_budget(architecture, keep, method)
        return len(architecture.layers), None
    return layers_and_ratio(Sizes.of(architecture), method, keep, layers, compression_ratio, bridge_rank)


def share_of_parameters(model: PreTrainedModel, keep_bytes: int) -> float:
    """The share of the parameters that leaves so many bytes: what goes has the model's dtype, the rest need not."""
    return 1 - (weight_bytes(model) - keep_bytes) / (model.dtype.itemsize * parameter_count(model))


def how_many(layers: int | list[int] | None) -> int | None:
    return len(layers) if isinstance(layers, (list, tuple)) else layers
