"""low_rank_linear_int8 against float64: any shape, pivots, dtypes, instruction sets; and the format of its factors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, HALF, assert_within, bound, cpu_backends, random, using

import taco_kernels
from taco_kernels import low_rank_linear_int8, native
from taco_kernels.low_rank_linear_int8 import (
    BACKENDS,
    dequantise,
    low_rank_linear_int8_reference,
    quantise_rows,
)

needs_cpp = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")


def factors(inputs, rank, outputs, pivoted, generator, index=torch.int32):
    """(v, v_scale, u, u_scale, pivot) with scales over several decades."""
    columns = inputs - rank if pivoted else inputs
    v, u = (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        for shape in ((rank, columns), (outputs, rank))
    )
    scales = [10 ** (3 * torch.rand(rank, generator=generator) - 5) for _ in range(2)]
    pivot = torch.randperm(inputs, generator=generator).to(index) if pivoted else None
    return v, scales[0], u, scales[1], pivot


def exact(x, v, v_scale, u, u_scale, bias, pivot):
    """(result, the same of absolute values), float64."""

    def formula(x, v, u, bias):
        rank = v.shape[0]
        if pivot is None:
            t = x @ v.T * v_scale.double()
        else:
            t = x[..., pivot[:rank].long()] + x[..., pivot[rank:].long()] @ v.T * v_scale.double()
        y = (t * u_scale.double()) @ u.T
        return y if bias is None else y + bias

    wide = [None if t is None else t.double() for t in (x, v, u, bias)]
    return formula(*wide), formula(*(None if t is None else t.abs() for t in wide))


FEW_ROWS = 8  # of which nothing is rounded on the way (csrc/cpu/int8.cpp)


def limit(found, magnitude, terms, dtype, backend):
    """What rounding explains: of the reference and of few rows on a CPU nothing but sums and the result, of everything
    else both factors, written out, and what two library products round."""
    rows = found.shape[:-1].numel()
    if backend == "reference" or (backend.startswith("cpp") and rows <= FEW_ROWS):
        return bound(found, magnitude, terms, dtype, "reference")
    u = torch.finfo(dtype).eps / 2
    # the first product's results may be too small for float16 to hold whole; what comes of them is sums of `terms`
    small = terms * 127 * torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    # either factor is rounded once as it is written out; library products round what is between them, too
    written = 3 if backend == "library" else 2 * (1 + u)
    return bound(found, magnitude, terms, dtype, backend) + written * u * magnitude + small


@settings(max_examples=80, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    inputs=st.integers(1, 140),
    share=st.floats(0, 1),
    outputs=st.integers(1, 90),
    pivoted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(lead, inputs, share, outputs, pivoted, dtype, index, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, round(share * inputs))
    x = random((*lead, inputs), dtype, generator)
    v, v_scale, u, u_scale, pivot = factors(inputs, rank, outputs, pivoted, generator, index)
    bias = random((outputs,), dtype, generator) if with_bias else None
    found, magnitude = exact(x, v, v_scale, u, u_scale, bias, pivot)
    terms = inputs + rank + 4
    for backend in cpu_backends():
        with using(backend):
            y = low_rank_linear_int8(x, v, v_scale, u, u_scale, bias, pivot)
        assert y.dtype == dtype and y.shape == (*lead, outputs)
        assert_within(y, found, limit(found, magnitude, terms, dtype, backend))


@needs_cpp
@pytest.mark.parametrize("isa", native.module.cpu_isas() if native.module is not None else [])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_widths_and_strides(isa, dtype):
    """Around every number of rows that is multiplied together and every step of columns; rows that lie apart."""
    generator = torch.Generator().manual_seed(3)
    for rows, (inputs, rank, outputs) in itertools.product(
        (1, 2, 3, 4, 5, 8, 9, 16, 17, 63, 64, 65, 131), ((31, 33, 30), (32, 32, 32), (257, 48, 131), (5, 64, 1))
    ):
        x = random((rows, 2 * inputs + 3), dtype, generator)[:, 1 : inputs + 1]
        v, v_scale, u, u_scale, _ = factors(inputs, rank, outputs, False, generator)
        wide_v, wide_u = (torch.empty(f.shape[0], f.shape[1] + 5, dtype=torch.int8) for f in (v, u))
        wide_v[:, :inputs], wide_u[:, :rank] = v, u
        v, u = wide_v[:, :inputs], wide_u[:, :rank]
        found, magnitude = exact(x, v, v_scale, u, u_scale, None, None)
        with using(f"cpp:{isa}"):
            y = low_rank_linear_int8(x, v, v_scale, u, u_scale)
        assert_within(y, found, limit(found, magnitude, inputs + rank + 4, dtype, f"cpp:{isa}"))


@needs_cpp
def test_a_row_has_the_same_bits_wherever_it_stands_and_on_any_threads():
    generator = torch.Generator().manual_seed(4)
    x = random((70, 517), torch.bfloat16, generator)
    given = factors(517, 210, 333, True, generator)
    arguments = (*given[:4], None, given[4])
    before = torch.get_num_threads()
    try:
        with taco_kernels.use_backend("cpp"):
            one = low_rank_linear_int8(x, *arguments)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(low_rank_linear_int8(x, *arguments), one)
            few = low_rank_linear_int8(x[:8], *arguments)
            for row in (0, 3, 7):
                assert torch.equal(low_rank_linear_int8(x[row], *arguments), few[row])
            assert torch.equal(low_rank_linear_int8(x[5:], *arguments), one[5:])
    finally:
        torch.set_num_threads(before)


def test_float64_and_the_reference():
    generator = torch.Generator().manual_seed(5)
    x = random((3, 40), torch.float64, generator)
    v, v_scale, u, u_scale, pivot = factors(40, 9, 21, True, generator)
    found, _ = exact(x, v, v_scale, u, u_scale, None, pivot)
    for y in (low_rank_linear_int8(x, v, v_scale, u, u_scale, None, pivot),
              low_rank_linear_int8_reference(x, v, v_scale, u, u_scale, None, pivot)):  # fmt: skip
        torch.testing.assert_close(y, found, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("pivoted", [False, True])
def test_gradients(pivoted):
    generator = torch.Generator().manual_seed(6)
    x = random((2, 5, 23), torch.float64, generator).requires_grad_(True)
    bias = random((17,), torch.float64, generator).requires_grad_(True)
    v, v_scale, u, u_scale, pivot = factors(23, 8, 17, pivoted, generator)
    assert torch.autograd.gradcheck(lambda x, b: low_rank_linear_int8(x, v, v_scale, u, u_scale, b, pivot), (x, bias))
    assert torch.autograd.gradgradcheck(
        lambda x: low_rank_linear_int8(x, v, v_scale, u, u_scale, None, pivot).square(), (x,)
    )


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_sees_an_op(pivoted, dtype):
    """opcheck; one graph when compiled and exported with open lengths; vmap; autocast casts activations, not scales."""
    generator = torch.Generator().manual_seed(7)
    x = random((4, 23), dtype, generator)
    v, v_scale, u, u_scale, pivot = factors(23, 8, 17, pivoted, generator)
    bias = random((17,), dtype, generator)
    op = torch.ops.taco_kernels.low_rank_linear_int8.default
    torch.library.opcheck(op, (x, v, v_scale, u, u_scale, bias, pivot))
    expected = low_rank_linear_int8(x, v, v_scale, u, u_scale, bias, pivot)
    torch.compiler.reset()
    compiled = torch.compile(low_rank_linear_int8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, v, v_scale, u, u_scale, bias, pivot), expected)

    class Map(torch.nn.Module):
        def forward(self, x):
            return low_rank_linear_int8(x, v, v_scale, u, u_scale, bias, pivot)

    program = torch.export.export(Map(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    longer = random((9, 23), dtype, generator)
    assert torch.equal(program.module()(longer), low_rank_linear_int8(longer, v, v_scale, u, u_scale, bias, pivot))
    batched = torch.func.vmap(lambda row: low_rank_linear_int8(row, v, v_scale, u, u_scale, bias, pivot))(x)
    found, magnitude = exact(x, v, v_scale, u, u_scale, bias, pivot)
    assert_within(batched, found, limit(found, magnitude, 35, dtype, "library"))
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_linear_int8(x.float(), v, v_scale, u, u_scale, bias.float(), pivot)
    rounded = low_rank_linear_int8(x.bfloat16(), v, v_scale, u, u_scale, bias.bfloat16(), pivot)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rounded)


def test_what_does_not_fit_is_named():
    generator = torch.Generator().manual_seed(8)
    x = random((2, 23), torch.float32, generator)
    v, v_scale, u, u_scale, _ = factors(23, 8, 17, False, generator)
    good = {"x": x, "v": v, "v_scale": v_scale, "u": u, "u_scale": u_scale}
    for name, wrong, error, words in (
        ("x", x.int(), TypeError, "x has dtype"),
        ("v", v.float(), TypeError, "v has dtype torch.float32; int8"),
        ("u", None, TypeError, "u must be a tensor"),
        ("u_scale", u_scale.bfloat16(), TypeError, "u_scale has dtype torch.bfloat16; float32"),
        ("v_scale", v_scale[:-1], ValueError, r"v_scale \(7,\) must be \(8,\)"),
        ("v", v[:, :-1], ValueError, r"v \(8, 22\) must be \[rank, in\] with in = 23"),
        ("u", u[:, :-1], ValueError, r"\[out, rank\] with rank = 8"),
        ("bias", torch.zeros(17, dtype=torch.bfloat16), TypeError, "bias has dtype"),
        ("bias", torch.zeros(16), ValueError, "bias"),
        ("pivot", torch.arange(23), ValueError, r"v \(8, 23\) must be \[rank, in - rank\]"),
        ("pivot", torch.arange(23.0), TypeError, "int32 or int64"),
    ):
        with pytest.raises(error, match=words):
            low_rank_linear_int8(**{**good, name: wrong})


@needs_cpp
@pytest.mark.parametrize("backend", ["cpp", "library"])
@pytest.mark.parametrize("rows", [1, 9, 80])
def test_an_index_out_of_range_reads_nothing(backend, rows):
    generator = torch.Generator().manual_seed(9)
    v, v_scale, u, u_scale, pivot = factors(23, 8, 17, True, generator)
    pivot[5] = 2**30
    with taco_kernels.use_backend(backend), pytest.raises((IndexError, RuntimeError)):
        low_rank_linear_int8(random((rows, 23), torch.float32, generator), v, v_scale, u, u_scale, None, pivot)


def test_a_backend_without_such_kernels_says_so(monkeypatch):
    generator = torch.Generator().manual_seed(10)
    given = factors(23, 8, 17, False, generator)
    monkeypatch.setattr(taco_kernels.dispatch, "choose", lambda *_: "cuda")
    monkeypatch.setattr(taco_kernels.dispatch, "get_backend", lambda: "cuda")
    assert "cuda" not in BACKENDS
    with pytest.raises(RuntimeError, match="no kernel for 8-bit factors"):
        low_rank_linear_int8(random((1, 23), torch.float32, generator), *given[:4])


# --- the format ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    directions=st.integers(0, 9),
    n=st.integers(0, 70),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    decade=st.integers(-12, 4),
    seed=st.integers(0, 2**20),
)
def test_rows_are_at_most_half_a_scale_off(directions, n, dtype, decade, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = (random((directions, n), torch.float64, generator) * 10.0**decade).to(dtype)
    integers, scales = quantise_rows(rows)
    assert integers.dtype == torch.int8 and scales.dtype == torch.float32
    assert integers.shape == rows.shape and scales.shape == (directions,)
    assert integers.abs().max() <= 127 if integers.numel() else True
    assert torch.equal(scales, scales.bfloat16().float())  # a model is cast as a whole
    off = (integers.double() * scales.double()[:, None] - rows.double()).abs()
    # half a scale, and the rounding of the quotient to fp32
    assert bool((off <= (0.5 + 2**-16) * scales.double()[:, None]).all())
    # no coarser than it needs to be: rounding a scale up to bfloat16 adds a 128th at most
    if n:
        largest = rows.double().abs().amax(1)
        assert bool((scales.double() * 127 <= largest * (1 + 2**-7) + 127 * 2**-133).all())


def test_rows_of_zeros_and_rows_that_are_not_finite():
    integers, scales = quantise_rows(torch.zeros(2, 5))
    assert not integers.any() and not scales.any()
    for value in (float("inf"), float("nan")):
        rows = torch.ones(2, 5)
        rows[1, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            quantise_rows(rows)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_written_out_factors_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(11)
    integers = torch.randint(-127, 128, (7, 30), generator=generator, dtype=torch.int8)
    scales = torch.rand(7, generator=generator)
    expected = (integers.double() * scales.double()[:, None]).float().to(dtype)
    assert torch.equal(dequantise(integers, scales[:, None], dtype), expected)
    assert dequantise(integers[:, :0], scales[:0], dtype).shape == (7, 0)


@pytest.mark.parametrize("rows", [3, 20, 120])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_scales_may_lie_anywhere(rows, needs_grad):
    """One number for all directions, every second one of a list, a column of a table: as their copies."""
    generator = torch.Generator().manual_seed(12)
    v, v_scale, u, u_scale, _ = factors(23, 8, 17, False, generator)
    x = random((rows, 23), torch.float32, generator).requires_grad_(needs_grad)
    table = torch.stack([v_scale, u_scale], 1)
    strided = (table[:, 0], table[:, 1]), (v_scale[:1].expand(8), u_scale.repeat_interleave(2)[::2])
    for first, second in strided:
        found = low_rank_linear_int8(x, v, first, u, second)
        assert torch.equal(found, low_rank_linear_int8(x, v, first.clone(), u, second.clone()))


def test_lazily_negated_numbers_count_as_they_are():
    v, u = torch.full((1, 1), 3, dtype=torch.int8), torch.full((1, 1), 5, dtype=torch.int8)
    scale = torch.ones(1)
    negative = torch.complex(torch.zeros(1, 1), torch.full((1, 1), 2.0)).conj().imag
    assert negative.is_neg() and negative.is_contiguous()
    assert low_rank_linear_int8(negative, v, scale, u, scale).item() == -30
    assert low_rank_linear_int8(torch.full((1, 1), 2.0), v, scale, u, negative[0]).item() == -60


@needs_cpp
def test_a_gradient_keeps_the_integers_and_not_what_they_are_written_out_to():
    generator = torch.Generator().manual_seed(13)
    v, v_scale, u, u_scale, pivot = factors(230, 40, 170, True, generator)
    x = random((5, 230), torch.float32, generator).requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = low_rank_linear_int8(x, v, v_scale, u, u_scale, None, pivot)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (v, v_scale, u, u_scale, pivot))
    assert torch.equal(y, low_rank_linear_int8(x.detach(), v, v_scale, u, u_scale, None, pivot))


@pytest.mark.parametrize("pivoted", [False, True])
def test_gradients_are_compiled_and_transformed(pivoted):
    generator = torch.Generator().manual_seed(14)
    x = random((4, 23), torch.float32, generator).requires_grad_(True)
    bias = random((17,), torch.float32, generator).requires_grad_(True)
    v, v_scale, u, u_scale, pivot = factors(23, 8, 17, pivoted, generator)
    op = torch.ops.taco_kernels.low_rank_linear_int8.default
    torch.library.opcheck(op, (x, v, v_scale, u, u_scale, bias, pivot))

    def loss(x, bias):
        return low_rank_linear_int8(x, v, v_scale, u, u_scale, bias, pivot).square().sum()

    expected = torch.autograd.grad(loss(x, bias), (x, bias))
    torch.compiler.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, bias), (x, bias))
    transformed = torch.func.grad(loss, (0, 1))(x.detach(), bias.detach())
    for found in (compiled, transformed):
        torch.testing.assert_close(found, expected)

    def with_factors(x, v, v_scale, u, u_scale):
        return low_rank_linear_int8(x, v, v_scale, u, u_scale, bias, pivot)

    several = torch.func.vmap(with_factors)(*(torch.stack([t, t]) for t in (x.detach(), v, v_scale, u, u_scale)))
    one = with_factors(x.detach(), v, v_scale, u, u_scale)
    torch.testing.assert_close(several, torch.stack([one, one]))
