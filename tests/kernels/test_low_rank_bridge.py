"""low_rank_bridge on every CPU backend against float64: shapes, strides, dtypes, extreme norms, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, ROWS, assert_within, bound, bridge_exact, cpu_backends, random, using

from taco_kernels import low_rank_bridge

SHAPES = [(1, 1), (7, 5), (32, 32), (33, 16), (130, 48), (257, 100), (5, 0), (3, 70)]


def check(backend, h, v, u, bias=None, eps=1e-6):
    with using(backend):
        y = low_rank_bridge(h, v, u, bias, eps)
    assert y.dtype == h.dtype
    assert y.is_contiguous()
    exact, magnitude = bridge_exact(h, v, u, bias, eps)
    # the norm adds one more sum over the width, and its square root halves what that contributes
    terms = 2 * h.shape[-1] + v.shape[0]
    assert_within(y, exact, bound(exact, magnitude, terms, h.dtype, backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_matches_float64(backend, dtype):
    for hidden, rank in SHAPES:
        for rows in ROWS:
            h, v, u = random((rows, hidden), dtype), random((rank, hidden), dtype), random((hidden, rank), dtype)
            check(backend, h, v, u)
            check(backend, h, v, u, random((hidden,), dtype), 1e-5)


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    hidden=st.integers(1, 90),
    rank=st.integers(0, 90),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(backend, lead, hidden, rank, dtype, with_bias, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    h = random((*lead, hidden), torch.float64, generator).mul(scale).to(dtype)
    v, u = random((rank, hidden), dtype, generator), random((hidden, rank), dtype, generator)
    check(backend, h, v, u, random((hidden,), dtype, generator) if with_bias else None, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_strides(backend, dtype):
    v, u = random((12, 100), dtype)[:, 30:70], random((12, 40), dtype).T
    base = random((4, 6, 80), dtype)
    for h in (
        base[..., 5:45],
        base[..., ::2],
        base[:, :, :40].transpose(0, 1),
        base[:, -1:, :40],
        base[::3, 0, :40],
        random((1, 40), dtype).expand(5, 40),
        random((80,), dtype)[::2],
    ):
        check(backend, h, v, u, random((80,), dtype)[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_zero_hidden_states(backend, dtype):
    # eps alone keeps the norm finite: the result is the bias
    h, v, u, bias = (
        torch.zeros(2, 16, dtype=dtype),
        random((4, 16), dtype),
        random((16, 4), dtype),
        random((16,), dtype),
    )
    with using(backend):
        assert torch.equal(low_rank_bridge(h, v, u, bias), bias.expand(2, 16))


@pytest.mark.parametrize("backend", cpu_backends())
def test_large_fp16_activations_do_not_overflow(backend):
    # massive activations: squares overflow fp16 by far, and the mean must be taken in fp32
    h = random((2, 64), torch.float16) * 200
    h[0, 3] = 30000.0
    check(backend, h, random((8, 64), torch.float16) / 8, random((64, 8), torch.float16))


@pytest.mark.parametrize("backend", cpu_backends())
def test_returns_a_new_tensor(backend):
    h = random((3, 9), torch.float32)
    before = h.clone()
    with using(backend):
        y = low_rank_bridge(h, torch.zeros(0, 9), torch.zeros(9, 0))
    assert torch.equal(y, before)
    y += 1
    assert torch.equal(h, before)


BAD = {
    "v's width": ({"v": torch.zeros(2, 9)}, ValueError, r"v \(2, 9\).*hidden = 8"),
    "u's shape": ({"u": torch.zeros(9, 2)}, ValueError, r"u \(9, 2\) must be \[hidden, rank\] = \(8, 2\)"),
    "v's dimensions": ({"v": torch.zeros(8)}, ValueError, r"v must have 2 dimensions"),
    "h's dimensions": ({"h": torch.zeros(())}, ValueError, r"h must be"),
    "bias": ({"bias": torch.zeros(2)}, ValueError, r"bias \(2,\) must be \[hidden\] = \(8,\)"),
    "mixed dtypes": ({"v": torch.zeros(2, 8).bfloat16()}, TypeError, r"v has dtype torch.bfloat16"),
    "integers": ({"h": torch.zeros(3, 8).long()}, TypeError, r"h has dtype torch.int64"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_messages(case):
    change, error, message = BAD[case]
    arguments = {"h": torch.zeros(3, 8), "v": torch.zeros(2, 8), "u": torch.zeros(8, 2), "bias": None, **change}
    with pytest.raises(error, match=message):
        low_rank_bridge(**arguments)
