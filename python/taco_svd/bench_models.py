"""The models that a latency run compares: dense, with layers removed, compressed. What they share is shared.

From a checkpoint, or from a shape: then the weights are random (`shapes`), and the structure is one that the method
would have given to layers of which nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .allocation import LARGE_MAP, LEAST_SAVING, RANK_MULTIPLE, factor_parameters
from .architectures import Architecture, linear_shape, slice_config
from .budget import DEFAULT_COMPRESSION_RATIO, Sizes, bridge_structure, layers_and_ratio, low_rank_structure
from .errors import TacoError
from .export import dense_stand_in, with_layers_removed
from .gauge import random_pivot
from .int8_linear import Int8LowRankLinear
from .modeling import as_compressed
from .module_tree import structural_copy
from .plan import Plan
from .replacement import LowRankBridge, LowRankLinear, attach_bridge
from .shapes import RandomFill, random_model
from .structure import Structure
from .surgery import drop_layers

SHAPE_METHODS = ("bridge", "paper", "taco")
NAMES = ("dense", "removal", "compressed")


@dataclass
class BenchModels:
    """What is measured.

    Attributes:
        models: ``dense``, ``removal`` (where layers were redundant) and ``compressed``, sharing all weights they can.
        description: source, method, structure; for the record.
    """

    models: dict[str, PreTrainedModel]
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all weights together, shared ones once."""
        seen: dict[int, int] = {}
        for model in self.models.values():
            for tensor in [*model.parameters(), *model.buffers()]:
                # by object, since tensors on the meta device have no addresses
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
        return sum(seen.values())


def from_checkpoint(directory: Path, model: PreTrainedModel, others: Collection[str] = NAMES) -> BenchModels:
    """Dense stand-in and removal, those of `others` that the plan tells of, and the compressed model itself."""
    plan = Plan.load(directory)
    models: dict[str, PreTrainedModel] = {}
    if "dense" in others and "config" in plan.source:  # a plan need not have one
        models["dense"] = dense_stand_in(model, plan.source["config"])
    if "removal" in others and len(plan.redundant) < plan.structure.source_layers:
        models["removal"] = with_layers_removed(model, list(plan.redundant))
    models["compressed"] = model
    description = {
        "source": plan.source.get("name"),
        "weights": "checkpoint",
        "method": plan.method,
        "redundant": list(plan.redundant),
        "structure": plan.structure.to_dict(),
    }
    if "cost_budget" in plan.result:
        description["cost_budget"] = plan.result["cost_budget"]
    return BenchModels(models, description)


def redundant_layers(depth: int, count: int, runs: int = 1) -> list[int]:
    """`count` layers in `runs` runs of about the same length, deep in the stack, the last layer kept.

    Deep contiguous layers are what importance measures find in Llama-like models (arXiv 2403.03853, table 2).
    """
    if not 1 <= runs <= count or count + runs > depth:
        raise TacoError(f"{count} layers in {runs} runs do not fit a model of {depth} layers.")
    lengths = [count // runs + (index < count % runs) for index in range(runs)]
    end = depth - 1  # first layer above the run
    found: list[int] = []
    for length in lengths:
        found += range(end - length, end)
        end -= length + 1
    return sorted(found)


def uniform_pivoted_structure(architecture: Architecture, keep: float) -> Structure:
    """Every linear map factorised, in the gauge that `allocation` would take, such that a share `keep` of all
    parameters stays: what taco mode does to a model whose maps are all alike.

    Raises:
        TacoError: `keep` cannot be reached with every map at rank 1.
    """
    sizes = Sizes.of(architecture)
    linear = sum(m * n for m, n in sizes.linear_shapes) * sizes.depth
    share = 1 - (1 - keep) * sizes.total / linear
    if not 0 < keep < 1 or share <= 0:
        raise TacoError(f"--keep {keep} cannot be reached: linear maps are {linear / sizes.total:.1%} of this model.")
    ranks: dict[str, int] = {}
    pivoted: list[str] = []
    for path in architecture.paths:
        m, n = linear_shape(architecture.module(architecture.site(0, path)))
        # r (m + n - r) = share m n
        rank = int(((m + n) - math.sqrt((m + n) ** 2 - 4 * share * m * n)) / 2)
        step = RANK_MULTIPLE if min(m, n) >= LARGE_MAP else 1
        rank = max(step, rank - rank % step)
        parameters, is_pivoted = factor_parameters(m, n, rank)
        if parameters > (1 - LEAST_SAVING) * m * n:
            continue
        ranks[path] = rank
        if is_pivoted:
            pivoted.append(path)
    depth = range(sizes.depth)
    return Structure(
        sizes.depth,
        tuple(depth),
        {layer: dict(ranks) for layer in depth},
        pivoted={layer: tuple(pivoted) for layer in depth} if pivoted else {},
    )


def shape_structure(
    config: PreTrainedConfig,
    method: str = "bridge",
    layers: int | list[int] | None = None,
    share: float = 0.25,
    runs: int = 1,
    keep: float | None = None,
    bridge_rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Structure, list[int]]:
    """(structure, redundant layers) that a method would give a model of this shape.

    Args:
        method: "bridge" (`layers`, or `share` of them, replaced by one bridge per run), "paper" (all linear maps of
            `layers` factorised at the paper's default ratio; with `keep`, as many layers and at the ratio that it
            needs), or "taco" (all maps pivoted, `keep` of the parameters, default 0.8).

    Raises:
        TacoError: contradictory or unreachable.
    """
    if method not in SHAPE_METHODS:
        raise TacoError(f"--method must be one of {', '.join(SHAPE_METHODS)}, got {method!r}.")
    architecture = Architecture(random_model(config, dtype, "meta"))
    depth = len(architecture.layers)
    if bridge_rank is not None and method != "bridge":
        raise TacoError("--bridge-rank goes with --method bridge.")
    if method == "taco":
        if layers is not None:
            raise TacoError("--layers goes with --method bridge or paper; --method taco takes --keep.")
        return uniform_pivoted_structure(architecture, 0.8 if keep is None else keep), []
    if keep is not None and (method == "bridge" or layers is not None):
        raise TacoError("--keep goes with --method paper or taco, and without --layers.")
    if isinstance(layers, list):
        redundant = sorted(layers)
        if len(set(redundant)) != len(redundant) or not all(0 <= layer < depth for layer in redundant):
            raise TacoError(f"The layers must be different and in 0..{depth - 1}, got {layers}.")
    else:
        count, ratio = layers, DEFAULT_COMPRESSION_RATIO
        if keep is not None:
            count, found = layers_and_ratio(Sizes.of(architecture), "paper", keep, None, None)
            ratio = found or ratio
        if count is None:
            if not 0 < share < 1:
                raise TacoError(f"--share must be above 0 and below 1, got {share}.")
            count = max(1, round(share * depth))
        redundant = redundant_layers(depth, count, runs)
        if method == "paper":
            return low_rank_structure(architecture, redundant, ratio), redundant
    if method == "paper":
        return low_rank_structure(architecture, redundant, DEFAULT_COMPRESSION_RATIO), redundant
    return bridge_structure(architecture, redundant, bridge_rank), redundant


def with_int8(structure: Structure) -> Structure:
    """The same structure with all factors as 8-bit integers.

    Raises:
        TacoError: it has none.
    """
    if not structure.low_rank:
        raise TacoError("--int8 goes with --method paper or taco: a bridge has no 8-bit form.")
    return replace(structure, int8={layer: tuple(ranks) for layer, ranks in structure.low_rank.items()})


def from_shape(
    config: PreTrainedConfig,
    structure: Structure,
    redundant: list[int],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    dense: PreTrainedModel | None = None,
) -> BenchModels:
    """Random models of a shape, around `dense` if it exists already; ``device="meta"`` gives them without data, for
    counting bytes.
    """
    dense = dense or random_model(config, dtype, device)
    working = structural_copy(dense)
    architecture = Architecture(working)
    fill = RandomFill(dtype, seed=1)
    for layer, ranks in structure.low_rank.items():
        for path, rank in ranks.items():
            site = architecture.site(layer, path)
            old = architecture.module(site)
            out_features, in_features = linear_shape(old)
            bias, pivoted = getattr(old, "bias", None) is not None, structure.is_pivoted(layer, path)
            if structure.is_int8(layer, path):  # is made with random integers
                int8 = Int8LowRankLinear(in_features, out_features, rank, bias, device, dtype, pivoted)
                architecture.replace(site, _shuffled(int8, device))
            else:
                module = LowRankLinear(in_features, out_features, rank, bias, "meta", dtype, pivoted)
                architecture.replace(site, _filled(module, fill, device))
    hidden = config.hidden_size
    for bridge in structure.bridges:
        empty = LowRankBridge(hidden, bridge.rank, bridge.bias, bridge.eps, device="meta", dtype=dtype)
        attach_bridge(architecture.layers[bridge.after], _filled(empty, fill, device))
    kept = list(structure.kept)
    drop_layers(architecture, kept)
    compressed = as_compressed(working, slice_config(dense.config, kept), structure).eval()
    models = {"dense": dense}
    if 0 < len(redundant) < structure.source_layers:
        models["removal"] = with_layers_removed(compressed, redundant)
    models["compressed"] = compressed
    return BenchModels(
        models,
        {"weights": "random", "redundant": list(redundant), "structure": structure.to_dict()},
    )


def _filled(module: Any, fill: RandomFill, device: torch.device | str) -> Any:
    """Factors of the size that keeps what passes through them finite; a bridge adds a small share of the stream."""
    small = 0.1 if isinstance(module, LowRankBridge) else 1.0
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        if parameter.ndim == 1:
            tensor = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            tensor = fill(parameter.shape, small * parameter.shape[1] ** -0.5, device)
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return _shuffled(module, device)


def _shuffled(module: Any, device: torch.device | str) -> Any:
    """The same module with another pivot, if it has one."""
    if getattr(module, "pivot", None) is not None:
        module.pivot = random_pivot(module.in_features, module.rank, torch.Generator().manual_seed(2)).to(device)
    return module
