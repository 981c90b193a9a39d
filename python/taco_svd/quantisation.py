"""Factors of 8-bit integers: a second way to make a compressed model smaller, after the ranks have been chosen.

Every singular direction of either factor has one scale (`taco_kernels.low_rank_linear_int8`). Dense maps, bridges,
embeddings and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from .architectures import Architecture
from .errors import TacoError
from .int8_linear import Int8LowRankLinear
from .modeling import CompressedModel, set_structure
from .module_tree import structural_copy
from .plan import changed_plan
from .replacement import LowRankLinear


@torch.no_grad()
def quantise(model: PreTrainedModel, maps: Mapping[int, Collection[str]] | None = None) -> PreTrainedModel:
    """A copy of a compressed model whose factors are 8-bit integers; it shares everything else with `model`.

    Heal and merge adapters first: such factors are not trained.

    Args:
        maps: the paths of some factorised maps, by the layer's index in the source model; default: of all.

    Raises:
        TacoError: `model` is not compressed, has no factorised maps, or they are such integers already or not finite.
    """
    if not isinstance(model, CompressedModel):
        raise TacoError(f"{type(model).__name__} is not a compressed model; `taco-svd compress` makes one.")
    structure = model.structure
    if not structure.low_rank:
        raise TacoError("No matrix of this model is factorised, so there are no factors to quantise.")
    made: PreTrainedModel = structural_copy(model)
    architecture = Architecture(made, quantised=True)
    paths, already = dict(structure.int8), dict(structure.int8)
    for site in architecture.sites():
        module = architecture.module(site)
        chosen = maps is None or site.path in maps.get(structure.kept[site.layer], ())
        if isinstance(module, LowRankLinear) and chosen:
            try:
                architecture.replace(site, _int8(module))
            except ValueError as error:
                raise TacoError(f"layer {site.layer}, {site.path}: {error}.") from error
            source = structure.kept[site.layer]
            paths[source] = (*paths.get(source, ()), site.path)
    if paths == already:
        raise TacoError("The factors of this model are 8-bit integers already.")
    changed = replace(structure, int8=paths)
    set_structure(made, changed)
    plan = model.current_plan
    made.taco_plan = None if plan is None else changed_plan(plan, changed, made)  # type: ignore[assignment]
    return made


def _int8(module: LowRankLinear) -> Int8LowRankLinear:
    bias = module.bias is not None
    made = Int8LowRankLinear(
        module.in_features, module.out_features, module.rank, bias, module.u.device, module.u.dtype,
        module.pivot is not None,
    )  # fmt: skip
    made.fill(module.u, module.v, module.bias, module.pivot)
    return made.train(module.training)
