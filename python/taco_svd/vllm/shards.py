"""Which maps of a checkpoint make up a linear layer of vLLM, and which part of their factors a rank holds.

vLLM computes q, k and v (gate and up) in one layer, and splits layers over ranks. A compressed checkpoint has one pair
of factors per map. This file is the arithmetic between the two, without vLLM, so that it can be tested anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """

    path: str
    first: int
    last: int
    rank: int | None
    pivoted: bool = False

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
        Member(part, first, last, ranks.get(part), structure.is_pivoted(source, part))
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
