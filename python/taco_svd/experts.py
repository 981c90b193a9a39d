"""Opens the experts of a mixture: one linear map per expert instead of one tensor for all, so that each map is found,
measured and factorised like any other.

transformers 5 keeps a layer's experts in two parameters [experts, out, in]. `open_experts` puts `OpenExperts` in their
place, whose maps are views of the same memory; `stacked` is the way back. A compressed model whose structure
names maps of single experts is opened when it is built (`surgery.install`), any other keeps transformers' modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .module_tree import put_module, structural_copy
from .structure import Structure

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.(?=[^.]+$)")
MAPS = ("gate_up_proj", "down_proj")
# What may become of a mixture's experts; the first by default.
EXPERTS = ("factorised", "whole")


class Expert(nn.Module):
    """One expert: ``down_proj(act(gate) * up)`` with ``gate, up = gate_up_proj(x)``. x: [tokens, hidden]."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, act_fn: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


class OpenExperts(nn.ModuleList):
    """The experts of one layer, called as transformers calls its own.

    Attributes:
        run_idle: also runs experts that no token was sent to, on no rows: whoever gathers statistics sees every map
            in every batch.
    """

    def __init__(self, experts: Iterable[Expert] = (), run_idle: bool = False) -> None:
        super().__init__(experts)
        self.run_idle = run_idle

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each token's experts, weighted and added up.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token; a number beyond the last expert is none.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, hidden], the weighted sum of what each token's experts give.
        """
        # Sorted by expert, each expert's choices lie side by side, in the order of tokens. On a GPU the host waits once
        # a layer, for where they begin; asking expert by expert it would wait for every one of them.
        chosen = top_k_index.flatten()
        chosen, order = chosen.sort(stable=True)
        numbers = torch.arange(len(self) + 1, dtype=chosen.dtype, device=chosen.device)
        starts: list[int] = torch.searchsorted(chosen, numbers).tolist()
        tokens, places = order // top_k_index.shape[1], order % top_k_index.shape[1]
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            here = slice(starts[number], starts[number + 1])
            if here.start == here.stop and not self.run_idle:
                continue
            token, place = tokens[here], places[here]
            y = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total


def expert_number(path: str) -> int | None:
    """Which expert a dotted path is a map of: 3 for ``mlp.experts.3.down_proj``; None for other maps."""
    found = _EXPERT.search(path)
    return int(found[1]) if found else None


def kind_of(path: str) -> str:
    """The path with the expert's number left out: what all experts of a layer have in common."""
    return _EXPERT.sub(lambda match: match[0].replace(match[1], "*"), path)


def is_of_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts, open or not."""
    return "experts" in name.split(".")


def share_of_experts(config: Any) -> float:
    """The share of a layer's experts that a token is sent to; 1 for a model without any."""
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    return min(1.0, used / count) if count and used else 1.0


def names_experts(structure: Structure) -> bool:
    """Whether a structure factorises maps of single experts."""
    return any(expert_number(path) is not None for ranks in structure.low_rank.values() for path in ranks)


def opened(model: PreTrainedModel, run_idle: bool = True) -> PreTrainedModel:
    """A copy of the module tree with its experts open, sharing all weights; the model itself where nothing opens."""
    if not any(_can_open(module) for module in model.modules()):
        return model
    copied = structural_copy(model)
    open_experts(copied, run_idle)
    return copied


def open_experts(model: nn.Module, run_idle: bool = False) -> None:
    """Opens every experts module whose layout is known, in place; the weights stay where they are."""
    for path, module in list(model.named_modules()):
        if _can_open(module):
            put_module(model, path, _open(module, run_idle))


def stacked(experts: OpenExperts, like: nn.Module) -> nn.Module:
    """Open experts whose maps are all dense as a module of `like`'s class, with parameters [experts, out, in].

    Args:
        like: an experts module of the same sizes; it may be on the meta device and is not changed.
    """
    made = like.__new__(type(like))
    made.__dict__.update(like.__dict__)
    made._parameters, made._modules, made._buffers = {}, dict(like._modules), {}
    for name in MAPS:
        weights = [getattr(expert, name).weight.detach() for expert in experts]
        made._parameters[name] = nn.Parameter(torch.stack(weights), requires_grad=False)
    return made.train(experts.training)


def set_idle(model: nn.Module, run_idle: bool) -> None:
    """Says of all open experts whether those without tokens run (see `OpenExperts.run_idle`)."""
    for module in open_modules(model):
        module.run_idle = run_idle


def open_modules(model: nn.Module) -> Iterator[OpenExperts]:
    """The open experts of a model or layer."""
    return (module for module in model.modules() if isinstance(module, OpenExperts))


def _can_open(module: nn.Module) -> bool:
    """Whether a module is experts in the common layout: gate and up one above the other, no biases, no own norms."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != set(MAPS) or any(parameter.ndim != 3 for parameter in own.values()):
        return False
    expected = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    if any(getattr(module, name, value) is not value for name, value in expected.items()):
        return False
    if getattr(module, "has_post_expert_norm", False) or not callable(getattr(module, "act_fn", None)):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and getattr(gate, "__name__", "") != "_default_apply_gate":
        return False  # an activation of its own
    up, down = own["gate_up_proj"].shape, own["down_proj"].shape
    return up[0] == down[0] and up[1] == 2 * down[2] and up[2] == down[1]


def _open(module: nn.Module, run_idle: bool) -> OpenExperts:
    found = []
    for number in range(len(module.gate_up_proj)):  # type: ignore[arg-type]
        gate_up, down = (_linear(getattr(module, name), number) for name in MAPS)
        found.append(Expert(gate_up, down, module.act_fn))
    return OpenExperts(found, run_idle).train(module.training)


def _linear(stack: nn.Parameter, number: int) -> nn.Linear:
    """Matrix `number` of a parameter [experts, out, in] as a linear map on the same memory."""
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = stack.shape[1:]
    made.weight = nn.Parameter(stack.detach()[number], requires_grad=stack.requires_grad)
    return made
