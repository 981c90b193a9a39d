"""low_rank_linear_group on every CPU backend against float64: members of different sizes, strides, biases, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, bound, cpu_backends, linear_exact, random, using

from taco_kernels import low_rank_linear_group
from taco_kernels.low_rank_linear_group import joined

# (in, [(rank, out), ...]): one member, q/k/v of grouped-query attention, gate/up, more members than one launch takes,
# ranks of 0 and odd sizes
GROUPS = [
    (33, [(16, 65)]),
    (64, [(32, 64), (16, 16), (16, 16)]),
    (37, [(24, 91), (40, 91)]),
    (20, [(3, 5), (1, 1), (0, 4), (17, 2), (8, 8), (5, 31)]),
    (1, [(1, 1), (2, 3)]),
    (0, [(2, 3), (1, 4)]),
]


def check(backend, x, vs, us, biases=None):
    with using(backend):
        ys = low_rank_linear_group(x, vs, us, biases)
    assert isinstance(ys, list) and len(ys) == len(vs)
    for i, y in enumerate(ys):
        assert y.dtype == x.dtype and y.is_contiguous()
        bias = biases[i] if biases is not None else None
        exact, magnitude = linear_exact(x, vs[i], us[i], bias, None)
        assert_within(y, exact, bound(exact, magnitude, x.shape[-1] + vs[i].shape[0], x.dtype, backend))
    return ys


def members(in_features, sizes, dtype, generator=None):
    vs = [random((rank, in_features), dtype, generator) for rank, _ in sizes]
    us = [random((out, rank), dtype, generator) for rank, out in sizes]
    return vs, us, [random((out,), dtype, generator) for _, out in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_matches_float64(backend, dtype):
    for in_features, sizes in GROUPS:
        for lead in ((0,), (1,), (2, 3), (17,), (70,), ()):
            vs, us, biases = members(in_features, sizes, dtype)
            x = random((*lead, in_features), dtype)
            check(backend, x, vs, us)
            check(backend, x, vs, us, biases)
            check(backend, x, vs, us, [b if i % 2 else None for i, b in enumerate(biases)])


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    in_features=st.integers(1, 70),
    sizes=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_sizes(backend, rows, in_features, sizes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    vs, us, biases = members(in_features, sizes, dtype, generator)
    check(backend, random((rows, in_features), dtype, generator), vs, us, biases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_slices_of_one_tensor_and_odd_strides(backend, dtype):
    ranks = [8, 3, 5]
    wide = random((16, 50), dtype)
    layouts = {
        "consecutive": wide[:, :40].split(ranks),
        "another order": wide[:, :40].split(ranks)[::-1],
        "a gap": (wide[:8, :40], wide[9:12, :40]),
        "the same twice": (wide[:8, :40], wide[:8, :40]),
        "every second column": tuple(v[:, ::2] for v in random((16, 80), dtype).split(ranks)),
        "transposed": random((40, 16), dtype).T.split(ranks),
    }
    x = random((6, 5, 80), dtype)[..., ::2]
    for vs in layouts.values():
        us = [random((v.shape[0], 11 + i), dtype).T for i, v in enumerate(vs)]
        check(backend, x, vs, us, [random((u.shape[0] * 2,), dtype)[::2] for u in us])


def test_joined_finds_exactly_the_consecutive_slices():
    wide = torch.randn(16, 50)
    parts = wide[:, 2:42].split([8, 3, 5])
    assert torch.equal(joined(parts), wide[:, 2:42])
    assert joined(parts[1:]).shape == (8, 40)
    assert joined([parts[0], parts[2]]) is None
    assert joined([parts[1], parts[0]]) is None
    assert joined([torch.randn(2, 4), torch.randn(2, 4)]) is None
    assert joined(torch.randn(40, 16).T.split([8, 8])) is None
    assert joined([wide[:0, :40], wide[:8, :40]]) is None


BAD = {
    "no members": ({"vs": [], "us": [], "biases": []}, ValueError, "0 vs, 0 us and 0 biases"),
    "lengths": ({"us": [torch.zeros(4, 2)]}, ValueError, "2 vs, 1 us and 2 biases; there must be equally many"),
    "second v": ({"vs": [torch.zeros(2, 8), torch.zeros(3, 9)]}, ValueError, r"vs\[1\] \(3, 9\).*in = 8"),
    "second u": ({"us": [torch.zeros(4, 2), torch.zeros(5, 2)]}, ValueError, r"us\[1\] \(5, 2\).*rank = 3"),
    "bias": ({"biases": [None, torch.zeros(4)]}, ValueError, r"biases\[1\] \(4,\) must be \[out\] = \(5,\)"),
    "dtype": ({"us": [torch.zeros(4, 2), torch.zeros(5, 3).half()]}, TypeError, r"us\[1\] has dtype torch.float16"),
    "integers": ({"x": torch.zeros(3, 8).int()}, TypeError, "x has dtype torch.int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_messages(case):
    change, error, message = BAD[case]
    arguments = {
        "x": torch.zeros(3, 8), "vs": [torch.zeros(2, 8), torch.zeros(3, 8)],
        "us": [torch.zeros(4, 2), torch.zeros(5, 3)], "biases": [None, None],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        low_rank_linear_group(**{**arguments, **change})
