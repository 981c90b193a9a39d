"""PEFT's LoRA on top of factorised maps, which PEFT does not know by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture
from .errors import TacoError
from .int8_linear import Int8LowRankLinear
from .lora_layer import lora_class
from .modeling import CompressedConfig, CompressedModel, set_structure
from .plan import changed_plan
from .replacement import LowRankLinear

FACTORISED = (LowRankLinear, Int8LowRankLinear)


def with_lora_support(config: Any, model: PreTrainedModel | None = None) -> Any:
    """A `peft.LoraConfig` that also takes factorised maps for targets; returns the same object.

    Seldom needed: `adapter_hook` does the same whenever PEFT puts an adapter into a model with factorised maps.

    Args:
        model: the compressed model, needed for ``target_modules="all-linear"`` only: the names of all its dense and
            factorised maps take the word's place.

    Raises:
        TacoError: peft is missing, or too old to take other modules; the config is not for LoRA; or "all-linear"
            without a model.
    """
    # AdaLoraConfig is a LoraConfig, too, and AdaLora takes no other modules
    if not hasattr(config, "_register_custom_module") or config.peft_type != "LORA":
        raise TacoError(f"{type(config).__name__} cannot be told of other modules; a peft.LoraConfig is needed.")
    if _wants_all(config):
        if model is None:
            raise TacoError(
                "For PEFT target_modules='all-linear' is dense maps only: with_lora_support(config, model) names both, "
                "or name the maps yourself."
            )
        _name_all(config, model)
    config._register_custom_module(dict.fromkeys(FACTORISED, lora_class()))
    return config


def before_injection(tuner: Any, config: Any, model: nn.Module) -> None:
    """What PEFT has to know before it puts the adapter of `config` into `model`; nothing for ordinary models.

    A config that is not for LoRA is left as it is, and so is every config under a PEFT that is too old.
    """
    if getattr(config, "peft_type", None) != "LORA":
        return
    described = getattr(model, "config", None)
    if config.target_modules is None and isinstance(described, CompressedConfig):
        # PEFT has default targets by model type, and ours is none that it knows
        defaults = tuner.target_module_mapping.get(described.base_class.model_type)
        config.target_modules = set(defaults) if isinstance(defaults, (list, tuple)) else defaults
    if any(isinstance(module, FACTORISED) for module in model.modules()):
        try:
            lora_class()
        except TacoError:  # PEFT then refuses factorised targets in its own words
            return
        with_lora_support(config, model)  # type: ignore[arg-type]


def check_merges(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Checks all maps before the first one is merged, so that a refusal leaves the model as it was.

    Raises:
        TacoError: an adapter cannot be merged into a factorised map.
    """
    for module in _adapted(model):
        names = module.active_adapters if adapter_names is None else adapter_names
        module.check_merge([name for name in names if name in module.lora_A and name not in module.merged_adapters])


def has_adapters(model: nn.Module) -> bool:
    """Whether a factorised map of `model` has an adapter."""
    return bool(_adapted(model))


def follow_modules(model: nn.Module) -> None:
    """Writes the ranks that merging has changed into what a compressed model is saved by: its config and its plan."""
    if not isinstance(model, CompressedModel):
        return
    structure, plan = model.structure, model.current_plan
    low_rank: dict[int, dict[str, int]] = {}
    pivoted: dict[int, tuple[str, ...]] = {}
    architecture = Architecture(model, quantised=True)  # type: ignore[arg-type]
    for site in architecture.sites():
        module = architecture.module(site)
        if isinstance(module, (LowRankLinear, Int8LowRankLinear)):
            source = structure.kept[site.layer]
            low_rank.setdefault(source, {})[site.path] = module.rank
            if module.pivot is not None:
                pivoted[source] = (*pivoted.get(source, ()), site.path)
    merged = replace(structure, low_rank=low_rank, pivoted=pivoted)
    set_structure(model, merged)  # type: ignore[arg-type]
    model.taco_plan = None if plan is None else changed_plan(plan, merged, model, merged_adapters=True)  # type: ignore[arg-type]


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), FACTORISED)]


def _wants_all(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _name_all(config: Any, model: nn.Module) -> None:
    """Puts the names of all maps in the place of "all-linear": those that PEFT finds, and the factorised ones.

    Raises:
        TacoError: this PEFT does not tell which it finds.
    """
    try:
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as name_dense
    except ImportError:
        raise TacoError("This PEFT does not tell what 'all-linear' stands for; name the target modules.") from None
    name_dense(config, model)
    # a map that has an adapter lies inside of it
    factorised = {
        name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, FACTORISED)
    }
    config.target_modules = {*config.target_modules, *factorised}
