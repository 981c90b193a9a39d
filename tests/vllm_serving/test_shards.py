"""Which maps a fused layer holds, and what a rank holds of them; needs no vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from taco_svd import Structure, TacoError
from taco_svd.vllm.shards import Member, is_permutation, locate, members_of, right_factor, shard_span

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STRUCTURE = Structure(
    source_layers=4,
    kept=(0, 3),
    low_rank={3: {"self_attn.q_proj": 5, "self_attn.v_proj": 7, "self_attn.o_proj": 9, "mlp.gate_up_proj": 4}},
    pivoted={3: ("self_attn.v_proj",)},
)


def test_importing_the_plugin_needs_no_vllm() -> None:
    code = "import sys; import taco_svd.vllm.shards; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.3.self_attn.qkv_proj", (3, "self_attn.qkv_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("layers.0.fc1", (0, "fc1")),
        ("0.fc1", (0, "fc1")),
        ("lm_head", None),
        ("model.embed_tokens2.weight", None),
    ],
)
def test_modules_are_found_in_their_layer(name: str, place: tuple[int, str] | None) -> None:
    assert locate(name) == place


def test_fused_layers_hold_one_member_per_map() -> None:
    # layer 1 of the compressed model is layer 3 of the dense one
    assert members_of(STRUCTURE, 1, "self_attn.qkv_proj", PACKED, 3) == [
        Member("self_attn.q_proj", 0, 1, 5),
        Member("self_attn.k_proj", 1, 2, None),
        Member("self_attn.v_proj", 2, 3, 7, pivoted=True),
    ]
    assert members_of(STRUCTURE, 1, "self_attn.o_proj", PACKED, 1) == [Member("self_attn.o_proj", 0, 1, 9)]
    # the checkpoint has fused this one itself: one pair of factors, two outputs
    packed = {"gate_up_proj": ["gate_up_proj"]}
    assert members_of(STRUCTURE, 1, "mlp.gate_up_proj", packed, 2) == [Member("mlp.gate_up_proj", 0, 2, 4)]
    assert [m.rank for m in members_of(STRUCTURE, 0, "self_attn.qkv_proj", PACKED, 3)] == [None] * 3
    assert members_of(STRUCTURE, 2, "self_attn.qkv_proj", PACKED, 3) == []  # no such layer


def test_what_a_model_of_vllm_says_of_its_fused_maps_is_not_all_there_is() -> None:
    """GLM-4 has gate and up in one map, which vLLM takes for two; GPT-J's model says nothing of q, k and v."""
    assert members_of(STRUCTURE, 1, "mlp.gate_up_proj", PACKED, 2) == [Member("mlp.gate_up_proj", 0, 2, 4)]
    assert [m.path for m in members_of(STRUCTURE, 1, "self_attn.qkv_proj", {}, 3)] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    ]


def test_a_fusion_that_is_not_understood_is_refused_where_it_matters() -> None:
    with pytest.raises(TacoError, match="3 maps into 2"):
        members_of(STRUCTURE, 1, "self_attn.qkv_proj", PACKED, 2)
    assert members_of(STRUCTURE, 0, "self_attn.qkv_proj", PACKED, 2) == []


def test_places_among_the_outputs() -> None:
    partitions = [32, 8, 8]
    assert [(m.offset(partitions), m.rows(partitions)) for m in members_of(STRUCTURE, 1, "qkv_proj", PACKED, 3)] == [
        (0, 32),
        (32, 8),
        (40, 8),
    ]
    assert Member("x", 0, 3, 4).rows(partitions) == 48


@pytest.mark.parametrize(
    "shard, partitions, span",
    [("q", 3, (0, 1)), ("k", 3, (1, 2)), ("v", 3, (2, 3)), (1, 2, (1, 2)), ((0, 1), 3, (0, 2)), (None, 3, (0, 3))],
)
def test_shard_ids(shard: object, partitions: int, span: tuple[int, int]) -> None:
    assert shard_span(shard, partitions) == span  # type: ignore[arg-type]


@pytest.mark.parametrize("shard", ["index_q", "v", 2, -1, (1, 2)])
def test_shard_ids_outside_the_layer_are_refused(shard: object) -> None:
    with pytest.raises(TacoError, match="shard id"):
        shard_span(shard, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_slices_of_a_pivoted_right_factor_add_up_to_the_map(ranks: int) -> None:
    inputs, rank = 30, 11
    v, x = torch.randn(rank, inputs - rank, dtype=torch.float64), torch.randn(inputs, dtype=torch.float64)
    pivot = torch.randperm(inputs).to(torch.int32)
    whole = x[pivot[:rank].long()] + v @ x[pivot[rank:].long()]
    width = inputs // ranks
    slices = [right_factor(v, pivot, rank_ * width, (rank_ + 1) * width) for rank_ in range(ranks)]
    assert [tuple(piece.shape) for piece in slices] == [(rank, width)] * ranks
    total = sum(piece @ x[index * width : (index + 1) * width] for index, piece in enumerate(slices))
    torch.testing.assert_close(total, whole, rtol=0, atol=inputs * torch.finfo(torch.float64).eps * 30)


def test_permutations() -> None:
    assert is_permutation(torch.tensor([2, 0, 1], dtype=torch.int32))
    for bad in ([0, 0, 1], [0, 1, 3], [-1, 0, 1]):
        assert not is_permutation(torch.tensor(bad, dtype=torch.int32))
