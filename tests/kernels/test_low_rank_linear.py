"""low_rank_linear on every CPU backend against float64: shapes, strides, dtypes, options, empty batches, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, ROWS, SHAPES, assert_within, bound, cpu_backends, linear_exact, random, using

from taco_kernels import low_rank_linear


def check(backend, x, v, u, bias=None, residual=None):
    with using(backend):
        y = low_rank_linear(x, v, u, bias, residual)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    exact, magnitude = linear_exact(x, v, u, bias, residual)
    terms = x.shape[-1] + v.shape[0]
    assert_within(y, exact, bound(exact, magnitude, terms, x.dtype, backend))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_matches_float64(backend, dtype):
    for in_features, rank, out_features in SHAPES:
        for rows in ROWS:
            x, v = random((rows, in_features), dtype), random((rank, in_features), dtype)
            u, bias = random((out_features, rank), dtype), random((out_features,), dtype)
            residual = random((rows, out_features), dtype)
            check(backend, x, v, u)
            check(backend, x, v, u, bias, residual)


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    sizes=st.tuples(st.integers(1, 80), st.integers(0, 80), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(backend, lead, sizes, dtype, with_bias, with_residual, seed):
    generator = torch.Generator().manual_seed(seed)
    in_features, rank, out_features = sizes
    x, v = random((*lead, in_features), dtype, generator), random((rank, in_features), dtype, generator)
    u = random((out_features, rank), dtype, generator)
    bias = random((out_features,), dtype, generator) if with_bias else None
    residual = random((*lead, out_features), dtype, generator) if with_residual else None
    check(backend, x, v, u, bias, residual)


def strided_inputs(dtype):
    """x in every layout that a model can produce; all [..., 40]."""
    base = random((6, 5, 80), dtype)
    return {
        "sliced columns": base[..., 3:43],
        "every second row": base[::2, 0, :40],
        "every second column": base[..., ::2],
        "expanded row": random((1, 40), dtype).expand(6, 40),
        "expanded column": random((6, 1), dtype).expand(6, 40),
        "transposed": random((40, 7), dtype).T,
        "swapped batch and sequence": random((5, 3, 40), dtype).transpose(0, 1),
        "last token of a batch": base[:, -1:, :40],
        "one dimension": random((80,), dtype)[::2],
        "batch flattened": base[:, :, :40].permute(1, 0, 2),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_strides(backend, dtype):
    v, u, bias = random((24, 40), dtype), random((19, 24), dtype), random((19,), dtype)
    v_strided, u_transposed = random((24, 90), dtype)[:, 7:47], random((24, 19), dtype).T
    bias_strided = random((38,), dtype)[::2]
    for name, x in strided_inputs(dtype).items():
        assert x.shape[-1] == 40, name
        residual = random((19, *x.shape[:-1]), dtype).movedim(0, -1)
        check(backend, x, v, u, bias, residual)
        check(backend, x, v_strided, u_transposed, bias_strided, residual.contiguous())


@pytest.mark.parametrize("backend", cpu_backends())
def test_float64(backend):
    if backend.startswith("cpp"):
        with using(backend), pytest.raises(RuntimeError, match=r"cpp: computes float32, float16 and bfloat16"):
            low_rank_linear(*(random(s, torch.float64) for s in ((3, 8), (2, 8), (4, 2))))
        return
    x, v, u = random((3, 8), torch.float64), random((2, 8), torch.float64), random((4, 2), torch.float64)
    with using(backend):
        torch.testing.assert_close(low_rank_linear(x, v, u), x @ (u @ v).T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leaves_inputs_alone_and_aliases_none(backend, dtype):
    x, v, u = random((3, 33), dtype), random((0, 33), dtype), random((33, 0), dtype)
    residual = random((3, 33), dtype)
    before = residual.clone()
    with using(backend):
        y = low_rank_linear(x, v, u, None, residual)
    y += 1
    assert torch.equal(residual, before)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_go_where_they_belong(backend, dtype):
    x, v, u = random((4, 37), dtype), random((21, 37), dtype), random((10, 21), dtype)
    x[1, 36] = float("nan")
    x[2, 0] = float("inf")
    with using(backend):
        y = low_rank_linear(x, v, u)
    assert bool(torch.isfinite(y[[0, 3]]).all())
    assert bool(y[1].isnan().all())
    assert not bool(torch.isfinite(y[2]).any())


BAD = {
    "v's width": (lambda a: a.update(v=torch.zeros(2, 9)), ValueError, r"v \(2, 9\).*in = 8"),
    "u's rank": (lambda a: a.update(u=torch.zeros(4, 3)), ValueError, r"u \(4, 3\).*rank = 2"),
    "v's dimensions": (lambda a: a.update(v=torch.zeros(8)), ValueError, r"v must have 2 dimensions.*\(8,\)"),
    "u's dimensions": (lambda a: a.update(u=torch.zeros(1, 4, 2)), ValueError, r"u must have 2 dimensions"),
    "x's dimensions": (lambda a: a.update(x=torch.zeros(())), ValueError, r"x must be \[\.\.\., in\]"),
    "bias": (lambda a: a.update(bias=torch.zeros(5)), ValueError, r"bias \(5,\) must be \[out\] = \(4,\)"),
    "residual": (lambda a: a.update(residual=torch.zeros(4)), ValueError, r"residual \(4,\).*\(3, 4\)"),
    "mixed dtypes": (lambda a: a.update(u=torch.zeros(4, 2).half()), TypeError, r"u has dtype torch.float16"),
    "bias's dtype": (lambda a: a.update(bias=torch.zeros(4).double()), TypeError, r"bias has dtype torch.float64"),
    "integers": (lambda a: a.update(x=torch.zeros(3, 8).int()), TypeError, r"x has dtype torch.int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_messages(case):
    change, error, message = BAD[case]
    arguments = {"x": torch.zeros(3, 8), "v": torch.zeros(2, 8), "u": torch.zeros(4, 2), "bias": None, "residual": None}
    change(arguments)
    with pytest.raises(error, match=message):
        low_rank_linear(**arguments)


def test_refuses_mixed_devices():
    with pytest.raises(ValueError, match="u is on meta"):
        torch.ops.taco_kernels.low_rank_linear.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
            torch.zeros(3, 8),
            torch.zeros(2, 8),
            torch.zeros(4, 2, device="meta"),
        )
