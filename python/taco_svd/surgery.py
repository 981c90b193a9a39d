"""Takes layers out of a model, and puts the modules of `replacement` into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, LinearSite, dense_weight, linear_shape
from .errors import TacoError
from .experts import names_experts, open_experts
from .gauge import pivoted_factors
from .int8_linear import Int8LowRankLinear
from .replacement import LowRankBridge, LowRankLinear, NarrowLinear, attach_bridge
from .structure import Structure


def empty_factors(dense: nn.Module, rank: int, pivoted: bool) -> LowRankLinear:
    """What stands for a dense map in two factors, its tensors without data (meta): the caller makes and fills them."""
    out_features, in_features = linear_shape(dense)
    bias = getattr(dense, "bias", None) is not None
    made = LowRankLinear(in_features, out_features, rank, bias, "meta", dense_weight(dense).dtype, pivoted)
    return made.train(dense.training)


def put_factors(
    architecture: Architecture, site: LinearSite, u: torch.Tensor, v: torch.Tensor, pivoted: bool = False
) -> None:
    """Puts ``u v`` in the place of a dense linear map, its bias kept; u [out, rank], v [rank, in].

    Args:
        pivoted: store the product in the gauge that takes less.
    """
    dense = architecture.module(site)
    bias = getattr(dense, "bias", None)
    pivot = None
    if pivoted:
        u, v, pivot = pivoted_factors(u, v)
    module = empty_factors(dense, u.shape[1], pivoted).to_empty(device=dense_weight(dense).device)
    with torch.no_grad():
        module.u.copy_(u)
        module.v.copy_(v)
        if module.pivot is not None and pivot is not None:
            module.pivot.copy_(pivot)
        if module.bias is not None and isinstance(bias, torch.Tensor):
            module.bias.copy_(bias)
    architecture.replace(site, module)


def drop_layers(architecture: Architecture, keep: tuple[int, ...] | list[int]) -> None:
    """Takes out all layers but `keep` (ascending) from the module list and renumbers the attention blocks.

    The caller replaces the config (`architectures.slice_config`); without that the key/value cache breaks.
    """
    stack = architecture.layers
    architecture.put_layers([stack[index] for index in keep])


def install(model: PreTrainedModel, structure: Structure) -> None:
    """Puts empty replacement modules into a model that already has only the kept layers.

    Raises:
        TacoError: when the structure names a module that the model does not have, or more layers than it has.
    """
    # a quantiser replaces the dense maps after this, and leaves the modules that are put in here alone
    if names_experts(structure):
        open_experts(model)
    architecture = Architecture(model, quantised=True)
    if len(architecture.layers) != len(structure.kept):
        raise TacoError(
            f"The checkpoint's structure keeps {len(structure.kept)} layers, its config describes "
            f"{len(architecture.layers)}."
        )
    # before 8-bit factors take the first parameter's place
    references = [next(layer.parameters()) for layer in architecture.layers]
    for source_layer, ranks in structure.low_rank.items():
        for path, rank in ranks.items():
            site, (out_features, in_features), setting = _place(architecture, structure, source_layer, path)
            if rank > min(out_features, in_features):
                raise TacoError(f"layer {source_layer}, {path}: rank {rank} of a {out_features} x {in_features} map.")
            pivoted = structure.is_pivoted(source_layer, path)
            kind = Int8LowRankLinear if structure.is_int8(source_layer, path) else LowRankLinear
            architecture.replace(site, kind(in_features, out_features, rank, pivoted=pivoted, **setting))
    for source_layer, specs in structure.narrow.items():
        for path, spec in specs.items():
            site, (out_features, in_features), setting = _place(architecture, structure, source_layer, path)
            if spec.rows > out_features or spec.columns > in_features:
                raise TacoError(f"layer {source_layer}, {path}: {spec} of a {out_features} x {in_features} map.")
            architecture.replace(site, NarrowLinear(in_features, out_features, spec, **setting))
    hidden = model.config.hidden_size
    for bridge in structure.bridges:
        if bridge.rank > hidden:
            raise TacoError(f"bridge after layer {bridge.after}: rank {bridge.rank} of a {hidden} x {hidden} map.")
        position = structure.position(bridge.after)
        reference = references[position]
        attach_bridge(
            architecture.layers[position],
            LowRankBridge(hidden, bridge.rank, bridge.bias, bridge.eps, device=reference.device, dtype=reference.dtype),
        )


def _place(
    architecture: Architecture, structure: Structure, source_layer: int, path: str
) -> tuple[LinearSite, tuple[int, int], dict[str, Any]]:
    """Where a map of a structure is in a model of the kept layers, its (out, in) features, and what a replacement
    takes over from it.

    Raises:
        TacoError: the model has no such map.
    """
    if path not in architecture.paths:
        name = type(architecture.model).__name__
        raise TacoError(f"The checkpoint's structure names {path!r}, which {name} has not.")
    site = architecture.site(structure.position(source_layer), path)
    dense = architecture.module(site)
    reference = dense.weight
    assert isinstance(reference, torch.Tensor)
    bias = getattr(dense, "bias", None) is not None
    return site, linear_shape(dense), {"bias": bias, "device": reference.device, "dtype": reference.dtype}
