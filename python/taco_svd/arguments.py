"""What the arguments of `compress` may be, looked at before anything is done with them."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import TacoError, UnsupportedModelError

LOADING = "AutoModelForCausalLM.from_pretrained"


def check_given_model(model: Any) -> None:
    """Refuses what is no transformers language model with plain weights, and says how to come by one.

    Raises:
        TacoError: another object; a model that is wrapped, adapted (PEFT) or without a head; or inference mode, in
            which nothing can be differentiated.
        UnsupportedModelError: its weights are quantised.
    """
    if isinstance(model, (str, os.PathLike)):
        raise TacoError(
            f"compress takes a loaded model, not the name {str(model)[:200]!r}: load it with {LOADING}, or use the "
            "command line (taco-svd compress MODEL)."
        )
    if not isinstance(model, nn.Module):
        raise TacoError(f"compress takes a transformers model ({LOADING}), got {type(model).__name__}.")
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise TacoError(f"{name}: this model is what torch.compile gave; pass the one that was compiled.")
    if _is_adapted(model):
        raise TacoError(f"{name} has adapters (PEFT): compress what its merge_and_unload() gives.")
    if not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None)
        hint = (
            "pass the model inside it (.module)" if isinstance(inner, PreTrainedModel) else f"load one with {LOADING}"
        )
        raise TacoError(f"{name} is no transformers model; {hint}.")
    if not model.can_generate() and model.get_output_embeddings() is None:
        raise TacoError(f"{name} has no language-modelling head, so it predicts no token; load it with {LOADING}.")
    _refuse_quantised(model)
    if torch.is_inference_mode_enabled():
        raise TacoError("torch.inference_mode() is on, and compressing needs gradients; call compress outside of it.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise TacoError(f"{name} was made inside torch.inference_mode(), so it has no gradients; load it outside.")


def _is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped a model, or layers inside it: a model that was unloaded may keep its `peft_config`."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
        return True
    return any(hasattr(module, "base_layer") for module in model.modules())


def _refuse_quantised(model: PreTrainedModel) -> None:
    """Quantisers put classes of their own in the place of weights (torchao, bitsandbytes) or modules (torch.ao)."""
    kind = type(model).__name__
    for path, module in model.named_modules():
        found = "quantized" in type(module).__module__.split(".")
        own = type(module).__name__
        for parameter in module.parameters(recurse=False):
            if type(parameter) is not nn.Parameter and not isinstance(parameter, DTensor):
                found, own = True, type(parameter).__name__
        if found:
            raise UnsupportedModelError(
                f"{kind} has quantised weights ({path}: {own}); load it in float32, bfloat16 or float16 to compress it."
            )


def check_given_tokenizer(tokenizer: Any) -> None:
    """Refuses what is not a tokenizer of transformers.

    Raises:
        TacoError: no tokenizer of transformers; a processor has one.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase):
        raise TacoError(f"{type(tokenizer).__name__} is no tokenizer; pass the one inside it (.tokenizer).")
    raise TacoError(
        f"The tokenizer must be one that AutoTokenizer.from_pretrained gives, got {type(tokenizer).__name__}."
    )


def whole_number(name: str, value: Any) -> int:
    """A whole number, of whatever type that is one (numpy's are).

    Raises:
        TacoError: it is none, 2.0 and True included.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TacoError(f"{name} must be a whole number, got {_shown(value)}.")


def whole_or_none(name: str, value: Any) -> int | None:
    """As `whole_number`; None where there is none."""
    return None if value is None else whole_number(name, value)


def given_layers(layers: Any) -> int | list[int] | None:
    """A number of layers, or the list of their indices.

    Raises:
        TacoError: neither.
    """
    if isinstance(layers, (list, tuple, range)):
        return [whole_number("each of the layers", layer) for layer in layers]
    return whole_or_none("layers (or each of them, in a list)", layers)


def fraction_or_none(name: str, value: Any) -> float | None:
    """A number of any library as Python's own, which plans and work directories can hold; None where there is none.

    Raises:
        TacoError: what is given is no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TacoError(f"{name} must be a number, got {_shown(value)}.")
    if type(value) in (int, float):
        return value
    try:
        return float(str(value))  # of numpy's float32 what was meant: 0.7, and not 0.699999988
    except ValueError:  # a tensor, a fraction
        return float(value)


def _shown(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
