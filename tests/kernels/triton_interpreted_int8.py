"""The Triton kernels of ``low_rank_linear_int8`` under the interpreter, against float64.

Not collected by itself: ``test_triton_interpreted.py`` runs it in a process with ``TRITON_INTERPRET=1``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, bound, random, using
from test_low_rank_linear_int8 import exact, factors, limit
from triton_interpreted_group import _poisoned_memory  # noqa: F401  (a fixture)

import taco_kernels


def _check(y, x, v, v_scale, u, u_scale, bias, pivot):
    found, magnitude = exact(x, v, v_scale, u, u_scale, bias, pivot)
    terms = x.shape[-1] + v.shape[0] + 12
    if not v.numel():  # behind a pivot that is all there is: for the library
        assert_within(y, found, limit(found, magnitude, terms, x.dtype, "library"))
        return
    allowed = bound(found, magnitude, terms, x.dtype, "reference")
    if x.dtype != torch.float32:  # the intermediate is two numbers of the dtype, whose sum is short of fp32
        smallest = torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
        allowed = allowed + (torch.finfo(x.dtype).eps / 2) ** 2 * magnitude + v.shape[0] * smallest
    assert_within(y, found, allowed)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 16),
    inputs=st.integers(1, 70),
    share=st.floats(0, 1),
    outputs=st.integers(1, 60),
    pivoted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_through_the_op(rows, inputs, share, outputs, pivoted, dtype, index, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, round(share * inputs))
    x = random((rows, inputs + 3), dtype, generator)[:, :inputs]
    v, v_scale, u, u_scale, pivot = factors(inputs, rank, outputs, pivoted, generator, index)
    bias = random((outputs,), dtype, generator) if with_bias else None
    arguments = (x, v, v_scale, u, u_scale, bias, pivot)
    with using("triton"):
        y = taco_kernels.low_rank_linear_int8(*arguments)
        assert torch.equal(y, taco_kernels.low_rank_linear_int8(*arguments))
    assert y.is_contiguous()
    _check(y, *arguments)


@pytest.mark.parametrize("pivoted", [False, True])
def test_several_slices_of_the_inputs(pivoted):
    """More columns than one program takes; and more rows than the kernels do: two products of written-out factors."""
    generator = torch.Generator().manual_seed(1)
    v, v_scale, u, u_scale, pivot = factors(1500, 40, 70, pivoted, generator)
    for rows in (1, 16):
        x = random((rows, 1500), torch.bfloat16, generator)
        with using("triton"):
            _check(
                taco_kernels.low_rank_linear_int8(x, v, v_scale, u, u_scale, None, pivot),
                x,
                v,
                v_scale,
                u,
                u_scale,
                None,
                pivot,
            )
    x = random((17, 1500), torch.float32, generator)
    with using("triton"):
        y = taco_kernels.low_rank_linear_int8(x, v, v_scale, u, u_scale, None, pivot)
    found, magnitude = exact(x, v, v_scale, u, u_scale, None, pivot)
    assert_within(y, found, bound(found, magnitude, 1600, torch.float32, "library") + 2**-22 * magnitude)
    from taco_kernels.triton_kernels.low_rank_linear_int8 import low_rank_linear_int8

    with pytest.raises(ValueError, match="1 to 16 rows"):
        low_rank_linear_int8(x, v, v_scale, u, u_scale, None, pivot)


@pytest.mark.parametrize("rows", [1, 5])
def test_an_index_beyond_x_reads_zero(rows):
    generator = torch.Generator().manual_seed(2)
    v, v_scale, u, u_scale, pivot = factors(40, 16, 24, True, generator)
    x = random((rows, 40), torch.float32, generator)
    for place in (3, 30):  # behind the identity, and behind v
        wrong, without = pivot.clone(), x.clone()
        without[:, pivot[place]] = 0
        with using("triton"):
            expected = taco_kernels.low_rank_linear_int8(without, v, v_scale, u, u_scale, None, pivot)
            for index in (1 << 30, -5):
                wrong[place] = index
                y = taco_kernels.low_rank_linear_int8(x, v, v_scale, u, u_scale, None, wrong)
                assert torch.equal(y, expected)
