"""Model classes for vLLM, made on demand: `TacoLlamaForCausalLM` is vLLM's own `LlamaForCausalLM`, compressed.

The registry of vLLM names classes as "module:class"; here the class is made when it is asked for. It builds vLLM's
model for the kept layers, with factors where the structure has them (`factors`) and bridges (`bridges`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from vllm import envs
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer

from ..errors import TacoError
from ..experts import expert_number
from ..modeling import compressed_config_class
from ..structure import Structure
from .bridges import attach
from .factors import SCALES, FactorsConfig
from .registration import CLASSIFIER, PREFIX
from .shards import chosen_layout

Weights = Iterable[tuple[str, torch.Tensor]]

# What vLLM's class of that name calls parts of names, where it has kept those of older transformers.
RENAMED = {
    "MixtralForCausalLM": {
        ".mlp.experts.gate_up_proj": ".mlp.experts.w13",
        ".mlp.experts.down_proj": ".mlp.experts.w2",
        ".mlp.": ".block_sparse_moe.",
    }
}

# What vLLM's class of that name does to all tensors of a map that is fused in the checkpoint: (the part of the model
# that does it, its method). It sorts rows of outputs, which u and bias have, and v and pivot have not.
SORTED_ROWS = {"BloomForCausalLM": ("transformer", "_repack_qkv")}


class ServedModel:
    """Mixin over a model class of vLLM."""

    _taco_base = ""  # the name of vLLM's class; that of a subclass which vLLM makes for pooling is another
    _taco_loaded = False  # whether the first weights are complete

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        hf_config = vllm_config.model_config.hf_config
        structure = Structure.from_dict(getattr(hf_config, "taco_svd", None))
        if envs.VLLM_BATCH_INVARIANT and (structure.low_rank or structure.bridges):
            export = "" if structure.bridges else ", or export the checkpoint (taco-svd export DIR --dense OUT)"
            raise TacoError(
                "VLLM_BATCH_INVARIANT asks for results that do not depend on the batch, and those of low-rank maps do: "
                f"different kernels compute few rows and many, and round at different places. Unset it{export}."
            )
        choice = chosen_layout(getattr(vllm_config, "additional_config", None))
        factors = FactorsConfig(structure, vllm_config.quant_config, choice)
        factors.packed_modules_mapping = dict(getattr(self, "packed_modules_mapping", None) or {})
        # for the time of building only: a draft model that is built from the same config is none of ours
        given, vllm_config.quant_config = vllm_config.quant_config, factors
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        finally:
            vllm_config.quant_config = given
        self._taco_expected = expected_weights(hf_config)
        layers = decoder_layers(self, len(structure.kept))  # type: ignore[arg-type]
        here = [position for position, layer in enumerate(layers) if not isinstance(layer, PPMissingLayer)]
        for position in here:
            for path in structure.low_rank.get(structure.kept[position], {}):
                if (position, path) not in factors.claimed:
                    hint = "" if expert_number(path) is None else " Compress with --experts whole for vLLM."
                    raise TacoError(
                        f"vLLM's {type(self).__name__} has no linear layer for {path} of layer {position}, which is "
                        f"factorised in this checkpoint.{hint}"
                    )
        owner, sort = SORTED_ROWS.get(self._taco_base, ("", ""))
        if owner:
            inner = getattr(self, owner)
            setattr(inner, sort, passing_factors(getattr(inner, sort)))
        for bridge in structure.bridges:
            position = structure.position(bridge.after)
            if position in here:
                attach(layers[position], bridge, hf_config.hidden_size, vllm_config.model_config.dtype)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Loads a checkpoint, and raises where vLLM would leave weights that it lacks at random values.

        Weights that come later, to replace the first ones, may come in parts.

        Raises:
            TacoError: the checkpoint lacks weights, or has some of the wrong shape.
        """
        missing = dict(self._taco_expected)
        renamed = RENAMED.get(self._taco_base, {})

        def watched() -> Iterable[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                shape = missing.pop(name, None)
                if shape is not None and shape != tuple(weight.shape):
                    raise TacoError(f"{name} is {tuple(weight.shape)}, {shape} is needed; the checkpoint is damaged.")
                if shape is not None and name.endswith(tuple(SCALES)):
                    stem, _, kind = name.rpartition(".")
                    name = f"{stem}.{SCALES[kind]}"
                for ours, theirs in renamed.items():
                    name = name.replace(ours, theirs)
                yield name, weight

        loaded = super().load_weights(watched())  # type: ignore[misc]
        if self._taco_loaded:
            return loaded
        if missing:
            raise TacoError(
                f"{len(missing)} weights are missing from the checkpoint (first: {min(missing)}); it is incomplete. "
                "Copy it again, or compress again."
            )
        # some of vLLM's loaders pass over names that they do not know
        empty = set() if loaded is None else unfilled(self, loaded)  # type: ignore[arg-type]
        if empty:
            raise TacoError(
                f"vLLM's {type(self).__name__} filled {len(empty)} of its weights from nothing in the checkpoint "
                f"(first: {min(empty)}); serve it with transformers."
            )
        return loaded

    def process_weights_after_loading(self) -> None:
        """vLLM calls this once the first weights are there, also where they are dummies."""
        self._taco_loaded = True
        after = getattr(super(), "process_weights_after_loading", None)
        if after is not None:
            after()


def passing_factors(sort: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """`sort`, a generator over a checkpoint's weights, for all that has rows of outputs; the rest passes as it is."""

    def sorted_rows(weights: Weights) -> Weights:
        for name, weight in weights:
            if name.endswith((".v", ".pivot", *(f".{scale}" for scale in SCALES.values()))):
                yield name, weight
            else:
                yield from sort([(name, weight)])

    return sorted_rows


def unfilled(model: nn.Module, loaded: Iterable[str]) -> set[str]:
    """Names of the model's parameters that are not among those loaded, but should be.

    A checkpoint does not hold what vLLM computes itself: the weights and scales of layers that it quantises while it
    loads them, and the scales of a quantised key/value cache.
    """
    names = {name for name, _ in model.named_parameters()} - set(loaded)
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "uses_meta_device", False) or isinstance(method, BaseKVCacheMethod):
            names -= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
    return names


def expected_weights(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this config must hold: those of the transformers model, built empty."""
    plain = type(hf_config)
    config = compressed_config_class(plain).from_dict({**hf_config.to_dict(), "taco_svd": hf_config.taco_svd})
    classifier = any(name.endswith(CLASSIFIER) for name in hf_config.architectures or [])
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(config)
    model.tie_weights()
    stateful = set(model.state_dict(keep_vars=True))
    tensors = [*model.named_parameters(), *model.named_buffers()]  # tied ones once
    return {name: tuple(tensor.shape) for name, tensor in tensors if name in stateful}


def decoder_layers(model: nn.Module, depth: int) -> nn.ModuleList:
    """The model's one list of `depth` decoder layers.

    Raises:
        TacoError: it has none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    found = [stack for stack in found if any(len(list(layer.children())) > 1 for layer in stack)]
    if len(found) != 1:
        raise TacoError(f"{type(model).__name__}: looked for one list of {depth} decoder layers, found {len(found)}.")
    return found[0]


def served_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of compressed models over a model class of vLLM."""
    name = PREFIX + base.__name__
    made = type(name, (ServedModel, base), {"__module__": __name__, "__qualname__": name, "_taco_base": base.__name__})
    if base.__name__.startswith("Transformers"):
        made.__name__ = base.__name__  # by which vLLM knows its Transformers backend, and what may be fused there
    return made


def __getattr__(name: str) -> type[nn.Module]:
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = served_class(ModelRegistry.models[architecture].load_model_cls())
    globals()[name] = made  # one class per name: pickles refer to it by that
    return made
