"""Back to ordinary models: factors multiplied out, layers put back or taken out, for export and for comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import Architecture, copy_implementations, set_config, slice_config
from .errors import TacoError
from .experts import OpenExperts, stacked
from .int8_linear import SCALES, Int8LowRankLinear
from .modeling import CompressedModel
from .module_tree import put_module, structural_copy
from .replacement import LowRankLinear, NarrowLinear, in_floats
from .surgery import drop_layers


def base_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The ordinary config of a compressed model: its kept layers, nothing of ours."""
    config: Any = model.config
    values = config.to_dict()
    values.pop("taco_svd")
    values["model_type"] = config.base_class.model_type
    values["architectures"] = [_base_class(model).__name__]
    plain: PreTrainedConfig = config.base_class.from_dict(values)
    copy_implementations(config, plain)
    return plain


def _base_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    assert isinstance(model, CompressedModel)
    return type(model).base_class


def as_ordinary(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Gives a compressed model whose modules are all ordinary its base class and `config`, in place."""
    model.__class__ = _base_class(model)
    set_config(model, config)
    return model


def multiply_out(module: LowRankLinear, transposed: bool) -> nn.Module:
    """The dense linear map of a factorised one; ``transposed`` gives GPT-2's Conv1D. Multiplied in float32."""
    weight = (module.u.detach().float() @ module.full_right_factor()).to(module.u.dtype)
    dense: nn.Module
    if transposed:
        dense = Conv1D(1, 1)
        dense.nf, dense.nx = module.out_features, module.in_features
        dense.weight = nn.Parameter(weight.T.contiguous())
        bias = weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias.detach().clone()
        dense.bias = nn.Parameter(bias)
    else:
        dense = nn.Linear(1, 1, bias=module.bias is not None)
        dense.in_features, dense.out_features = module.in_features, module.out_features
        dense.weight = nn.Parameter(weight)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.detach().clone())
    return dense.train(module.training)


def widen(module: NarrowLinear) -> nn.Linear:
    """The dense linear map of the model's own size that does what a narrower one does."""
    bias = module.full_bias()
    dense = nn.Linear(1, 1, bias=bias is not None)
    dense.in_features, dense.out_features = module.in_features, module.out_features
    dense.weight = nn.Parameter(module.full_weight())
    if bias is not None:
        dense.bias = nn.Parameter(bias)
    return dense.train(module.training)


def _floating(layer: nn.Module) -> torch.dtype:
    """The dtype of what is not an integer in a layer, or its scale: of its norms, say."""
    found = (value for name, value in layer.named_parameters() if not name.endswith(SCALES))
    return next((value.dtype for value in found if value.is_floating_point()), torch.float32)


def _densify(layer: nn.Module, like: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Gives a compressed layer ordinary modules, in place; `like`: a layer of the base class, without data."""
    transposed = any(isinstance(module, Conv1D) for module in like.modules())
    for path, module in list(layer.named_modules()):
        if isinstance(module, Int8LowRankLinear):
            module = in_floats(module, _floating(layer))
        if isinstance(module, LowRankLinear):
            put_module(layer, path, multiply_out(module, transposed))
        elif isinstance(module, NarrowLinear):
            put_module(layer, path, widen(module))
    for path, module in list(layer.named_modules()):
        if isinstance(module, OpenExperts):
            closed = stacked(module, like.get_submodule(path))
            closed.config = config  # type: ignore[assignment]
            put_module(layer, path, closed)
    return layer


def _ordinary_layer(model: PreTrainedModel) -> nn.Module:
    """A layer as the base class makes it, without data."""
    base_class: Any = _base_class(model)
    with torch.device("meta"):
        skeleton = base_class(base_config(model))
    return Architecture(skeleton).layers[0]


def _without_bridge(layer: nn.Module) -> nn.Module:
    if hasattr(type(layer), "taco_base_name"):
        layer.__class__ = type(layer).__mro__[2]  # Bridged -> mixin -> the model's own layer class
        del layer.bridge
    return layer


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model with the factors of a compressed one multiplied out; it saves no memory and no time.

    Raises:
        TacoError: `model` is not compressed, or has bridges (no ordinary architecture has a place for them).
    """
    if not isinstance(model, CompressedModel):
        raise TacoError(f"{type(model).__name__} is an ordinary model already; there is nothing to export.")
    if model.structure.bridges:
        raise TacoError(
            "This model has bridges, and no ordinary architecture has a place for them; it cannot be exported dense."
        )
    ordinary = structural_copy(model)
    like = _ordinary_layer(model)
    for layer in Architecture(ordinary).layers:
        _densify(layer, like, model.config)
    return as_ordinary(ordinary, base_config(model))


def with_layers_removed(model: PreTrainedModel, redundant: list[int]) -> PreTrainedModel:
    """What a compressed model would be had its redundant layers been removed with nothing in their place.

    Shares all weights with `model`: the yardstick of the overhead.
    """
    assert isinstance(model, CompressedModel)
    structure = model.structure
    stay = [position for position, source in enumerate(structure.kept) if source not in redundant]
    config = slice_config(base_config(model), stay)
    bare = structural_copy(model)
    architecture = Architecture(bare)
    like = _ordinary_layer(model)
    for layer in architecture.layers:
        _densify(_without_bridge(layer), like, model.config)
    drop_layers(architecture, stay)
    return as_ordinary(bare, config)


def dense_stand_in(model: PreTrainedModel, source_config: dict[str, Any]) -> PreTrainedModel:
    """A model of the source's shape for latency: kept layers shared, the others copies of a kept one.

    Its text is nonsense, its cost is the dense model's.
    """
    assert isinstance(model, CompressedModel)
    structure = model.structure
    config_class: Any = model.config.base_class
    values = {key: value for key, value in source_config.items() if key != "model_type"}
    config = config_class.from_dict(values)
    copy_implementations(model.config, config)
    dense = structural_copy(model)
    architecture = Architecture(dense)
    like = _ordinary_layer(model)
    layers = [_densify(_without_bridge(layer), like, model.config) for layer in architecture.layers]
    restored: list[Any] = []
    for source in range(structure.source_layers):
        if source in structure.kept:
            restored.append(layers[structure.position(source)])
        else:
            # a deep copy with weights of its own: shared weights would be found in the cache
            restored.append(copy.deepcopy(layers[min(source, len(layers) - 1)]))
    architecture.put_layers(restored)
    return as_ordinary(dense, config)
