"""Which maps of a checkpoint make up a linear layer of vLLM, and which part of their factors a rank holds.

vLLM computes q, k and v (gate and up) in one layer, and splits layers over ranks. A compressed checkpoint has one pair
of factors per map. This file is the arithmetic between the two, without vLLM, so that it can be tested anywhere.

vLLM splits a layer by its outputs or by its inputs, and so only one factor of two: u by outputs, v by inputs. The other
one is as large on every rank as on one. It can be split as well, by the *singular directions*: a rank then holds some
of v's rows or of u's columns, at the cost of one collective over a vector between the two products (`Layout`).
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TacoError
from ..structure import Structure


@dataclass(frozen=True)
class Member:
    """One map of the checkpoint inside a linear layer of vLLM.

    Attributes:
        path: the map's path inside its decoder layer, as in the checkpoint (``self_attn.q_proj``).
        first, last: the layer's outputs that it computes, as indices into vLLM's `output_partition_sizes` (q, k, v are
            0, 1, 2), `last` excluded. A map that the checkpoint has fused itself computes several.
        rank: its rank; None for a dense map.
        pivoted: whether its right factor is the identity on `rank` of the inputs.
        int8: whether its factors are 8-bit integers.
    """

    path: str
    first: int
    last: int
    rank: int | None
    pivoted: bool = False
    int8: bool = False

    def offset(self, partitions: Sequence[int]) -> int:
        """Where its outputs start among the layer's, given the sizes of the layer's partitions on this rank."""
        return sum(partitions[: self.first])

    def rows(self, partitions: Sequence[int]) -> int:
        """How many outputs it has on this rank."""
        return sum(partitions[self.first : self.last])


# What fused names stand for in models of vLLM that do not say so (GPT-J).
USUALLY_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_IN_A_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


def locate(name: str) -> tuple[int, str] | None:
    """(decoder layer, path inside it) of a module's full name; None for modules outside the decoder layers.

    >>> locate("model.layers.3.self_attn.qkv_proj")
    (3, 'self_attn.qkv_proj')
    """
    found = _IN_A_LAYER.search(name)
    return (int(found.group(1)), found.group(2)) if found else None


def members_of(
    structure: Structure, position: int, path: str, packed: Mapping[str, Sequence[str]], partitions: int
) -> list[Member]:
    """The maps of the checkpoint that one linear layer of vLLM computes, in the order of its outputs.

    Args:
        position: the decoder layer, counted in the compressed model.
        path: the linear layer's path inside it, with vLLM's names (``self_attn.qkv_proj``).
        packed: vLLM's `packed_modules_mapping`: what its fused names stand for (``qkv_proj``: q_proj, k_proj, v_proj).
        partitions: number of the layer's output partitions.

    Raises:
        TacoError: the layer fuses factorised maps in a way that is not understood.
    """
    if position >= len(structure.kept):
        return []
    source = structure.kept[position]
    ranks = structure.low_rank.get(source, {})
    parent, _, name = path.rpartition(".")
    # a map that the checkpoint has fused itself is one, whatever vLLM takes its name to stand for
    names = [name] if path in ranks else list(packed.get(name) or USUALLY_PACKED.get(name) or [name])
    paths = [f"{parent}.{part}" if parent else part for part in names]
    if len(paths) == 1:
        spans = [(0, partitions)]
    elif len(paths) == partitions:
        spans = [(index, index + 1) for index in range(partitions)]
    elif any(part in ranks for part in paths):
        raise TacoError(f"layer {source}, {path}: vLLM fuses {len(paths)} maps into {partitions} outputs.")
    else:
        return []
    return [
        Member(part, first, last, ranks.get(part), structure.is_pivoted(source, part), structure.is_int8(source, part))
        for part, (first, last) in zip(paths, spans, strict=True)
    ]


def shard_span(shard: str | int | Sequence[int] | None, partitions: int) -> tuple[int, int]:
    """(first, last) of the output partitions that a shard id of vLLM's weight loaders names, `last` excluded.

    Shard ids are ``"q"``, ``"k"``, ``"v"``, an index, a tuple of consecutive indices, or None for the whole layer.

    Raises:
        TacoError: it is none of these, or outside the layer.
    """
    if shard is None:
        return 0, partitions
    if isinstance(shard, str):
        first = {"q": 0, "k": 1, "v": 2}.get(shard, partitions)
        last = first + 1
    elif isinstance(shard, int):
        first, last = shard, shard + 1
    else:
        first, last = min(shard), max(shard) + 1
    if not 0 <= first < last <= partitions:
        raise TacoError(f"vLLM's shard id {shard!r} is not one of this layer's {partitions} outputs.")
    return first, last


class Layout(enum.Enum):
    """What the ranks hold of a layer's factors, and what they tell each other between the two products."""

    REPLICATED = "replicated"
    """One factor is split as vLLM splits the layer, the other one is on every rank (all of both, where there is one)"""
    OUTPUTS = "outputs"
    """Column-parallel: directions of v, outputs of u. The ranks' parts of ``v x`` are gathered."""
    INPUTS = "inputs"
    """Row-parallel: inputs of v, directions of u. The ranks' parts of ``v x`` are summed."""
    GATHERED = "gathered"
    """Row-parallel with a pivoted v: directions of v and of u. The inputs are gathered. To split v by its inputs would
    write out its identity, whose columns lie anywhere, or give each rank another number of columns for each pivot."""


OPTION = "taco_tensor_parallel"
CHOICES = ("auto", "split", "replicate")
# A collective is worth the bytes from which share of the layer's dense shard on?
WORTH = 0.05
# Widths of slices are multiples of this: 16 bytes of 16-bit weights, below which products on a GPU are slow and vLLM's
# fast collectives are not used.
ALIGNED = 8


def chosen_layout(additional_config: Any) -> str:
    """What the user wants of layouts: one of `CHOICES`, from vLLM's ``--additional-config``.

    Not from an environment variable: the config reaches every process of vLLM's, also on other machines, and is part of
    the key of its compiled graphs, which must not be shared by two layouts.

    Raises:
        TacoError: it is something else.
    """
    choice = additional_config.get(OPTION, CHOICES[0]) if isinstance(additional_config, Mapping) else CHOICES[0]
    if choice not in CHOICES:
        raise TacoError(f"--additional-config: {OPTION} is {choice!r}, and must be one of {', '.join(CHOICES)}.")
    return str(choice)


@dataclass(frozen=True)
class Share:
    """Which of a map's singular directions one rank holds. All ranks' shares are equally wide: the last are padded.

    Attributes:
        rank: of the map.
        ranks: of tensor parallelism, how many there are.
        index: of this one among them.
    """

    rank: int
    ranks: int
    index: int

    @property
    def width(self) -> int:
        """Directions of a share, padding included."""
        return math.ceil(math.ceil(self.rank / self.ranks) / ALIGNED) * ALIGNED

    @property
    def start(self) -> int:
        return min(self.index * self.width, self.rank)

    @property
    def stop(self) -> int:
        return min((self.index + 1) * self.width, self.rank)

    @property
    def count(self) -> int:
        """Directions of this share, without padding; none on the last of many ranks."""
        return self.stop - self.start

    def inputs(self, pivot: torch.Tensor) -> torch.Tensor:
        """What this rank gathers of a pivoted map's inputs: its own of the identity's, padding, all of v's."""
        padding = pivot.new_zeros(self.width - self.count)
        return torch.cat([pivot[self.start : self.stop], padding, pivot[self.rank :]])


@dataclass(frozen=True)
class Held:
    """Shapes of what one rank holds of a factorised map: `v`, `u`, and the length of `pivot` (0 without one)."""

    v: tuple[int, int]
    u: tuple[int, int]
    pivot: int

    @property
    def weights(self) -> int:
        return math.prod(self.v) + math.prod(self.u)


def held(layout: Layout, rank: int, pivoted: bool, rows: int, inputs: int, local_inputs: int, ranks: int) -> Held:
    """What each rank holds of one factorised map.

    Args:
        rank: of the map.
        pivoted: whether its right factor is the identity on `rank` of the inputs.
        rows: its outputs on this rank.
        inputs, local_inputs: its inputs, and those that this rank sees.
        ranks: of tensor parallelism.
    """
    width, stored = Share(rank, ranks, 0).width, inputs - rank if pivoted else inputs
    pivot = width + inputs - rank if pivoted else 0
    if layout is Layout.OUTPUTS:
        return Held((width, stored), (rows, rank), pivot)
    if layout is Layout.INPUTS:
        return Held((width * ranks, local_inputs), (rows, width), 0)
    if layout is Layout.GATHERED:
        return Held((width, stored), (rows, width), pivot)
    # a rank that sees some of the inputs only cannot leave the identity out
    columns = stored if local_inputs == inputs else local_inputs
    return Held((rank, columns), (rows, rank), inputs if pivoted else 0)


def layout_of(
    choice: str, maps: Sequence[tuple[int, bool, int]], inputs: int, local_inputs: int, ranks: int, dense: int
) -> Layout:
    """How a layer's factors are laid out: one answer for all of its maps, which share a collective.

    Args:
        choice: one of `CHOICES`. "auto" splits both factors where that saves each rank more than `WORTH` of `dense`.
        maps: (rank, pivoted, outputs on this rank) of each factorised map.
        inputs, local_inputs, ranks: as in `held`.
        dense: how many weights a rank would hold if the whole layer were dense.
    """
    if ranks == 1 or choice == "replicate":
        return Layout.REPLICATED
    split = Layout.OUTPUTS
    if local_inputs != inputs:
        split = Layout.GATHERED if any(pivoted for _, pivoted, _ in maps) else Layout.INPUTS

    def weights(layout: Layout) -> int:
        return sum(held(layout, *one, inputs, local_inputs, ranks).weights for one in maps)

    saved = weights(Layout.REPLICATED) - weights(split)
    return split if choice == "split" or saved > WORTH * dense else Layout.REPLICATED


def joined(gathered: torch.Tensor, at: int, width: int, rank: int) -> torch.Tensor:
    """``v x`` of one map, of what all ranks have computed of it.

    Args:
        gathered: [ranks, rows, all maps' widths].
        at: where the map's directions begin among the last dimension.
        width, rank: of a rank's share of them, and of the map.

    Returns:
        [rows, rank].
    """
    return gathered[:, :, at : at + width].transpose(0, 1).flatten(1)[:, :rank]


def right_factor(v: torch.Tensor, pivot: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The columns of a pivoted map's right factor for its inputs `start` to `stop`, identity written out.

    A rank of a row-parallel layer sees some of the inputs only. There the identity's columns lie anywhere, so they
    cannot be left out as in the full map.

    Args:
        v: [rank, in - rank], the stored columns.
        pivot: [in], a permutation of the inputs: `pivot[:rank]` are the identity's, `pivot[rank:]` those of `v`.

    Returns:
        [rank, stop - start], of `v`'s dtype.
    """
    rank, inputs = v.shape[0], pivot.numel()
    place = torch.empty(inputs, dtype=torch.long, device=pivot.device)
    place[pivot.long()] = torch.arange(inputs, device=pivot.device)
    place = place[start:stop]  # for each of these inputs: where it stands in the pivot
    full = v.new_zeros(rank, stop - start)
    own = (place < rank).nonzero().flatten()
    full[place[own], own] = 1
    rest = (place >= rank).nonzero().flatten()
    full[:, rest] = v[:, place[rest] - rank]
    return full


def is_permutation(pivot: torch.Tensor) -> bool:
    """Whether `pivot` names every index from 0 to its length once; anything else must never be used to read memory."""
    return torch.equal(pivot.long().sort().values.cpu(), torch.arange(pivot.numel()))


def is_selection(chosen: torch.Tensor, count: int) -> bool:
    """Whether `chosen` names indices from 0 to `count`, none of them twice: part of a permutation."""
    ordered = chosen.long().sort().values
    if not len(ordered):
        return True
    return bool((ordered[0] >= 0) & (ordered[-1] < count) & (ordered.diff() > 0).all())
