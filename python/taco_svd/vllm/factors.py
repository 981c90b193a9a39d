"""Factorised linear layers in vLLM: a quantisation config that gives each layer its factors.

vLLM lets a quantisation config choose what a linear layer holds and computes; that is used here for factors. Layers
that hold none are passed on to the quantisation that vLLM was started with, or stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

import taco_kernels

from ..errors import TacoError
from ..structure import Structure
from .shards import Member, is_permutation, locate, members_of, right_factor, shard_span


class FactorsConfig(QuantizationConfig):
    """Gives the linear layers that a structure names their factors.

    Attributes:
        structure: what the checkpoint holds.
        inner: the quantisation of the dense layers, or None.
        claimed: (decoder layer, path) of every factorised map that a layer of the model has taken.
    """

    def __init__(self, structure: Structure, inner: QuantizationConfig | None) -> None:
        super().__init__()
        self.structure, self.inner = structure, inner
        self.claimed: set[tuple[int, str]] = set()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        place = locate(prefix)
        if place is not None and isinstance(layer, LinearBase):
            position, path = place
            # set by vLLM's fused layers before they come here, absent where there is one output
            sizes = getattr(layer, "output_sizes", None) or getattr(layer, "output_partition_sizes", None) or [0]
            members = members_of(self.structure, position, path, self.packed_modules_mapping, len(sizes))
            factorised = [member for member in members if member.rank is not None]
            if factorised:
                self.claimed.update((position, member.path) for member in factorised)
                return FactorsMethod(members, prefix)
        if self.inner is not None:
            self.inner.packed_modules_mapping = self.packed_modules_mapping
            return self.inner.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    @property
    def online_quantization_config(self) -> Any:
        """What vLLM was told to quantise while loading, besides what the checkpoint's own quantisation says."""
        return None if self.inner is None else self.inner.online_quantization_config

    def get_name(self) -> Any:
        return "taco_svd"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # what the CUDA kernels are built for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FactorsConfig:
        return cls(Structure.from_dict(config), None)

    # The checkpoint's names are the base model's: nothing to rename for scales or zero points, or to drop.
    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        return WeightsMapper()

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper()


class Factors(nn.Module):
    """One factorised map of a layer: parameters `v`, `u`, and `pivot` (int32) or None."""

    def __init__(self, v: torch.Tensor, u: torch.Tensor, pivot: torch.Tensor | None) -> None:
        super().__init__()
        self.v = nn.Parameter(v, requires_grad=False)
        self.u = nn.Parameter(u, requires_grad=False)
        self.pivot = None if pivot is None else nn.Parameter(pivot, requires_grad=False)


class FactorsMethod(LinearMethodBase):
    """What a linear layer of vLLM holds and computes when some or all of its maps are factorised.

    While weights are loaded the layer has parameters with the checkpoint's names: `v`, `u`, `pivot` hold the factors of
    all its maps one after the other, `weight` the dense maps' rows. Afterwards `layer.factors` has one `Factors` per
    factorised map, views of the same memory, and `layer.dense` the dense rows as vLLM's own method keeps them.

    A column-parallel layer holds its rows of u and all of v, a row-parallel one its columns of v and all of u. vLLM's
    own weight loader of the layer does the slicing, so that every kind of layer is split as its dense maps would be.
    """

    def __init__(self, members: list[Member], name: str) -> None:
        self.members, self.name = members, name
        self.factorised = [member for member in members if member.rank is not None]
        self.dense = [member for member in members if member.rank is None]
        self.dense_method = UnquantizedLinearMethod() if self.dense else None

    # -- loading ---------------------------------------------------------------------------------------------

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocates what the checkpoint will fill; see `LinearMethodBase.create_weights`.

        Raises:
            TacoError: a rank that is larger than its map.
        """
        self.partitions = list(output_partition_sizes)
        self.inputs, self.local_inputs = input_size, input_size_per_partition
        self.split_inputs = input_size_per_partition != input_size
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        for member in self.factorised:
            assert member.rank is not None
            # sizes of all ranks, where the layer tells them
            sizes = getattr(layer, "output_sizes", None) or [output_size]
            if member.rank > min(input_size, sum(sizes[member.first : member.last])):
                raise TacoError(f"{self.name}: rank {member.rank} of a {sum(sizes)} x {input_size} map.")
        columns = [self._stored_columns(member) for member in self.factorised]
        self.v_shapes = [(member.rank or 0, wide) for member, wide in zip(self.factorised, columns, strict=True)]
        self.u_shapes = [(member.rows(self.partitions), member.rank or 0) for member in self.factorised]
        self.pivot_shapes = [(input_size,) if member.pivoted else (0,) for member in self.factorised]
        shapes: dict[str, tuple[list[Any], torch.dtype]] = {
            "v": (self.v_shapes, params_dtype),
            "u": (self.u_shapes, params_dtype),
            "pivot": (self.pivot_shapes, torch.int32),
        }
        for kind, (stored, dtype) in shapes.items():
            size = sum(torch.Size(shape).numel() for shape in stored)
            if not size and kind == "pivot":
                continue
            flat = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            layer.register_parameter(kind, flat)
            set_weight_attrs(flat, {"weight_loader": self._loader_of(kind, layer, loader)})
            if kind == "pivot":  # an index that nothing fills (--load-format dummy) must still be one
                for part in self._parts(flat, stored):
                    part.copy_(torch.arange(part.numel()))
        if self.dense:
            rows = sum(member.rows(self.partitions) for member in self.dense)
            weight = nn.Parameter(torch.empty(rows, input_size_per_partition, dtype=params_dtype), requires_grad=False)
            layer.register_parameter("weight", weight)
            set_weight_attrs(weight, {"weight_loader": self._loader_of("weight", layer, loader)})

    def _stored_columns(self, member: Member) -> int:
        """Columns of `v` as it is loaded."""
        assert member.rank is not None
        if member.pivoted:  # split only once the pivot has come as well
            return self.inputs - member.rank
        return self.local_inputs

    @staticmethod
    def _parts(flat: torch.Tensor, shapes: list[Any]) -> list[torch.Tensor]:
        """Views of consecutive pieces of `flat`, of the given shapes."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]

    def _loader_of(self, kind: str, layer: nn.Module, loader: Callable[..., None]) -> Callable[..., None]:
        def load(param: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            span = shard_span(shard, len(self.partitions))
            if kind == "weight":
                at = 0
                for member in self.dense:
                    rows = member.rows(self.partitions)
                    if (member.first, member.last) == span:
                        self._local_rows(loader, loaded, shard, member, param.data[at : at + rows])
                        return
                    at += rows
            else:
                for index, member in enumerate(self.factorised):
                    if (member.first, member.last) == span:
                        self._load_factor(kind, index, loader, param, loaded, shard)
                        return
            raise TacoError(f"{self.name}: the checkpoint's {kind} for {shard!r} does not fit its structure.")

        return load

    def _load_factor(
        self, kind: str, index: int, loader: Callable[..., None], param: nn.Parameter, loaded: torch.Tensor, shard: Any
    ) -> None:
        member = self.factorised[index]
        if kind == "u":
            self._local_rows(loader, loaded, shard, member, self._parts(param.data, self.u_shapes)[index])
            return
        target = self._parts(param.data, self.v_shapes if kind == "v" else self.pivot_shapes)[index]
        if kind == "v" and self.split_inputs and not member.pivoted:
            # never fused: such a layer has one output
            taken = nn.Parameter(torch.empty_like(target), requires_grad=False)
            set_weight_attrs(taken, {"input_dim": 1})
            loader(taken, loaded)
            loaded = taken.data
        if loaded.shape != target.shape:
            raise TacoError(
                f"{self.name}: {kind} of {member.path} is {tuple(loaded.shape)}, {tuple(target.shape)} is needed; "
                "the checkpoint is damaged."
            )
        if kind == "pivot" and not is_permutation(loaded):
            raise TacoError(f"{self.name}: the pivot of {member.path} is no permutation; the checkpoint is damaged.")
        target.copy_(loaded)

    def _local_rows(
        self, loader: Callable[..., None], loaded: torch.Tensor, shard: Any, member: Member, target: torch.Tensor
    ) -> None:
        """Copies this rank's rows of `loaded` (all rows of one map) to `target`, by the layer's own loader."""
        if loaded.ndim != 2 or (loaded.shape[1] != target.shape[1] and not self.split_inputs):
            raise TacoError(
                f"{self.name}: a matrix of {member.path} is {tuple(loaded.shape)}, [.., {target.shape[1]}] is needed; "
                "the checkpoint is damaged."
            )
        columns = loaded.shape[1]
        room = nn.Parameter(loaded.new_empty(sum(self.partitions), columns), requires_grad=False)
        set_weight_attrs(room, {"output_dim": 0})
        if shard is None:
            loader(room, loaded)
        else:
            loader(room, loaded, shard)
        start = member.offset(self.partitions)
        target.copy_(room.data[start : start + member.rows(self.partitions)])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turns the loaded parameters into what `apply` reads."""
        vs = self._parts(layer.v.data, self.v_shapes)
        us = self._parts(layer.u.data, self.u_shapes)
        pivots: list[torch.Tensor | None] = [None] * len(vs)
        if any(member.pivoted for member in self.factorised):
            for index, pivot in enumerate(self._parts(layer.pivot.data, self.pivot_shapes)):
                if not self.factorised[index].pivoted:
                    continue
                if self.split_inputs:
                    start = layer.tp_rank * self.local_inputs
                    vs[index] = right_factor(vs[index], pivot, start, start + self.local_inputs)
                else:
                    pivots[index] = pivot
            del layer.pivot
        layer.factors = nn.ModuleList(Factors(*factors) for factors in zip(vs, us, pivots, strict=True))
        del layer.v, layer.u
        if self.dense_method is not None:
            # In a module of its own, without a bias: vLLM's method may pack the weight and convert the bias in place.
            layer.dense = nn.Module()
            layer.dense.weight = layer.weight
            del layer.weight
            self.dense_method.process_weights_after_loading(layer.dense)

    # -- computing -------------------------------------------------------------------------------------------

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., in on this rank] through all maps of the layer: [..., sum of its partitions on this rank]."""
        outputs: dict[int, torch.Tensor] = {}
        plain: list[tuple[Member, Any]] = []
        for member, factors in zip(self.factorised, layer.factors, strict=True):
            if factors.pivot is None:
                plain.append((member, factors))
            else:
                outputs[member.first] = taco_kernels.pivoted_low_rank_linear(
                    x, factors.v, factors.u, factors.pivot, self._bias(bias, member)
                )
        if len(plain) == 1:
            member, factors = plain[0]
            outputs[member.first] = taco_kernels.low_rank_linear(x, factors.v, factors.u, self._bias(bias, member))
        elif plain:
            group = taco_kernels.low_rank_linear_group(
                x,
                [factors.v for _, factors in plain],
                [factors.u for _, factors in plain],
                [self._bias(bias, member) for member, _ in plain],
            )
            for (member, _), output in zip(plain, group, strict=True):
                outputs[member.first] = output
        if self.dense_method is not None:
            together = self.dense_method.apply(layer.dense, x, None)
            parts = together.split([member.rows(self.partitions) for member in self.dense], dim=-1)
            for member, output in zip(self.dense, parts, strict=True):
                share = self._bias(bias, member)
                outputs[member.first] = output if share is None else output + share
        if len(outputs) == 1:
            return next(iter(outputs.values()))
        return torch.cat([outputs[first] for first in sorted(outputs)], dim=-1)

    def _bias(self, bias: torch.Tensor | None, member: Member) -> torch.Tensor | None:
        if bias is None or len(self.members) == 1:
            return bias
        start = member.offset(self.partitions)
        return bias[start : start + member.rows(self.partitions)]


__all__ = ["Factors", "FactorsConfig", "FactorsMethod"]
