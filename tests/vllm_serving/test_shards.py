"""Which maps a fused layer holds, and what a rank holds of them; needs no vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from taco_svd import Structure, TacoError
from taco_svd.vllm.shards import (
    ALIGNED,
    WORTH,
    Layout,
    Member,
    Share,
    chosen_layout,
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


def test_selections() -> None:
    assert is_selection(torch.tensor([4, 0, 2], dtype=torch.int32), 5)
    assert is_selection(torch.tensor([], dtype=torch.int32), 0)
    for bad in ([0, 0, 1], [0, 1, 5], [-1, 0, 1]):
        assert not is_selection(torch.tensor(bad, dtype=torch.int32), 5)


class Factors:
    """Random factors of a map in float64, and what each rank holds of them, cut without the code under test."""

    def __init__(self, outputs: int, inputs: int, rank: int, pivoted: bool) -> None:
        self.rank, self.pivoted = rank, pivoted
        self.pivot = torch.randperm(inputs) if pivoted else None
        self.v = torch.randn(rank, inputs - rank if pivoted else inputs, dtype=torch.float64)
        self.u = torch.randn(outputs, rank, dtype=torch.float64)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.pivot is None:
            return x @ self.v.T @ self.u.T
        return (x[:, self.pivot[: self.rank]] + x[:, self.pivot[self.rank :]] @ self.v.T) @ self.u.T

    def directions(self, share: Share, x: torch.Tensor) -> torch.Tensor:
        """A rank's part of ``v x``, padded with zero rows of v."""
        padded = torch.zeros(share.width, self.v.shape[1], dtype=torch.float64)
        padded[: share.count] = self.v[share.start : share.stop]
        if self.pivot is None:
            return x @ padded.T
        selected = share.inputs(self.pivot)
        assert is_selection(torch.cat([selected[: share.count], selected[share.width :]]), len(self.pivot))
        own, rest = x[:, selected[: share.width]], x[:, selected[share.width :]]
        return own + rest @ padded.T


def near(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    torch.testing.assert_close(found, exact, rtol=0, atol=terms**1.5 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("rank", [1, 8, 23, 45])
def test_shares_are_equally_wide_and_hold_every_direction_once(rank: int, ranks: int) -> None:
    shares = [Share(rank, ranks, index) for index in range(ranks)]
    assert [one for share in shares for one in range(share.start, share.stop)] == list(range(rank))
    widths = {share.width for share in shares}
    assert len(widths) == 1 and widths.pop() % ALIGNED == 0
    assert all(share.count <= share.width < rank / ranks + 1 + ALIGNED for share in shares)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kinds", [((23, False),), ((31, True),), ((23, False), (5, True), (41, True))])
def test_column_parallel_ranks_gather_directions(kinds: tuple[tuple[int, bool], ...], ranks: int) -> None:
    """Fused maps, one collective: rows of outputs are the same as one rank's."""
    inputs, rows = 43, 5
    x = torch.randn(rows, inputs, dtype=torch.float64)
    maps = [Factors(12 * (index + 1), inputs, rank, pivoted) for index, (rank, pivoted) in enumerate(kinds)]
    parts = []
    for index in range(ranks):
        parts.append(torch.cat([one.directions(Share(one.rank, ranks, index), x) for one in maps], 1))
    gathered, at = torch.stack(parts), 0
    for one in maps:
        width = Share(one.rank, ranks, 0).width
        middle = joined(gathered, at, width, one.rank)
        at += width
        near(torch.cat([middle @ u.T for u in one.u.chunk(ranks)], 1), one(x), inputs + one.rank)
        spec = held(Layout.OUTPUTS, one.rank, one.pivoted, len(one.u) // ranks, inputs, inputs, ranks)
        assert spec.v == (width, one.v.shape[1]) and spec.u == (len(one.u) // ranks, one.rank)
        assert spec.pivot == (len(Share(one.rank, ranks, 0).inputs(one.pivot)) if one.pivot is not None else 0)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("rank", [5, 23, 35])
@pytest.mark.parametrize("pivoted", [False, True])
def test_row_parallel_ranks_sum_over_directions(pivoted: bool, rank: int, ranks: int) -> None:
    inputs, outputs = 36, 29
    one, x = Factors(outputs, inputs, rank, pivoted), torch.randn(7, inputs, dtype=torch.float64)
    shares = [Share(rank, ranks, index) for index in range(ranks)]
    layout = Layout.GATHERED if pivoted else Layout.INPUTS
    spec = held(layout, rank, pivoted, outputs, inputs, inputs // ranks, ranks)
    # of what the layout's collective leaves on every rank, each takes its own
    if pivoted:
        middles = [one.directions(share, x) for share in shares]
        assert spec.v == (shares[0].width, inputs - rank)
    else:
        v = torch.zeros(spec.v[0], inputs, dtype=torch.float64)
        v[:rank] = one.v
        partial = zip(x.chunk(ranks, 1), v.chunk(ranks, 1), strict=True)
        total = torch.stack([local @ columns.T for local, columns in partial]).sum(0)
        middles = list(total.split(shares[0].width, 1))
        assert spec.v[1] == inputs // ranks
    outcome = torch.zeros(7, outputs, dtype=torch.float64)
    for share, middle in zip(shares, middles, strict=True):
        u = torch.zeros(spec.u, dtype=torch.float64)
        u[:, : share.count] = one.u[:, share.start : share.stop]
        outcome += middle @ u.T
    near(outcome, one(x), inputs + rank)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_split_factors_shrink_with_the_number_of_ranks(pivoted: bool, row: bool, ranks: int) -> None:
    outputs, inputs, rank = 320, 640, 64 * 4
    whole = rank * (outputs + inputs - rank * pivoted)
    shape = (outputs if row else outputs // ranks, inputs, inputs // ranks if row else inputs)
    layout = layout_of("auto", [(rank, pivoted, shape[0])], *shape[1:], ranks, outputs * inputs // ranks)
    assert layout is (Layout.OUTPUTS if not row else Layout.GATHERED if pivoted else Layout.INPUTS)
    assert held(layout, rank, pivoted, *shape, ranks).weights == whole // ranks
    for choice, expected in (("replicate", Layout.REPLICATED), ("split", layout)):
        assert layout_of(choice, [(rank, pivoted, shape[0])], *shape[1:], ranks, 10**9) is expected


def test_a_collective_must_be_worth_it() -> None:
    rank, rows, inputs, ranks = 16, 50, 100, 2
    saved = held(Layout.REPLICATED, rank, False, rows, inputs, inputs, ranks).weights
    saved -= held(Layout.OUTPUTS, rank, False, rows, inputs, inputs, ranks).weights
    assert saved == rank * inputs // 2
    for dense, expected in (
        (saved / WORTH + 1, Layout.REPLICATED),
        (saved / WORTH - 1, Layout.OUTPUTS),
    ):
        assert layout_of("auto", [(rank, False, rows)], inputs, inputs, ranks, int(dense)) is expected
    assert layout_of("split", [(rank, False, rows)], inputs, inputs, 1, 10) is Layout.REPLICATED


def test_what_the_user_wants_of_layouts() -> None:
    assert chosen_layout({}) == chosen_layout(None) == chosen_layout(object()) == "auto"
    assert chosen_layout({"taco_tensor_parallel": "split", "other": 1}) == "split"
    for wrong in ("Split", "", None, 2):
        with pytest.raises(TacoError, match="auto, split, replicate"):
            chosen_layout({"taco_tensor_parallel": wrong})
