"""Finds the parts of a decoder-only language model that Taco-SVD works on, by structure and not by model name.

A model is handled when it has exactly one stack of alike decoder layers, each with one attention block and
dense linear maps (`nn.Linear`, or the transposed `Conv1D` of GPT-2). Experts of a mixture (parameters of three
dimensions, one matrix per expert) are no linear maps unless they have been opened (`experts`); their router never is:
both count, go and are bridged with their layer. Anything else is refused before any work starts, with a sentence that
says what was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModelError
from .experts import OpenExperts
from .int8_linear import Int8LowRankLinear
from .module_tree import put_module
from .replacement import LowRankLinear, NarrowLinear

# Lists in a config that hold one entry per layer and are cut together with the layers.
PER_LAYER_CONFIG_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")

BLOCKS = ("attention", "mlp")
# What models call the map that chooses among experts, and the gate of experts that all tokens share.
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class LinearSite:
    """One linear map inside a decoder layer.

    Attributes:
        layer: index of the decoder layer.
        path: dotted path below the layer, e.g. ``self_attn.q_proj``.
        block: ``"attention"`` or ``"mlp"``.
    """

    layer: int
    path: str
    block: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.path}"


def set_config(model: nn.Module, config: Any) -> None:
    """Gives a model another config: attention blocks and the inner model hold it too, and read it in forward."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


class Architecture:
    """A view of a model as a stack of decoder layers, each a set of named linear maps in two blocks.

    Holds no tensors of its own: it looks modules up in `model` each time, so it stays right while modules are
    being replaced.

    Args:
        model: an ordinary or a compressed model.
        quantised: whether its dense weights may be, or be about to be, quantised: fine for a model that is loaded, not
            for one that is to be compressed.

    Raises:
        UnsupportedModelError: when the structure is not one described at the top of this file.
    """

    def __init__(self, model: PreTrainedModel, quantised: bool = False) -> None:
        self.model = model
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder model; only decoder-only language models are supported."
            )
        if getattr(config, "quantization_config", None) is not None and not quantised:
            raise UnsupportedModelError(
                f"{type(model).__name__} is loaded quantised; load it in float32, bfloat16 or float16 to compress it."
            )
        if getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModelError(
                f"{type(model).__name__} shares keys and values between layers (num_kv_shared_layers="
                f"{config.num_kv_shared_layers}); taking a layer out would break the layers that read from it."
            )
        if getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(
            config, "reorder_and_upcast_attn", False
        ):
            raise UnsupportedModelError(
                "scale_attn_by_inverse_layer_idx / reorder_and_upcast_attn make attention depend on the layer's "
                "number, which changes when layers are taken out."
            )
        if getattr(config, "is_heterogeneous", False):
            raise UnsupportedModelError(
                f"{type(model).__name__}: config.per_layer_config gives single layers values of their own, by number, "
                "and numbers change when layers are taken out."
            )
        if config.model_type == "diffllama":
            raise UnsupportedModelError(
                f"{type(model).__name__}: its attention is scaled by the layer's number, which changes when layers are "
                "taken out."
            )
        self.stack_path = self._find_stack(model)
        self._check_layers()
        self._attention_path = self._find_attention(self.layers[0])
        self.paths: tuple[str, ...] = tuple(self._linear_paths(self.layers[0]))
        self.experts_block: str | None = _experts_block(self.layers[0])
        self._check_linears()

    # -- finding ---------------------------------------------------------------------------------------------

    @staticmethod
    def _find_stack(model: PreTrainedModel) -> str:
        depth = getattr(model.config, "num_hidden_layers", None)
        if not isinstance(depth, int):
            raise UnsupportedModelError(
                f"{type(model).__name__} ({model.config.model_type}): its config has no num_hidden_layers; "
                "only plain decoder-only language models are supported."
            )
        stacks = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == depth
            # a list of bare linear maps or experts inside a layer may have the same length by accident
            and any(isinstance(child, nn.Module) and len(list(child.children())) > 1 for child in module)
        ]
        outer = [name for name in stacks if not any(name.startswith(other + ".") for other in stacks if other != name)]
        if len(outer) != 1:
            found = ", ".join(outer) if outer else "none"
            raise UnsupportedModelError(
                f"{type(model).__name__} ({model.config.model_type}): looked for one list of {depth} decoder layers, "
                f"found {len(outer)} ({found})."
            )
        return outer[0]

    def _check_layers(self) -> None:
        kinds = {getattr(type(layer), "taco_base_name", type(layer).__name__) for layer in self.layers}
        if len(kinds) != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: its layers are of different kinds ({', '.join(sorted(kinds))}); "
                "hybrid stacks are not supported."
            )
        config = self.model.config
        for key, value in vars(config).items():
            if (
                isinstance(value, (list, tuple))
                and len(value) == len(self.layers) > 2
                and key not in PER_LAYER_CONFIG_LISTS
                and not key.startswith("_")
                and ("layer" in key or "block" in key)
            ):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: config.{key} has one entry per layer and is not known here, "
                    "so layers cannot be taken out safely."
                )
        for name, parameter in self.layers[0].named_parameters():
            owner = self.layers[0].get_submodule(name.rpartition(".")[0])
            if parameter.ndim > 2 and not _is_experts(owner):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: the layer parameter {name} has {parameter.ndim} dimensions "
                    f"{tuple(parameter.shape)}; only linear maps and the experts of a mixture are supported."
                )

    def _find_attention(self, layer: nn.Module) -> str:
        found = [
            name
            for name, child in layer.named_children()
            if (hasattr(child, "layer_idx") or "attention" in type(child).__name__.lower())
            and any(_is_map(module) for module in child.modules())
        ]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: looked for one attention block in {type(layer).__name__}, "
                f"found {len(found)} ({', '.join(found) or 'none'})."
            )
        return found[0]

    @staticmethod
    def _linear_paths(layer: nn.Module) -> Iterator[str]:
        routed = {path.rpartition(".")[0] for path, module in layer.named_modules() if _is_experts(module)}
        routers = {f"{parent}.{name}" for parent in routed for name in ROUTERS}
        for path, module in layer.named_modules():
            # a router beside experts, where it is a linear map or holds one: which experts are chosen must not change
            if _is_map(module) and not any(f"{path}.".startswith(f"{router}.") for router in routers):
                yield path

    def _check_linears(self) -> None:
        blocks = {self.block_of(path) for path in self.paths}
        if self.experts_block is not None:
            blocks.add("mlp")
        if blocks != set(BLOCKS):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: expected linear maps in an attention and in an MLP block, found "
                f"{', '.join(self.paths) or 'none'}."
            )
        for index, layer in enumerate(self.layers):
            paths = tuple(self._linear_paths(layer))
            if paths != self.paths or _experts_block(layer) != self.experts_block:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: layer {index} has the linear maps {', '.join(paths)} where layer 0 "
                    f"has {', '.join(self.paths)}; mixed stacks (some layers with experts?) are not supported."
                )
            for path in paths:
                module = layer.get_submodule(path)
                for name, parameter in module.named_parameters():
                    if not parameter.is_floating_point() and not isinstance(module, Int8LowRankLinear):
                        raise UnsupportedModelError(
                            f"layer {index}, {path}.{name}: {parameter.dtype} weights; load the model in float32, "
                            "bfloat16 or float16 to compress it."
                        )

    # -- looking up ------------------------------------------------------------------------------------------

    @property
    def layers(self) -> nn.ModuleList:
        stack = self.model.get_submodule(self.stack_path)
        assert isinstance(stack, nn.ModuleList)
        return stack

    def put_layers(self, layers: Iterable[nn.Module]) -> None:
        """Makes these the model's stack, and tells their attention blocks which layers of it they are."""
        stack = nn.ModuleList(layers)
        self.model.set_submodule(self.stack_path, stack)
        for position, layer in enumerate(stack):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = position  # type: ignore[assignment]

    def site(self, layer: int, path: str) -> LinearSite:
        """The linear map at `path` of a layer, as `sites` names it."""
        return LinearSite(layer, path, self.block_of(path))

    def block_of(self, path: str) -> str:
        return "attention" if path == self._attention_path or path.startswith(self._attention_path + ".") else "mlp"

    def sites(self, layers: list[int] | None = None, block: str | None = None) -> list[LinearSite]:
        """All linear maps of the given layers (default: all), in module order, of one block or of both."""
        chosen = range(len(self.layers)) if layers is None else layers
        return [
            self.site(layer, path) for layer in chosen for path in self.paths if block in (None, self.block_of(path))
        ]

    def module(self, site: LinearSite) -> nn.Module:
        return self.layers[site.layer].get_submodule(site.path)

    def replace(self, site: LinearSite, module: nn.Module) -> None:
        put_module(self.layers[site.layer], site.path, module)


def _is_experts(module: nn.Module) -> bool:
    """Experts as transformers 5 stores them, parameters [experts, ., .] for all of a layer's experts; or open ones."""
    if isinstance(module, OpenExperts):
        return True
    own = list(module.parameters(recurse=False))
    return "experts" in type(module).__name__.lower() and any(parameter.ndim == 3 for parameter in own)


def _experts_block(layer: nn.Module) -> str | None:
    """The child of a layer that holds its experts, None where there are none."""
    for path, module in layer.named_modules():
        if _is_experts(module):
            return path.partition(".")[0]
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _is_map(module: nn.Module) -> bool:
    """A dense linear map, or what stands in for one."""
    return _is_linear(module) or isinstance(module, (LowRankLinear, Int8LowRankLinear, NarrowLinear))


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as [out, in], whatever way the module stores it (no copy)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out features, in features) of a dense or factorised linear map."""
    if isinstance(module, (LowRankLinear, Int8LowRankLinear, NarrowLinear)):
        return module.out_features, module.in_features
    out_features, in_features = dense_weight(module).shape
    return out_features, in_features


def slice_config(config: PreTrainedConfig, keep: list[int]) -> PreTrainedConfig:
    """A copy of `config` for the layers `keep` (ascending indices into the layers that `config` describes)."""
    values = config.to_dict()
    for key in PER_LAYER_CONFIG_LISTS:
        if isinstance(values.get(key), list):
            values[key] = [values[key][index] for index in keep]
    if isinstance(values.get("scale_depth"), (int, float)):
        # MiniCPM multiplies what its blocks add by scale_depth / sqrt(layers): layers that stay are to add the same
        values["scale_depth"] *= math.sqrt(len(keep) / config.num_hidden_layers)
    # GPT-2 and others call it n_layer: write the name that the class serialises
    depth_key = (config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    values[depth_key] = len(keep)
    sliced = type(config).from_dict(values)
    sliced._name_or_path = getattr(config, "_name_or_path", "")
    copy_implementations(config, sliced)
    return sliced


def copy_implementations(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Makes a copy of a config run the same attention and experts as its source: `to_dict` leaves both out."""
    target._attn_implementation = source._attn_implementation
    target._experts_implementation = source._experts_implementation
