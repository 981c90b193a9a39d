"""PEFT's LoRA on top of factorised maps, which PEFT does not know by itself."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture
from .errors import TacoError
from .replacement import LowRankLinear, NarrowLinear


@functools.cache
def _lora_class() -> type[nn.Module]:
    """The adapter around a `LowRankLinear`; made on demand, since peft is an optional package."""
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        raise TacoError("LoRA on a compressed model needs peft: pip install peft.") from None

    class LowRankLora(nn.Module, LoraLayer):
        """``base(x) + scaling B A dropout(x)``: a second pair of factors beside the compressed ones."""

        # peft's own, by adapter; its package has no types to take them from
        lora_A: Any
        lora_B: Any
        lora_dropout: Any
        base_layer: Any
        update_layer: Any
        scaling: Any
        active_adapters: Any
        disable_adapters: Any

        def __init__(
            self,
            base_layer: nn.Module,
            adapter_name: str,
            config: Any,
            r: int = 8,
            lora_alpha: int = 8,
            **kwargs: Any,
        ) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            if config.use_dora:
                raise TacoError("DoRA scales the rows of a dense weight; a factorised map takes plain LoRA.")
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            # peft looks for a `weight` to learn the device from
            for part in (self.lora_A, self.lora_B):
                part[adapter_name].to(next(base_layer.parameters()).device)

        def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
            return module.in_features, module.out_features

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y: torch.Tensor = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters:
                return y
            for name in self.active_adapters:
                if name in self.lora_A:
                    lora_a, lora_b = self.lora_A[name], self.lora_B[name]
                    change = lora_b(lora_a(self.lora_dropout[name](x.to(lora_a.weight.dtype))))
                    y = y + (change * self.scaling[name]).to(y.dtype)
            return y

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise TacoError("An adapter of a factorised map cannot be merged: the factors have a rank of their own.")

        def unmerge(self) -> None:
            """Nothing is ever merged."""

    return LowRankLora


def with_lora_support(config: Any, model: PreTrainedModel | None = None) -> Any:
    """A `peft.LoraConfig` that also takes factorised maps for targets; returns the same object.

    Without it PEFT refuses a target that is factorised. To load a saved adapter:
    ``PeftModel.from_pretrained(model, path, config=with_lora_support(LoraConfig.from_pretrained(path)))``.

    Args:
        model: the compressed model, needed for ``target_modules="all-linear"`` only: PEFT passes over factorised maps
            there, so the names of all maps of its layers take the word's place.

    Raises:
        TacoError: peft is missing, or too old to take other modules; or "all-linear" without a model.
    """
    if not hasattr(config, "_register_custom_module"):
        raise TacoError(f"{type(config).__name__} cannot be told of other modules; a peft.LoraConfig is needed.")
    if str(config.target_modules).lower() == "all-linear":
        if model is None:
            raise TacoError(
                "For PEFT target_modules='all-linear' is dense maps only: with_lora_support(config, model) names both, "
                "or name the maps yourself."
            )
        config.target_modules = _all_maps(model)
    config._register_custom_module({LowRankLinear: _lora_class()})
    return config


def _all_maps(model: PreTrainedModel) -> set[str]:
    """Names of the dense and factorised maps of a model's layers."""
    architecture = Architecture(model, quantised=True)
    return {
        f"{architecture.stack_path}.{site.layer}.{site.path}"
        for site in architecture.sites()
        if not isinstance(architecture.module(site), NarrowLinear)
    }
