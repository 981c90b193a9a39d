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
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

import taco_kernels
from taco_kernels.low_rank_linear_concat import separately

from ..errors import TacoError
from ..structure import Structure
from .shards import (
    CHOICES,
    Layout,
    Member,
    Share,
    held,
    is_permutation,
    is_selection,
    joined,
    layout_of,
    locate,
    members_of,
    right_factor,
    shard_span,
)

logger = init_logger("vllm.taco_svd")  # below vLLM's own, so that it is shown as vLLM's messages are

PER_RANK_FORMATS = ("sharded_state", "runai_streamer_sharded")

# The scales of 8-bit factors: what our checkpoints call them, and we in vLLM. Its loaders take any name that ends in
# ".v_scale" for a scale of the key/value cache, and lose it.
SCALES = {"v_scale": "v_step", "u_scale": "u_step"}

# vLLM may compute a mixture's shared experts on a stream of their own, and has no collectives there: ours could meet
# others, which use the same memory. Their second factor stays on every rank.
BESIDE_EXPERTS = "shared_expert"


class FactorsConfig(QuantizationConfig):
    """Gives the linear layers that a structure names their factors.

    Attributes:
        structure: what the checkpoint holds.
        inner: the quantisation of the dense layers, or None.
        choice: how factors are laid out over ranks, one of `shards.CHOICES`.
        claimed: (decoder layer, path) of every factorised map that a layer of the model has taken.
    """

    def __init__(self, structure: Structure, inner: QuantizationConfig | None, choice: str = CHOICES[0]) -> None:
        super().__init__()
        self.structure, self.inner, self.choice = structure, inner, choice
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
                return FactorsMethod(members, prefix, "replicate" if BESIDE_EXPERTS in path else self.choice)
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
    the other, `weight` the dense maps' rows, `v_step` and `u_step` the scales of 8-bit factors. They stay its
    parameters after loading, and `apply` reads views of them. vLLM counts on that: it copies weights that come later
    (sleep mode, reinforcement learning) to where captured graphs read the first ones, and points parameters elsewhere
    to offload them.

    With several ranks a layer holds its part of both factors, or all of one where that is small (`shards.Layout`).
    What is split by outputs or inputs is sliced by vLLM's own weight loader of the layer, so that every kind of layer
    is split as its dense maps would be; what is split by singular directions is sliced here.
    """

    def __init__(self, members: list[Member], name: str, choice: str = CHOICES[0]) -> None:
        self.members, self.name, self.choice = members, name, choice
        self.factorised = [member for member in members if member.rank is not None]
        self.dense = [member for member in members if member.rank is None]
        self.dense_method = UnquantizedLinearMethod() if self.dense else None
        self.int8 = self.factorised[0].int8
        if any(member.int8 != self.int8 for member in self.factorised):
            raise TacoError(
                f"{name}: vLLM computes maps with 8-bit factors and with others in this layer, which is not supported; "
                "quantise all of a checkpoint's factors (taco-svd quantize)."
            )

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
            TacoError: a rank that is larger than its map; 8-bit factors and several ranks.
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
        ranks = self._ranks(layer)
        if self.int8 and ranks > 1:
            raise TacoError(
                f"{self.name}: 8-bit factors (taco-svd quantize) are not supported with tensor parallelism; serve with "
                "one rank, or the checkpoint that this one was made from."
            )
        dense = sum(self.partitions) * self.local_inputs
        shapes = [(m.rank or 0, m.pivoted, m.rows(self.partitions)) for m in self.factorised]
        self.layout = layout_of(self.choice, shapes, input_size, self.local_inputs, ranks, dense)
        index: Any = layer.tp_rank if ranks > 1 else 0
        self.shares = [Share(m.rank or 0, ranks, index) for m in self.factorised]
        own = [held(self.layout, *shape, input_size, self.local_inputs, ranks) for shape in shapes]
        self.held_v, self.u = Pieces([one.v for one in own]), Pieces([one.u for one in own])
        self.pivot = Pieces([(one.pivot,) for one in own])
        # As they are loaded: the columns of a pivoted v are split only once the pivot has come as well. Files that vLLM
        # has written for each rank (--load-format sharded_state) hold them as they are computed with.
        per_rank = get_current_vllm_config().load_config.load_format in PER_RANK_FORMATS
        self.writes_out = self.layout is Layout.REPLICATED and self.split_inputs and any(self.pivot.sizes)
        self.stored_v = self.held_v
        if self.writes_out and not per_rank:
            self.stored_v = Pieces([(m.rank or 0, self._stored_columns(m)) for m in self.factorised])
        self.gathers = any(self.pivot.sizes) and self.layout is Layout.REPLICATED and not self.split_inputs
        self._warn_of_size(ranks)
        dtype = torch.int8 if self.int8 else params_dtype
        v = self._register(layer, "v", torch.empty(sum(self.stored_v.sizes), dtype=dtype), loader)
        self._register(layer, "u", torch.empty(sum(self.u.sizes), dtype=dtype), loader)
        self.steps = Pieces([(m.rank or 0,) for m in self.factorised])
        for kind in SCALES.values() if self.int8 else ():
            self._register(layer, kind, torch.empty(sum(self.steps.sizes), dtype=torch.float32), loader)
        set_weight_attrs(v, {"written_out": per_rank and self.writes_out})
        self.marked = per_rank and not self.int8
        if self.marked:
            # What a smaller tensor is loaded to, vLLM leaves as it was: see `_check_filled`.
            for kind in ("v", "u"):
                getattr(layer, kind).data.fill_(math.nan)
        # LoRA asks where a layer's weight lies, by the names of vLLM's own methods. No second name of a parameter.
        layer.__dict__["weight_packed"] = layer.u
        if any(self.pivot.sizes):  # an index that nothing fills (--load-format dummy) must still be one
            identity = torch.arange(input_size, dtype=torch.int32)
            data = torch.cat(
                [
                    (identity if self.layout is Layout.REPLICATED else share.inputs(identity))[:size]
                    for share, size in zip(self.shares, self.pivot.sizes, strict=True)
                ]
            )
            self._register(layer, "pivot", data, loader)
        if self.dense:
            rows = sum(member.rows(self.partitions) for member in self.dense)
            self._register(layer, "weight", torch.empty(rows, input_size_per_partition, dtype=params_dtype), loader)

    def _ranks(self, layer: Any) -> int:
        """How many ranks share the layer; 1 where they are not all those that collectives are among."""
        if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            return 1
        ranks: int = layer.tp_size
        return ranks if ranks == get_tensor_model_parallel_world_size() else 1

    def _warn_of_size(self, ranks: int) -> None:
        """Where one factor of two is on every rank: with enough of them, a dense shard would be smaller."""
        dense = sum(member.rows(self.partitions) for member in self.factorised) * self.local_inputs
        if ranks > 1 and sum(self.held_v.sizes) + sum(self.u.sizes) >= dense:
            logger.warning_once(
                "Tensor parallelism: some factorised layers hold no fewer weights on each rank than the dense model's "
                "would. Leave out taco_tensor_parallel, or serve with fewer ranks (docs/vllm.md of taco-kernels)."
            )

    def _stored_columns(self, member: Member) -> int:
        """Columns of the right factor in the checkpoint."""
        return self.inputs - (member.rank or 0) if member.pivoted else self.inputs

    def _loaded_numel(self, kind: str, data: torch.Tensor) -> int:
        """How many elements are copied until a parameter is complete; vLLM counts them when a layer is loaded again.

        What goes through the layer's own loader is copied twice: there, and to its place. Padding is not copied.
        """
        if kind == "weight" or (kind == "u" and not self._splits_columns()):
            return data.numel() * 2
        if kind == "v" and self.split_inputs and not self.factorised[0].pivoted:
            return sum((member.rank or 0) * self.local_inputs for member in self.factorised) * 2
        if self.layout is Layout.REPLICATED:
            return data.numel()
        total = 0
        for share, member, (rows, _) in zip(self.shares, self.factorised, self.u.shapes, strict=True):
            if kind == "pivot":
                total += share.count + self.inputs - share.rank if member.pivoted else 0
            else:
                total += share.count * (rows if kind == "u" else self._stored_columns(member))
        return total

    def _splits_columns(self) -> bool:
        """Whether this rank holds some of u's columns, not of its rows."""
        return self.layout in (Layout.INPUTS, Layout.GATHERED)

    def _register(self, layer: nn.Module, kind: str, data: torch.Tensor, loader: Any) -> nn.Parameter:
        """Makes `data` the layer's parameter `kind`, to be loaded by `_load`."""
        name = loader.__name__

        # A method of the layer, as vLLM's own loaders are: what vLLM remembers of it does not keep the layer alive.
        def load(layer: nn.Module, param: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            self._load(kind, getattr(layer, name), param, loaded, shard)

        param = nn.Parameter(data, requires_grad=False)
        layer.register_parameter(kind, param)
        attributes = {
            "weight_loader": MethodType(load, layer),
            "weight_loader_numel": self._loaded_numel(kind, data),
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
        if loaded.is_floating_point() != param.is_floating_point():
            raise TacoError(
                f"{self.name}: {kind} of {self.factorised[index].path} has {loaded.dtype} numbers, {param.dtype} is "
                "needed; the checkpoint is damaged."
            )
        member, share = self.factorised[index], self.shares[index]
        if kind == "u" and not self._splits_columns():
            self._local_rows(loader, loaded, shard, member, self.u.of(param.data)[index])
            return
        if kind == "v" and getattr(param, "written_out", False):
            raise TacoError(
                f"{self.name}: this rank holds its part of the pivoted map, written out; weights that come later must "
                "come through vLLM's reload_weights or update_weights, not load_weights."
            )
        pieces = {"v": self.stored_v, "u": self.u, "pivot": self.pivot}.get(kind, self.steps)
        target = pieces.of(param.data)[index]
        expected: tuple[int, ...] = {
            "v": (share.rank, self._stored_columns(member)),
            "u": (sum(self.partitions), share.rank),
            "pivot": (self.inputs,),
        }.get(kind, (share.rank,))
        if tuple(loaded.shape) != expected:
            raise TacoError(
                f"{self.name}: {kind} of {member.path} is {tuple(loaded.shape)}, {expected} is needed; "
                "the checkpoint is damaged."
            )
        if kind == "pivot" and not is_permutation(loaded):
            raise TacoError(f"{self.name}: the pivot of {member.path} is no permutation; the checkpoint is damaged.")
        if kind == "v" and self.split_inputs and not member.pivoted:
            # never fused: such a layer has one output
            target = target[: share.rank]
            # what is there already: a sparse update (vLLM's sparse_nccl) writes some of its elements only
            taken = nn.Parameter(target.clone(), requires_grad=False)
            set_weight_attrs(taken, {"input_dim": 1})
            loader(taken, loaded)
            target.copy_(taken.data)
        elif self.layout is Layout.REPLICATED:
            target.copy_(loaded)
        elif kind == "v":
            target[: share.count].copy_(loaded[share.start : share.stop])
        elif kind == "u":
            target[:, : share.count].copy_(loaded[:, share.start : share.stop])
        else:  # as `Share.inputs`, but not the padding
            target[: share.count].copy_(loaded[share.start : share.stop])
            target[share.width :].copy_(loaded[share.rank :])

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
            TacoError: a pivot is no permutation: it was left out where weights were loaded a second time. Files of each
                rank were written with another layout.
        """
        self._check_filled(layer)
        if self.layout is not Layout.REPLICATED:
            self._clear_padding(layer)
        for share, member, pivot in self._pivots(layer):
            chosen = pivot
            if self.layout is not Layout.REPLICATED:
                chosen = torch.cat([pivot[: share.count], pivot[share.width :]])
            if not is_selection(chosen, self.inputs):
                raise TacoError(f"{self.name}: weights were loaded without the pivot of {member.path}.")
            if self.writes_out and not getattr(layer.v, "written_out", False):
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

    def _pivots(self, layer: Any) -> list[tuple[Share, Member, torch.Tensor]]:
        if not any(self.pivot.sizes):
            return []
        pieces = zip(self.shares, self.factorised, self.pivot.of(layer.pivot.data), strict=True)
        return [piece for piece in pieces if piece[1].pivoted]

    def _check_filled(self, layer: Any) -> None:
        """Refuses ranks' files (--load-format sharded_state) of another layout: vLLM loads them with a mere warning."""
        if self.marked and any(bool(tensor.data[-1:].isnan().any()) for tensor in (layer.v, layer.u)):
            raise TacoError(
                f"{self.name}: the files of this rank hold fewer numbers than it needs; they were written with another "
                "layout of factors. Serve with the taco_tensor_parallel that they were written with, or write them "
                "again."
            )

    def _clear_padding(self, layer: Any) -> None:
        """Makes padding count for nothing: no checkpoint holds it, so that it is whatever was in memory."""
        for share, v, u in zip(self.shares, self.held_v.of(layer.v.data), self.u.of(layer.u.data), strict=True):
            v[share.rank if self.layout is Layout.INPUTS else share.count :].zero_()
            if self._splits_columns():
                u[:, share.count :].zero_()
        for share, _, pivot in self._pivots(layer):
            pivot[share.count : share.width].zero_()  # some input: its place in u is zero or left out

    # -- computing -------------------------------------------------------------------------------------------

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., in on this rank] through all maps of the layer: [..., sum of its partitions on this rank]."""
        vs, us, pivots, *steps = map(list, zip(*self._factors(layer), strict=True))
        biases = [self._bias(bias, member) for member in self.factorised]
        if self.layout is not Layout.REPLICATED:
            found = self._split(layer, x, vs, us, biases)
            if len(found) == len(self.members) == 1:
                return found[0]
        elif self.int8:
            each = zip(vs, steps[0], us, steps[1], biases, pivots, strict=True)
            found = [taco_kernels.low_rank_linear_int8(x, *one) for one in each]
            if len(found) == len(self.members) == 1:
                return found[0]
        elif self.dense_method is None:
            return taco_kernels.low_rank_linear_concat(x, vs, us, biases, pivots)
        else:
            found = separately(x, vs, us, biases, pivots)
        outputs = {member.first: y for member, y in zip(self.factorised, found, strict=True)}
        if self.dense_method is not None:
            outputs.update(self._dense(layer, x, bias))
        return torch.cat([outputs[first] for first in sorted(outputs)], dim=-1)

    def _dense(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> dict[int, torch.Tensor]:
        """The dense maps' results, by the first of their outputs."""
        assert self.dense_method is not None
        outputs = {}
        together = self.dense_method.apply(layer, x, None)
        parts = together.split([member.rows(self.partitions) for member in self.dense], dim=-1)
        for member, output in zip(self.dense, parts, strict=True):
            share = self._bias(bias, member)
            outputs[member.first] = output if share is None else output + share
        return outputs

    def _split(
        self,
        layer: Any,
        x: torch.Tensor,
        vs: list[torch.Tensor],
        us: list[torch.Tensor],
        biases: list[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """The factorised maps' results where both factors are split: one collective, whatever their number.

        By vLLM's functions for collectives: these are its registered ops where graphs are compiled.
        """
        rows = x.flatten(0, -2)
        if self.layout is Layout.GATHERED:
            rows = tensor_model_parallel_all_gather(rows.contiguous(), dim=-1)
        middle = self._middle(layer, rows, vs)
        if self.layout is Layout.OUTPUTS:
            # One below the other, since side by side would be another copy
            below = tensor_model_parallel_all_gather(middle, dim=0)
            gathered = below.view(self.shares[0].ranks, -1, middle.shape[1])
            parts, at = [], 0
            for share in self.shares:
                parts.append(joined(gathered, at, share.width, share.rank))
                at += share.width
        elif self.layout is Layout.INPUTS:
            (share,) = self.shares  # never fused: such a layer has one output
            # Every rank gets the whole sum and takes its part, since vLLM has fast kernels for small ones.
            whole = tensor_model_parallel_all_reduce(middle)
            parts = [whole[:, share.index * share.width : (share.index + 1) * share.width]]
        else:
            parts = [middle]
        return [
            F.linear(part, u, bias).view(*x.shape[:-1], u.shape[0])
            for part, u, bias in zip(parts, us, biases, strict=True)
        ]

    def _middle(self, layer: Any, rows: torch.Tensor, vs: list[torch.Tensor]) -> torch.Tensor:
        """``v x`` of all factorised maps, as far as this rank computes it: [rows, widths of their shares]."""
        if not any(self.pivot.sizes):  # they lie one below the other: one product
            return F.linear(rows, layer.v.view(-1, rows.shape[-1]))
        chosen = rows.index_select(-1, layer.pivot).split(self.pivot.sizes, dim=-1)
        found = []
        for share, member, v, own in zip(self.shares, self.factorised, vs, chosen, strict=True):
            if member.pivoted:
                first, rest = own.split([share.width, self.inputs - share.rank], dim=-1)
                found.append(torch.addmm(first, rest, v.T))
            else:
                found.append(F.linear(rows, v))
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _factors(self, layer: Any) -> list[tuple[Any, ...]]:
        """(v, u, pivot where inputs are gathered, scales of 8-bit factors) of each factorised map.

        Views of the layer's parameters.
        """
        flat = [layer.v, layer.u, layer.pivot] if self.gathers else [layer.v, layer.u]
        steps = [getattr(layer, kind) for kind in SCALES.values()] if self.int8 else []
        flat += steps
        # Cutting takes as long as a small map does. It is done once where kernels are called one by one, and again when
        # the parameters have moved. Copies that stand in for offloaded parameters are not held on to.
        once = not torch.compiler.is_compiling() and all(isinstance(tensor, nn.Parameter) for tensor in flat)
        if once:
            places = [tensor.data_ptr() for tensor in flat]
            before, known = layer.__dict__.get("_taco_factors", (None, []))
            if before == places:
                return known
        pivots = [p if p.numel() else None for p in self.pivot.of(layer.pivot)] if self.gathers else []
        scales = [self.steps.of(tensor) for tensor in steps]
        factors: list[tuple[Any, ...]] = list(
            zip(
                self.held_v.of(layer.v),
                self.u.of(layer.u),
                pivots or [None] * len(self.factorised),
                *scales,
                strict=True,
            )
        )
        if once:
            layer.__dict__["_taco_factors"] = (places, factors)
        return factors

    def _bias(self, bias: torch.Tensor | None, member: Member) -> torch.Tensor | None:
        if bias is None or len(self.members) == 1:
            return bias
        start = member.offset(self.partitions)
        return bias[start : start + member.rows(self.partitions)]


__all__ = ["FactorsConfig", "FactorsMethod"]
