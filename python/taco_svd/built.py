"""Finished layers of a compressed model in a `Store`: what a layer has of its own, and how to put it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .architectures import Architecture
from .replacement import LowRankBridge, LowRankLinear, attach_bridge
from .store import Store
from .structure import Structure
from .surgery import empty_factors

BRIDGE = "bridge"


def save_layer(store: Store, name: str, dense: nn.Module, built: nn.Module, note: Any = None) -> None:
    """Stores every parameter and buffer of a finished layer that it does not share with the dense one."""
    store.put(name, own_tensors(dense, built), note)


def own_tensors(dense: nn.Module, built: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a finished layer that it does not share with the dense one."""
    theirs = {key: tensor.data_ptr() for key, tensor in _tensors(dense).items()}
    return {key: tensor for key, tensor in _tensors(built).items() if theirs.get(key) != tensor.data_ptr()}


def restore_layer(
    store: Store, name: str, architecture: Architecture, structure: Structure, layer: int, block: str | None = None
) -> Any:
    """Puts a stored layer's modules into `architecture`, a structural copy of the dense model; returns the note.

    The tensors are the store's own, mapped where they are on disk. `block` restricts it to that block's maps.
    """
    tensors = store.get(name)
    device = next(architecture.layers[layer].parameters()).device
    for site in architecture.sites([layer], block):
        module = architecture.module(site)
        own = {key.removeprefix(f"{site.path}."): value for key, value in tensors.items() if _of(key, site.path)}
        rank = structure.low_rank.get(layer, {}).get(site.path)
        made: nn.Module
        if isinstance(module, LowRankLinear):
            made = module
        elif rank is not None:
            made = empty_factors(module, rank, structure.is_pivoted(layer, site.path))
        elif own:
            made = with_own_parameters(module)
        else:
            continue
        for key, value in own.items():
            _set(made, key, value.to(device))
        architecture.replace(site, made)
    bridge = {key.removeprefix(f"{BRIDGE}."): value for key, value in tensors.items() if _of(key, BRIDGE)}
    if bridge:
        spec = next(spec for spec in structure.bridges if spec.after == layer)
        like = bridge["v"]
        made_bridge = LowRankBridge(like.shape[1], spec.rank, spec.bias, spec.eps, "meta", like.dtype)
        for key, value in bridge.items():
            _set(made_bridge, key, value.to(device))
        attach_bridge(architecture.layers[layer], made_bridge)
    return store.note(name)


def with_own_parameters(module: nn.Module) -> nn.Module:
    """A module of the same class and settings whose parameters can be set without touching the original's."""
    new = module.__new__(type(module))
    new.__dict__.update(module.__dict__)
    new._parameters = dict(module._parameters)
    new._buffers = dict(module._buffers)
    new._modules = dict(module._modules)
    return new


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _of(key: str, path: str) -> bool:
    return key.startswith(f"{path}.")


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = value
    else:
        setattr(module, name, nn.Parameter(value, requires_grad=value.is_floating_point()))
