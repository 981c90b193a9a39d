"""Factorised linear layers in vLLM: a quantisation config that gives each layer its factors.

vLLM lets a quantisation config choose what a linear layer holds and computes; that is used here for factors. Layers
that hold none are passed on to the quantisation that vLLM was started with, or stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

import taco_kernels
from taco_kernels.low_rank_linear_concat import separately

from ..errors import TacoError
from ..structure import Structure
from .shards import Member, is_permutation, locate, members_of, right_factor, shard_span

logger = init_logger("vllm.taco_svd")  # below vLLM's own, so that it is shown as vLLM's messages are

PER_RANK_FORMATS = ("sharded_state", "runai_streamer_sharded")


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


class Pieces:
    """Matrices and vectors of given shapes that lie one after the other in one flat tensor."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = list(shapes)
        self.sizes = [math.prod(shape) for shape in shapes]

    def of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of `flat`, one per shape."""
        return [piece.view(shape) for piece, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]


class FactorsMethod(LinearMethodBase):
    """What a linear layer of vLLM holds and computes when some or all of its maps are factorised.

    The layer has parameters with the checkpoint's names: `v`, `u`, `pivot` hold the factors of all its maps one after
    the other, `weight` the dense maps' rows. They stay its parameters after loading, and `apply` reads views of them.
    vLLM counts on that: it copies weights that come later (sleep mode, reinforcement learning) to where captured graphs
    read the first ones, and points parameters elsewhere to offload them.

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
        # as they are computed with
        self.held_v = Pieces([(m.rank or 0, self._held_columns(m)) for m in self.factorised])
        # As they are loaded: the columns of a pivoted v are split only once the pivot has come as well. Files that vLLM
        # has written for each rank (--load-format sharded_state) hold them as they are computed with.
        per_rank = get_current_vllm_config().load_config.load_format in PER_RANK_FORMATS
        columns = self._held_columns if per_rank else self._stored_columns
        self.stored_v = Pieces([(m.rank or 0, columns(m)) for m in self.factorised])
        self.u = Pieces([(m.rows(self.partitions), m.rank or 0) for m in self.factorised])
        self.pivot = Pieces([(input_size,) if m.pivoted else (0,) for m in self.factorised])
        self.gathers = any(self.pivot.sizes) and not self.split_inputs
        self._warn_of_size()
        v = self._register(layer, "v", torch.empty(sum(self.stored_v.sizes), dtype=params_dtype), loader)
        self._register(layer, "u", torch.empty(sum(self.u.sizes), dtype=params_dtype), loader)
        set_weight_attrs(v, {"written_out": per_rank and self.split_inputs and any(self.pivot.sizes)})
        # LoRA asks where a layer's weight lies, by the names of vLLM's own methods. No second name of a parameter.
        layer.__dict__["weight_packed"] = layer.u
        if any(self.pivot.sizes):  # an index that nothing fills (--load-format dummy) must still be one
            data = torch.cat([torch.arange(size, dtype=torch.int32) for size in self.pivot.sizes])
            self._register(layer, "pivot", data, loader)
        if self.dense:
            rows = sum(member.rows(self.partitions) for member in self.dense)
            self._register(layer, "weight", torch.empty(rows, input_size_per_partition, dtype=params_dtype), loader)

    def _warn_of_size(self) -> None:
        """Tensor parallelism splits one factor of two: from some number of ranks on, a dense shard would be smaller."""
        dense = sum(member.rows(self.partitions) for member in self.factorised) * self.local_inputs
        if sum(self.held_v.sizes) + sum(self.u.sizes) >= dense:
            logger.warning_once(
                "Tensor parallelism: some factorised layers hold no fewer weights on each rank than the dense model's "
                "would. Serve the dense model, or one with layers removed or bridged (docs/vllm.md of taco-kernels)."
            )

    def _stored_columns(self, member: Member) -> int:
        return self.inputs - (member.rank or 0) if member.pivoted else self.local_inputs

    def _held_columns(self, member: Member) -> int:
        return self.local_inputs if self.split_inputs else self._stored_columns(member)

    def _register(self, layer: nn.Module, kind: str, data: torch.Tensor, loader: Any) -> nn.Parameter:
        """Makes `data` the layer's parameter `kind`, to be loaded by `_load`."""
        name = loader.__name__

        # A method of the layer, as vLLM's own loaders are: what vLLM remembers of it does not keep the layer alive.
        def load(layer: nn.Module, param: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            self._load(kind, getattr(layer, name), param, loaded, shard)

        # vLLM finishes a layer that is loaded a second time once as many elements have been copied as are expected.
        # What goes through the layer's own loader is copied twice: there, and to its place.
        twice = kind in ("u", "weight") or (kind == "v" and self.split_inputs and not self.factorised[0].pivoted)
        param = nn.Parameter(data, requires_grad=False)
        layer.register_parameter(kind, param)
        attributes = {
            "weight_loader": MethodType(load, layer),
            "weight_loader_numel": data.numel() * (2 if twice else 1),
        }
        if kind in ("u", "weight"):
            # What comes in has rows of outputs. vLLM's Falcon asks for that before it sorts the rows of its fused map,
            # which a checkpoint stores by group of heads, into queries, keys and values.
            attributes["output_dim"] = 0
        set_weight_attrs(param, attributes)
        return param

    def _load(
        self, kind: str, loader: Callable[..., None], param: nn.Parameter, loaded: torch.Tensor, shard: Any
    ) -> None:
        """Copies a tensor of the checkpoint, or this rank's part of it, to its place in a parameter of the layer."""
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

    def _load_factor(
        self, kind: str, index: int, loader: Callable[..., None], param: nn.Parameter, loaded: torch.Tensor, shard: Any
    ) -> None:
        member = self.factorised[index]
        if kind == "u":
            self._local_rows(loader, loaded, shard, member, self.u.of(param.data)[index])
            return
        if kind == "v" and getattr(param, "written_out", False):
            raise TacoError(
                f"{self.name}: this rank holds its part of the pivoted map, written out; weights that come later must "
                "come through vLLM's reload_weights or update_weights, not load_weights."
            )
        target = (self.stored_v if kind == "v" else self.pivot).of(param.data)[index]
        if kind == "v" and self.split_inputs and not member.pivoted:
            # never fused: such a layer has one output
            # what is there already: a sparse update (vLLM's sparse_nccl) writes some of its elements only
            taken = nn.Parameter(target.clone(), requires_grad=False)
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
        start = member.offset(self.partitions)
        own = room.data[start : start + member.rows(self.partitions)]
        if own.shape == target.shape and not target.is_meta:  # while all weights are loaded again, nothing is there
            own.copy_(target)  # see `_load_factor`
        if shard is None:
            loader(room, loaded)
        else:
            loader(room, loaded, shard)
        target.copy_(own)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turns the loaded parameters into what `apply` reads.

        Raises:
            TacoError: a pivot is no permutation: it was left out where weights were loaded a second time.
        """
        for member, pivot in self._pivots(layer):
            if not is_permutation(pivot):
                raise TacoError(f"{self.name}: weights were loaded without the pivot of {member.path}.")
            if self.split_inputs and not getattr(layer.v, "written_out", False):
                start = layer.tp_rank * self.local_inputs
                (stored,) = self.stored_v.of(layer.v.data)  # never fused: such a layer has one output
                # the same parameter, of another size: offloading remembers which ones it has moved
                layer.v.data = right_factor(stored, pivot, start, start + self.local_inputs).flatten()
                # what vLLM had moved to the host is not what is here now: so marked, it would not be moved again
                layer.v.__dict__.pop("_vllm_is_uva_offloaded", None)
                layer.v.written_out = True
        if self.dense_method is not None:
            # Without the bias, which vLLM's method may convert in place: the factorised maps take their part of it.
            bias, layer.bias = layer.bias, None
            self.dense_method.process_weights_after_loading(layer)
            layer.bias = bias

    def _pivots(self, layer: Any) -> list[tuple[Member, torch.Tensor]]:
        if not any(self.pivot.sizes):
            return []
        pieces = zip(self.factorised, self.pivot.of(layer.pivot.data), strict=True)
        return [(member, pivot) for member, pivot in pieces if member.pivoted]

    # -- computing -------------------------------------------------------------------------------------------

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., in on this rank] through all maps of the layer: [..., sum of its partitions on this rank]."""
        vs, us, pivots = map(list, zip(*self._factors(layer), strict=True))
        maps = vs, us, [self._bias(bias, member) for member in self.factorised], pivots
        if self.dense_method is None:
            return taco_kernels.low_rank_linear_concat(x, *maps)
        outputs = {member.first: y for member, y in zip(self.factorised, separately(x, *maps), strict=True)}
        together = self.dense_method.apply(layer, x, None)
        parts = together.split([member.rows(self.partitions) for member in self.dense], dim=-1)
        for member, output in zip(self.dense, parts, strict=True):
            share = self._bias(bias, member)
            outputs[member.first] = output if share is None else output + share
        return torch.cat([outputs[first] for first in sorted(outputs)], dim=-1)

    def _factors(self, layer: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(v, u, pivot where inputs are gathered) of each factorised map: views of the layer's parameters."""
        flat = [layer.v, layer.u, layer.pivot] if self.gathers else [layer.v, layer.u]
        # Cutting takes as long as a small map does. It is done once where kernels are called one by one, and again when
        # the parameters have moved. Copies that stand in for offloaded parameters are not held on to.
        once = not torch.compiler.is_compiling() and all(isinstance(tensor, nn.Parameter) for tensor in flat)
        if once:
            places = [tensor.data_ptr() for tensor in flat]
            before, factors = layer.__dict__.get("_taco_factors", (None, []))
            if before == places:
                return factors
        pivots = [p if p.numel() else None for p in self.pivot.of(layer.pivot)] if self.gathers else []
        cut = zip(self.held_v.of(layer.v), self.u.of(layer.u), pivots or [None] * len(self.factorised), strict=True)
        factors = list(cut)
        if once:
            layer.__dict__["_taco_factors"] = (places, factors)
        return factors

    def _bias(self, bias: torch.Tensor | None, member: Member) -> torch.Tensor | None:
        if bias is None or len(self.members) == 1:
            return bias
        start = member.offset(self.partitions)
        return bias[start : start + member.rows(self.partitions)]


__all__ = ["FactorsConfig", "FactorsMethod"]
