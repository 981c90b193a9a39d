"""The Triton kernels of ``pivoted_low_rank_linear`` under the interpreter, against float64.

Not collected by itself: ``test_triton_interpreted.py`` runs it in a process with ``TRITON_INTERPRET=1``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, bound, linear_exact, random, using
from test_pivoted_low_rank_linear import full_right_factor
from triton_interpreted_group import CONFIGS, _poisoned_memory  # noqa: F401  (a fixture)

import taco_kernels
from taco_kernels.triton_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear

SIZES = [(96, 64, 32), (83, 37, 19), (2, 1, 1), (70, 33, 69)]


def _inputs(rows, in_size, out_size, rank, dtype, generator=None, index=torch.int32, extras=True):
    x = random((rows, in_size + 3), dtype, generator)[:, :in_size]
    v = random((rank, in_size - rank + 5), dtype, generator)[:, : in_size - rank] * in_size**-0.5
    u = random((out_size, rank), dtype, generator) * rank**-0.5
    pivot = torch.randperm(in_size, generator=generator).to(index)
    bias = random((out_size,), dtype, generator) if extras else None
    residual = random((rows, out_size + 1), dtype, generator)[:, :out_size] if extras else None
    return x, v, u, pivot, bias, residual


def _check(y, x, v, u, pivot, bias, residual):
    exact, magnitude = linear_exact(x, full_right_factor(v, pivot), u, bias, residual)
    assert_within(y, exact, bound(exact, magnitude, x.shape[-1] + v.shape[0], x.dtype, "library"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "fused"])
@pytest.mark.parametrize("in_size, out_size, rank", SIZES)
def test_every_configuration(name, dtype, in_size, out_size, rank):
    for rows in [1] if name.startswith("row") else [1, 7, 16, 19]:
        inputs = _inputs(rows, in_size, out_size, rank, dtype, extras=rows % 2 == 1)
        y = pivoted_low_rank_linear(*inputs, config=CONFIGS[name])
        assert y.is_contiguous()
        _check(y, *inputs)
        assert torch.equal(y, pivoted_low_rank_linear(*inputs, config=CONFIGS[name]))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    in_size=st.integers(1, 70),
    share=st.floats(0, 1),
    out_size=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    extras=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_through_the_op(rows, in_size, share, out_size, dtype, index, extras, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, round(share * in_size))
    inputs = _inputs(rows, in_size, out_size, rank, dtype, generator, index, extras)
    with using("triton"):
        _check(taco_kernels.pivoted_low_rank_linear(*inputs), *inputs)


@pytest.mark.parametrize("rows", [1, 5])
def test_an_index_beyond_x_reads_zero(rows):
    x, v, u, pivot, _, _ = _inputs(rows, 40, 24, 16, torch.float32)
    for place in (3, 30):  # behind the identity, and behind v
        wrong, without = pivot.clone(), x.clone()
        wrong[place] = 1 << 30
        without[:, pivot[place]] = 0
        y = pivoted_low_rank_linear(x, v, u, wrong)
        assert torch.equal(y, pivoted_low_rank_linear(without, v, u, pivot))
        wrong[place] = -5
        assert torch.equal(y, pivoted_low_rank_linear(x, v, u, wrong))


def test_the_fused_kernel_gathers_nothing():
    inputs = _inputs(20, 40, 24, 16, torch.float32)
    with pytest.raises(ValueError, match="gathers no inputs"):
        pivoted_low_rank_linear(*inputs, config=CONFIGS["fused"])
