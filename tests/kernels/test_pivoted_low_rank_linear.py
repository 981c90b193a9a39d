"""pivoted_low_rank_linear against float64 and its reference: shapes, dtypes, gradients, compile, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, ascending, assert_within, bound, cpu_backends, linear_exact, random, using

from taco_kernels import native, pivoted_low_rank_linear
from taco_kernels.pivoted_low_rank_linear import gathered, pivoted_low_rank_linear_reference


def full_right_factor(v, pivot):
    """The right factor [rank, in] that the op's v and pivot stand for, built entry by entry."""
    rank = v.shape[0]
    full = torch.zeros(rank, len(pivot), dtype=v.dtype)
    for position, index in enumerate(pivot.tolist()):
        if position < rank:
            full[position, index] = 1
        else:
            full[:, index] = v[:, position - rank]
    return full


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    inputs=st.integers(1, 70),
    share=st.floats(0, 1),
    outputs=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    extras=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(lead, inputs, share, outputs, dtype, index_dtype, extras, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, round(share * inputs))
    x = random((*lead, inputs), dtype, generator)
    v, u = random((rank, inputs - rank), dtype, generator), random((outputs, rank), dtype, generator)
    pivot = torch.randperm(inputs, generator=generator).to(index_dtype)
    bias = random((outputs,), dtype, generator) if extras else None
    residual = random((*lead, outputs), dtype, generator) if extras else None
    exact, magnitude = linear_exact(x, full_right_factor(v, pivot), u, bias, residual)
    reference = pivoted_low_rank_linear_reference(x, v, u, pivot, bias, residual)
    assert_within(reference, exact, bound(exact, magnitude, inputs + rank, dtype, "reference"))
    for backend in cpu_backends():
        with using(backend):
            y = pivoted_low_rank_linear(x, v, u, pivot, bias, residual)
        assert y.dtype == dtype and y.shape == (*lead, outputs)
        assert_within(y, exact, bound(exact, magnitude, inputs + rank, dtype, backend))


def arguments(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    x, v, u = (random(shape, dtype, generator) for shape in ((2, 3, 9), (4, 5), (6, 4)))
    return x, v, u, torch.randperm(9, generator=generator), random((6,), dtype, generator)


def test_gradients():
    x, v, u, pivot, bias = arguments()
    tensors = [tensor.requires_grad_(True) for tensor in (x, v, u, bias)]
    assert torch.autograd.gradcheck(lambda x, v, u, bias: pivoted_low_rank_linear(x, v, u, pivot, bias), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_compiled_behind_a_frozen_input(dtype):
    """What is traced for factors that are trained holds the gather of an input that is not."""
    x, v, u, pivot, _ = arguments(dtype)
    factors = v.requires_grad_(True), u.requires_grad_(True)
    torch.compiler.reset()
    compiled = torch.compile(pivoted_low_rank_linear, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, *factors, pivot), pivoted_low_rank_linear(x, *factors, pivot)
    torch.testing.assert_close(y, expected)
    for a, e in zip(*(torch.autograd.grad(t.square().sum(), factors) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, e)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert pivoted_low_rank_linear(mode.from_tensor(x), *factors, pivot).shape == expected.shape


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(rows, dtype):
    """Enough rows for every way in which the kernels lay out the intermediate."""
    inputs, rank, outputs = 150, 61, 83
    x, v, u = (random(shape, dtype) for shape in ((rows, inputs), (rank, inputs - rank), (outputs, rank)))
    pivot = torch.randperm(inputs)
    exact, magnitude = linear_exact(x, full_right_factor(v, pivot), u, None, None)
    for backend in cpu_backends():
        with using(backend):
            y = pivoted_low_rank_linear(x, v, u, pivot)
        assert_within(y, exact, bound(exact, magnitude, inputs + rank, dtype, backend))


@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_directions(rows, dtype):
    """Then the identity's share of what is gathered is a view without elements, whose address torch gives as null."""
    x, v, u = (random(shape, dtype) for shape in ((rows, 40), (0, 40), (7, 0)))
    bias = random((7,), dtype)
    for backend in cpu_backends():
        with using(backend):
            y = pivoted_low_rank_linear(x, v, u, torch.randperm(40), bias)
        assert torch.equal(y, bias.expand(rows, 7))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    x, v, u, pivot, bias = arguments(torch.float32)
    tensors = [tensor.requires_grad_(needs_grad) for tensor in (x, v, u)]
    torch.library.opcheck(torch.ops.taco_kernels.pivoted_low_rank_linear.default, (*tensors, pivot, bias))


def test_autocast():
    x, v, u, pivot, bias = arguments(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pivoted_low_rank_linear(x, v, u, pivot, bias)
    assert y.dtype == torch.bfloat16
    rounded = (x.bfloat16(), v.bfloat16(), u.bfloat16(), pivot, bias.bfloat16())
    assert torch.equal(y, pivoted_low_rank_linear(*rounded))


def test_compiles_whole():
    x, v, u, pivot, bias = arguments(torch.float32)
    compiled = torch.compile(pivoted_low_rank_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, v, u, pivot, bias), pivoted_low_rank_linear(x, v, u, pivot, bias))


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"v": torch.zeros(4, 6)}, ValueError, "in - rank"),
        ({"u": torch.zeros(6, 3)}, ValueError, "rank"),
        ({"pivot": torch.zeros(8, dtype=torch.int64)}, ValueError, "pivot"),
        ({"pivot": torch.zeros(9)}, TypeError, "int32 or int64"),
        ({"bias": torch.zeros(5)}, ValueError, "bias"),
        ({"residual": torch.zeros(2, 3, 5)}, ValueError, "residual"),
        ({"x": torch.zeros(2, 3, 9, dtype=torch.int64)}, TypeError, "x has dtype"),
        ({"v": torch.zeros(4, 5, dtype=torch.float16)}, TypeError, "v has dtype"),
        ({"u": torch.zeros(6)}, ValueError, "2-D"),
    ],
)
def test_wrong_arguments(change, error, says):
    x, v, u, pivot, bias = arguments(torch.float32)
    with pytest.raises(error, match=says):
        pivoted_low_rank_linear(**{"x": x, "v": v, "u": u, "pivot": pivot, "bias": bias, **change})


def test_index_out_of_range_is_an_error():
    x, v, u, pivot, bias = arguments(torch.float32)
    pivot[3] = 9
    with pytest.raises(IndexError):
        pivoted_low_rank_linear(x, v, u, pivot, bias)


@pytest.mark.parametrize("place", [0, -1])
def test_the_reference_counts_no_index_from_behind(place):
    x, v, u, pivot, bias = arguments(torch.float64)
    pivot[place] -= 9
    with pytest.raises((IndexError, RuntimeError)):
        pivoted_low_rank_linear(x, v, u, pivot, bias)


@pytest.mark.parametrize("wrong", [9, -1, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 600])
def test_no_backend_reads_beyond_the_inputs(rows, dtype, index_dtype, wrong):
    _, v, u, pivot, bias = arguments(dtype)
    x = random((rows, 9), dtype)
    pivot = pivot.to(index_dtype)
    pivot[3] = wrong
    ours = rows > 1 and dtype.itemsize == 2 and native.module is not None
    # torch's own gather of a matrix of float32, or of one row, says RuntimeError
    errors = IndexError if ours else (IndexError, RuntimeError)
    for backend in cpu_backends():
        with using(backend), pytest.raises(errors, match="pivot|index|INDICES"):
            pivoted_low_rank_linear(x, v, u, pivot, bias)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_is_torchs(dtype, index_dtype, threads):
    """Values are moved, not computed: the same bits, from rows with gaps between them too, for any pivot."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = (
            (2, 5, 2),
            (70, 613, 611),
            (300, 64, 1),
            (3, 7, 7),
            (9, 16, 5),
            (40, 63, 0),
            (17, 33, 33),
            (64, 500, 260),
        )
        for (rows, inputs, rank), backend in itertools.product(sizes, cpu_backends()):
            x = random((rows, inputs + 3), dtype)[:, :inputs]
            mixed = torch.randperm(inputs).to(index_dtype)
            in_order = ascending(mixed, rank)
            twice = in_order.clone()  # both parts ascend, but one input is in both
            twice[-1] = twice[:rank].max() if rank and rank < inputs else twice[-1]
            for pivot in (mixed, in_order, twice):
                with using(backend):
                    first, rest = gathered(x, pivot, rank)
                assert torch.equal(torch.cat([first, rest], 1), x.index_select(1, pivot))
    finally:
        torch.set_num_threads(before)
