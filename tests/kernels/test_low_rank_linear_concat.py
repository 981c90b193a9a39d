"""low_rank_linear_concat against float64 and its members' ops: pivots and none, sizes, strides, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, bound, cpu_backends, linear_exact, random, using
from torch import Tensor

from taco_kernels import low_rank_linear, low_rank_linear_concat, pivoted_low_rank_linear
from taco_kernels.low_rank_linear_concat import low_rank_linear_concat_reference

op = torch.ops.taco_kernels.low_rank_linear_concat


def draw(width: int, sizes, dtype: torch.dtype, generator: torch.Generator):
    """(v, u, bias, pivot) for each (rank, out, kind of pivot); a rank of at most ``width`` where there is a pivot."""
    members = []
    for rank, out, index in sizes:
        rank = min(rank, width) if index is not None else rank
        v = random((rank, width - rank if index is not None else width), dtype, generator)
        pivot = None if index is None else torch.randperm(width, generator=generator).to(index)
        members.append((v, random((out, rank), dtype, generator), random((out,), dtype, generator), pivot))
    return members


def exact(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, pivot: Tensor | None) -> tuple[Tensor, Tensor]:
    if pivot is not None:
        v = torch.cat([torch.eye(len(v), dtype=v.dtype), v], 1)[:, pivot.long().argsort()]
    return linear_exact(x, v, u, bias, None)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=2),
    width=st.integers(1, 70),
    sizes=st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 60), st.sampled_from([None, torch.int32, torch.int64])),
        min_size=1,
        max_size=5,
    ),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_sizes(lead, width, sizes, with_bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    members = draw(width, sizes, dtype, generator)
    x = random((*lead, width), dtype, generator)
    vs, us, biases, pivots = map(list, zip(*members, strict=True))
    biases = biases if with_bias else [None] * len(us)
    parts = [exact(x, *member) for member in zip(vs, us, biases, pivots, strict=True)]
    result, magnitude = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    terms = width + max(u.shape[1] for u in us)
    reference = low_rank_linear_concat_reference(x, vs, us, biases, pivots)
    assert_within(reference, result, bound(result, magnitude, terms, dtype, "reference"))
    for backend in cpu_backends():
        with using(backend):
            # the public function goes to the members' ops on a CPU; the op itself has the backends' ways
            for y in (low_rank_linear_concat(x, vs, us, biases, pivots), op(x, vs, us, biases, pivots)):
                assert y.dtype == dtype and y.is_contiguous() and y.shape == (*lead, sum(u.shape[0] for u in us))
                assert_within(y, result, bound(result, magnitude, terms, dtype, backend))


def test_the_members_are_the_members_ops_bit_for_bit():
    generator = torch.Generator().manual_seed(3)
    members = draw(64, [(16, 40, torch.int32), (24, 8, None), (8, 72, torch.int64)], torch.bfloat16, generator)
    x = random((3, 5, 128), torch.bfloat16, generator)[..., ::2]
    vs, us, biases, pivots = map(list, zip(*members, strict=True))
    expected = torch.cat(
        [
            low_rank_linear(x, v, u, bias) if pivot is None else pivoted_low_rank_linear(x, v, u, pivot, bias)
            for v, u, bias, pivot in members
        ],
        dim=-1,
    )
    assert torch.equal(low_rank_linear_concat(x, vs, us, biases, pivots), expected)


def test_neither_biases_nor_pivots_are_needed():
    x, v, u = torch.randn(2, 6), torch.randn(3, 6), torch.randn(4, 3)
    y = low_rank_linear_concat(x, [v, v], [u, u])
    torch.testing.assert_close(y, torch.cat([low_rank_linear(x, v, u)] * 2, -1))


BAD = {
    "no members": ({"vs": [], "us": []}, ValueError, "0 vs, 0 us, 0 biases and 0 pivots"),
    "counts": ({"pivots": [None]}, ValueError, "2 vs, 2 us, 2 biases and 1 pivots; there must be equally many"),
    "plain": ({"vs": [torch.zeros(2, 8), torch.zeros(3, 9)]}, ValueError, r"\(3, 9\).*in = 8"),
    "pivoted": ({"pivots": [torch.arange(8), None]}, ValueError, r"v \(2, 8\) must be \[rank, in - rank\]"),
    "index": ({"vs": [torch.zeros(2, 6), torch.zeros(3, 8)], "pivots": [torch.zeros(8), None]}, TypeError, "int32 or"),
}


@pytest.mark.parametrize("by_op", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_error_messages(case, by_op):
    change, error, message = BAD[case]
    arguments = {"vs": [torch.zeros(2, 8), torch.zeros(3, 8)], "us": [torch.zeros(4, 2), torch.zeros(5, 3)], **change}
    nothing = [None] * len(arguments["vs"])
    arguments = {"biases": nothing, "pivots": nothing, **arguments}
    with pytest.raises(error, match=message):
        (op if by_op else low_rank_linear_concat)(torch.zeros(3, 8), **arguments)
