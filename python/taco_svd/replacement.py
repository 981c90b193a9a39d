"""The modules that stand in for what was taken out, and how they are put into a model.

They call `taco_kernels` and nothing else: which kernel runs is decided there.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

import taco_kernels

from .architectures import Architecture, LinearSite, dense_weight, linear_shape
from .errors import TacoError
from .experts import names_experts, open_experts
from .int8_linear import Int8LowRankLinear
from .structure import NarrowSpec, Structure


def pivot_is_permutation(module: LowRankLinear | Int8LowRankLinear) -> bool:
    """Whether a factorised map's pivot names every input once (true where there is none)."""
    if module.pivot is None or module.pivot.is_meta:
        return True
    return torch.equal(module.pivot.sort().values.cpu(), torch.arange(module.in_features, dtype=torch.int32))


class LowRankLinear(nn.Module):
    """A linear map in two factors: ``y = u (v x) + bias``.

    Parameters `v` [rank, in_features], `u` [out_features, rank], `bias` [out_features] or None. When `pivoted`, the
    right factor is the identity on the inputs `pivot[:rank]`, and `v` [rank, in_features - rank] holds its columns
    for the inputs `pivot[rank:]`; the buffer `pivot` [in_features] (int32) is a permutation.
    """

    pivot: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pivoted: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        columns = in_features - rank if pivoted else in_features
        self.v = nn.Parameter(torch.empty(rank, columns, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer(
            "pivot", torch.empty(in_features, dtype=torch.int32, device=device) if pivoted else None, persistent=True
        )
        if self.v.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has the scale of `nn.Linear`'s default (for models built from a config)."""
        nn.init.normal_(self.v, std=1 / math.sqrt(3 * self.in_features))
        nn.init.normal_(self.u, std=1 / math.sqrt(self.rank))
        if self.pivot is not None:
            self.pivot.copy_(torch.arange(self.in_features, dtype=torch.int32))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pivot is not None:
            return taco_kernels.pivoted_low_rank_linear(x, self.v, self.u, self.pivot, self.bias)
        return taco_kernels.low_rank_linear(x, self.v, self.u, self.bias)

    def full_right_factor(self) -> torch.Tensor:
        """The right factor [rank, in_features], float32, whichever way it is stored."""
        v = self.v.detach().float()
        if self.pivot is None:
            return v
        full = torch.zeros(self.rank, self.in_features, device=v.device)
        full[:, self.pivot[: self.rank].long()] = torch.eye(self.rank, device=v.device)
        full[:, self.pivot[self.rank :].long()] = v
        return full

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, pivoted={self.pivot is not None}"
        )


def in_floats(module: Int8LowRankLinear, dtype: torch.dtype) -> LowRankLinear:
    """The same map with floating factors."""
    bias, pivoted = module.bias is not None, module.pivot is not None
    made = LowRankLinear(module.in_features, module.out_features, module.rank, bias, "meta", dtype, pivoted)
    u, v = module.floating(dtype)
    made.u, made.v = nn.Parameter(u), nn.Parameter(v)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype, copy=True))
    made.pivot = None if module.pivot is None else module.pivot.clone()
    return made.train(module.training)


def empty_factors(dense: nn.Module, rank: int, pivoted: bool) -> LowRankLinear:
    """What stands for a dense map in two factors, its tensors without data (meta): the caller makes and fills them."""
    out_features, in_features = linear_shape(dense)
    bias = getattr(dense, "bias", None) is not None
    made = LowRankLinear(in_features, out_features, rank, bias, "meta", dense_weight(dense).dtype, pivoted)
    return made.train(dense.training)


class NarrowLinear(nn.Module):
    """A dense linear map of fewer rows or columns than the model's own (see `structure.NarrowSpec`).

    Parameters `weight` [rows, columns] and `bias` [rows] or None. With ``spread == "rows"`` the buffer `index` [rows]
    (int64) tells where the outputs go in a vector of `out_features`, zero elsewhere; with ``"columns"`` the buffer
    `index` [columns] tells which of the `in_features` inputs are read. With ``"none"`` the input has `columns` and the
    output `rows` features.
    """

    index: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: NarrowSpec,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.weight = nn.Parameter(torch.empty(spec.rows, spec.columns, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(spec.rows, device=device, dtype=dtype)) if bias else None
        length = {"rows": spec.rows, "columns": spec.columns, "none": 0}[spec.spread]
        self.register_buffer("index", torch.empty(length, dtype=torch.int64, device=device) if length else None)
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Like `nn.Linear`'s default, on the first of the places (for models built from a config)."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(3 * self.spec.columns))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.index is not None:
            self.index.copy_(torch.arange(len(self.index)))

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor | None) -> None:
        """Copies weight [rows, columns], bias [rows] and index in, rounded to this module's dtype."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        if self.index is not None and index is not None:
            self.index.copy_(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.spread == "columns":
            return functional.linear(x[..., self.index], self.weight, self.bias)
        y = functional.linear(x, self.weight, self.bias)
        if self.spec.spread == "rows":
            assert self.index is not None
            return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.index, y)
        return y

    def index_is_valid(self) -> bool:
        """Whether the index names places of the original vector, none twice (true where there is none)."""
        if self.index is None or self.index.is_meta:
            return True
        places = self.out_features if self.spec.spread == "rows" else self.in_features
        index = self.index.cpu()
        return bool(((index >= 0) & (index < places)).all()) and len(index.unique()) == len(index)

    def full_weight(self) -> torch.Tensor:
        """The map of the model's own size that does the same, [out_features, in_features]."""
        full = self.weight.new_zeros(self.out_features, self.in_features)
        rows = self.index if self.spec.spread == "rows" else torch.arange(self.spec.rows, device=full.device)
        columns = self.index if self.spec.spread == "columns" else torch.arange(self.spec.columns, device=full.device)
        assert rows is not None and columns is not None
        full[rows[:, None], columns] = self.weight.detach()
        return full

    def full_bias(self) -> torch.Tensor | None:
        if self.bias is None:
            return None
        full = self.bias.new_zeros(self.out_features)
        full[self.index if self.spec.spread == "rows" else slice(self.spec.rows)] = self.bias.detach()
        return full

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rows={self.spec.rows}, "
            f"columns={self.spec.columns}, spread={self.spec.spread}, bias={self.bias is not None}"
        )


class LowRankBridge(nn.Module):
    """What stands for a run of removed layers: ``h + u (v rmsnorm(h)) + bias``.

    Parameters `v` [rank, hidden], `u` [hidden, rank], `bias` [hidden] or None. The norm has no weight (it is folded
    into `v`). Starts as the identity, that is as bare removal.
    """

    def __init__(
        self,
        hidden: int,
        rank: int,
        bias: bool,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden, self.rank, self.eps = hidden, rank, eps
        self.v = nn.Parameter(torch.empty(rank, hidden, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(hidden, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype)) if bias else None
        if self.v.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.v, std=1 / math.sqrt(self.hidden))
        nn.init.zeros_(self.u)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return taco_kernels.low_rank_bridge(hidden_states, self.v, self.u, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, rank={self.rank}, bias={self.bias is not None}, eps={self.eps}"


class _BridgedMixin:
    """A decoder layer that passes its output through `self.bridge`.

    The bridge belongs to the layer before it, so that the model's own loop over layers, its cache numbering and
    its `num_hidden_layers` stay as they are.
    """

    bridge: LowRankBridge
    taco_base_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple):  # older transformers return (hidden_states, ...)
            return (self.bridge(output[0]), *output[1:])
        return self.bridge(output)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made on demand, so a pickle names the layer class that it is made from
        return _new_bridged, (type(self).__bases__[1],), self.__dict__


def _new_bridged(layer_class: type[nn.Module]) -> nn.Module:
    """An empty bridged layer, for pickle and copy to fill."""
    made = bridged_class(layer_class)
    return made.__new__(made)


_bridged_classes: dict[type[nn.Module], type[nn.Module]] = {}


def bridged_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a decoder layer class whose layers carry a bridge (made once per class)."""
    if layer_class not in _bridged_classes:
        name = f"Bridged{layer_class.__name__}"
        _bridged_classes[layer_class] = type(
            name,
            (_BridgedMixin, layer_class),
            {"__module__": __name__, "__qualname__": name, "taco_base_name": layer_class.__name__},
        )
    return _bridged_classes[layer_class]


def attach_bridge(layer: nn.Module, bridge: LowRankBridge) -> None:
    """Makes a decoder layer pass its output through `bridge`, in place; a bridge that it has is replaced."""
    if not isinstance(layer, _BridgedMixin):
        layer.__class__ = bridged_class(type(layer))
    layer.bridge = bridge


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


def drop_layers(architecture: Architecture, keep: tuple[int, ...] | list[int]) -> None:
    """Takes out all layers but `keep` (ascending) from the module list and renumbers the attention blocks.

    The caller replaces the config (`architectures.slice_config`); without that the key/value cache breaks.
    """
    stack = architecture.layers
    architecture.put_layers([stack[index] for index in keep])


def install(model: PreTrainedModel, structure: Structure) -> None:
    """Puts empty replacement modules into a model that already has only the kept layers.

    Raises:
        TacoError: when the structure names a module that the model does not have, or more layers than it has.
    """
    # a quantiser replaces the dense maps after this, and leaves the modules that are put in here alone
    if names_experts(structure):
        open_experts(model)
    architecture = Architecture(model, quantised=True)
    if len(architecture.layers) != len(structure.kept):
        raise TacoError(
            f"The checkpoint's structure keeps {len(structure.kept)} layers, its config describes "
            f"{len(architecture.layers)}."
        )
    # before 8-bit factors take the first parameter's place
    references = [next(layer.parameters()) for layer in architecture.layers]
    for source_layer, ranks in structure.low_rank.items():
        for path, rank in ranks.items():
            site, (out_features, in_features), setting = _place(architecture, structure, source_layer, path)
            if rank > min(out_features, in_features):
                raise TacoError(f"layer {source_layer}, {path}: rank {rank} of a {out_features} x {in_features} map.")
            pivoted = structure.is_pivoted(source_layer, path)
            kind = Int8LowRankLinear if structure.is_int8(source_layer, path) else LowRankLinear
            architecture.replace(site, kind(in_features, out_features, rank, pivoted=pivoted, **setting))
    for source_layer, specs in structure.narrow.items():
        for path, spec in specs.items():
            site, (out_features, in_features), setting = _place(architecture, structure, source_layer, path)
            if spec.rows > out_features or spec.columns > in_features:
                raise TacoError(f"layer {source_layer}, {path}: {spec} of a {out_features} x {in_features} map.")
            architecture.replace(site, NarrowLinear(in_features, out_features, spec, **setting))
    hidden = model.config.hidden_size
    for bridge in structure.bridges:
        if bridge.rank > hidden:
            raise TacoError(f"bridge after layer {bridge.after}: rank {bridge.rank} of a {hidden} x {hidden} map.")
        position = structure.position(bridge.after)
        reference = references[position]
        attach_bridge(
            architecture.layers[position],
            LowRankBridge(hidden, bridge.rank, bridge.bias, bridge.eps, device=reference.device, dtype=reference.dtype),
        )


def _place(
    architecture: Architecture, structure: Structure, source_layer: int, path: str
) -> tuple[LinearSite, tuple[int, int], dict[str, Any]]:
    """Where a map of a structure is in a model of the kept layers, its (out, in) features, and what a replacement
    takes over from it.

    Raises:
        TacoError: the model has no such map.
    """
    if path not in architecture.paths:
        name = type(architecture.model).__name__
        raise TacoError(f"The checkpoint's structure names {path!r}, which {name} has not.")
    site = architecture.site(structure.position(source_layer), path)
    dense = architecture.module(site)
    reference = dense.weight
    assert isinstance(reference, torch.Tensor)
    bias = getattr(dense, "bias", None) is not None
    return site, linear_shape(dense), {"bias": bias, "device": reference.device, "dtype": reference.dtype}
