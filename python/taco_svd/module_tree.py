"""A model as a tree of modules: copied without its weights, and changed at one place."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def structural_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares every parameter and buffer with `model`.

    Modules of the copy can be replaced and layers taken out while the original stays whole, for no memory.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = tensor
    copied = copy.deepcopy(model, memo)
    if len({parameter.device for parameter in model.parameters()}) == 1:
        _take_hooks_off(copied)
    return copied


def _take_hooks_off(model: nn.Module) -> None:
    """Takes accelerate's hooks off a model that lies on one device, where they have nothing to do.

    They replace a module's `forward` by one that is bound to that module: a layer that is given a bridge, or a map that
    is given a weight, would go on as before.
    """
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(module).forward:  # what it has been set back to
            del module.forward


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a dotted path, in the place of what is there."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
