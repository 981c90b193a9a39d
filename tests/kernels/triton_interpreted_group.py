"""Triton kernels of several members, of the gated MLP and of transposed factors, under the interpreter.

Not collected by itself: ``test_triton_interpreted.py`` runs it in a process with ``TRITON_INTERPRET=1``.
"""

import sys

import gradient_bounds
import pytest
import torch
from gradient_bounds import assert_gradients_within, known
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, bound, linear_exact, mlp_bound, mlp_exact, random
from test_low_rank_mlp import draw

import taco_kernels
from taco_kernels.low_rank_mlp import ACTIVATIONS
from taco_kernels.triton_kernels.config import Config, default_config
from taco_kernels.triton_kernels.low_rank_linear import low_rank_linear
from taco_kernels.triton_kernels.low_rank_linear_group import low_rank_linear_group
from taco_kernels.triton_kernels.low_rank_mlp import low_rank_mlp

CONFIGS = {
    "row": Config("row", 1, 16, 32, 3, 4, 2, 16, 16, 4, 2),
    "row-unsplit": Config("row", 1, 4, 64, 1, 4, 2, 8, 64, 4, 1),
    "split": Config("split", 16, 16, 32, 5, 4, 2, 32, 16, 4, 2),
    "split-persistent": Config("split", 16, 16, 32, 3, 4, 2, 32, 16, 4, 2, persistent=1),
    "gemm": Config("gemm", 32, 32, 32, 1, 4, 2, 32, 32, 4, 2),
    "gemm-split": Config("gemm", 16, 16, 16, 4, 4, 2, 16, 16, 4, 2),
    "gemm-persistent": Config("gemm", 16, 16, 16, 3, 4, 2, 16, 16, 4, 2, persistent=2),
    "fused": Config("fused", 16, 64, 32, 1, 4, 2, 16, 16, 4, 2, 3),
}
# (in, [(rank, out)]): alike members, grouped-query attention, odd sizes, more than one launch takes, nothing to sum
GROUPS = [
    (64, [(32, 48), (32, 48)]),
    (48, [(32, 64), (16, 16), (16, 16)]),
    (37, [(19, 41), (1, 1), (33, 7)]),
    (20, [(3, 5), (1, 1), (0, 4), (17, 2), (8, 8), (5, 31)]),
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Whatever ``torch.empty`` returns is full of NaN, so that an unwritten or over-read element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def members(in_size, sizes, dtype, pad=0, generator=None):
    def matrix(rows, columns):
        return random((rows, columns + pad), dtype, generator)[:, :columns]

    vs = [matrix(rank, in_size) * in_size**-0.5 for rank, _ in sizes]
    us = [matrix(out, rank) * max(rank, 1) ** -0.5 for rank, out in sizes]
    return vs, us, [random((out,), dtype, generator) for _, out in sizes]


def check_group(ys, x, vs, us, biases):
    assert len(ys) == len(vs)
    for y, v, u, bias in zip(ys, vs, us, biases, strict=True):
        assert y.is_contiguous()
        exact, magnitude = linear_exact(x, v, u, bias, None)
        assert_within(y, exact, bound(exact, magnitude, x.shape[1] + v.shape[0], x.dtype, "library"))


def turns(name):
    """dtypes in an order that differs from one configuration to the next: all pairs, without all triples."""
    first = list(CONFIGS).index(name)
    return (DTYPES * 3)[first % 3 :]


@pytest.mark.parametrize("name", CONFIGS)
def test_group(name):
    for i, ((in_size, sizes), dtype) in enumerate(zip(GROUPS, turns(name), strict=False)):
        vs, us, biases = members(in_size, sizes, dtype, pad=3)
        rows = 1 if name.startswith("row") else 19 if i == 0 else 3
        x = random((rows, in_size + 2), dtype)[:, :in_size]
        chosen = [bias if i != 2 and (i == 0 or j % 2) else None for j, bias in enumerate(biases)]
        ys = low_rank_linear_group(x, vs, us, chosen, config=CONFIGS[name])
        check_group(ys, x, vs, us, chosen)
        if i == 0:
            again = low_rank_linear_group(x, vs, us, chosen, config=CONFIGS[name])
            assert all(torch.equal(a, b) for a, b in zip(ys, again, strict=True)), "same input, other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "fused"])
def test_group_is_its_members(name, dtype):
    """One launch for all must give each member the bits that it gets alone: the order of every sum is the same."""
    vs, us, biases = members(48, [(32, 64), (17, 16), (16, 33)], dtype)
    x = random((1 if name.startswith("row") else 5, 48), dtype)
    together = low_rank_linear_group(x, vs, us, biases, config=CONFIGS[name])
    for y, v, u, bias in zip(together, vs, us, biases, strict=True):
        assert torch.equal(y, low_rank_linear(x, v, u, bias, config=CONFIGS[name]))


MLPS = [
    (64, (32, 32, 16), 48, 64, (True, True)),
    (33, (5, 17, 40), 91, 33, (False, False)),
    (7, (3, 0, 2), 5, 9, (True, True)),
    (40, (16, 8, 24), 30, 16, (True, False)),
]  # in, ranks, width, out, which of gate and up have a bias


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "fused"])
def test_mlp(name):
    config = CONFIGS[name]
    for i, (act, dtype) in enumerate(zip(ACTIVATIONS, turns(name), strict=False)):
        in_size, ranks, width, out_size, biases = MLPS[i]
        x = random((1 if name.startswith("row") else 19 if i == 0 else 3, in_size), dtype)
        *sides, down = draw(in_size, ranks, width, out_size, dtype)
        gate, up = ((v, u, bias if has else None) for (v, u, bias), has in zip(sides, biases, strict=True))
        y = low_rank_mlp(x, gate, up, down, act, config=config, down_config=config)
        assert_within(y, mlp_exact(x, gate, up, down, act), mlp_bound(x, gate, up, down, act, "triton"))


sizes = st.integers(1, 70) | st.sampled_from([16, 32, 64, 96])
shared = {
    "rows": st.integers(1, 20) | st.integers(21, 70), "in_size": sizes, "dtype": st.sampled_from(DTYPES),
    "pad": st.integers(0, 2), "seed": st.integers(0, 2**31), "with_bias": st.booleans(),
}  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(groups=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5), **shared)
@example(rows=17, in_size=1, dtype=torch.bfloat16, pad=0, seed=0, with_bias=True, groups=[(1, 1), (1, 1)])
@example(rows=1, in_size=700, dtype=torch.float16, pad=0, seed=0, with_bias=False, groups=[(40, 5), (3, 9)])
def test_group_with_default_configurations(rows, in_size, dtype, pad, seed, with_bias, groups):
    generator = torch.Generator().manual_seed(seed)
    vs, us, biases = members(in_size, groups, dtype, pad, generator)
    x = random((rows, in_size + pad), dtype, generator)[:, :in_size]
    biases = biases if with_bias else [None] * len(groups)
    check_group(low_rank_linear_group(x, vs, us, biases), x, vs, us, biases)


@settings(max_examples=25, deadline=None)
@given(ranks=st.tuples(sizes, sizes, sizes), width=sizes, act=st.sampled_from(list(ACTIVATIONS)), **shared)
@example(16, 513, torch.bfloat16, 0, 1, True, (17, 33, 5), 40, "silu")
def test_mlp_with_default_configurations(rows, in_size, dtype, pad, seed, with_bias, ranks, width, act):
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = draw(in_size, ranks, width, in_size, dtype, generator, with_bias)
    x = random((rows, in_size + pad), dtype, generator)[:, :in_size]
    y = low_rank_mlp(x, gate, up, down, act)
    assert_within(y, mlp_exact(x, gate, up, down, act), mlp_bound(x, gate, up, down, act, "triton"))


@settings(max_examples=25, deadline=None)
@given(out_size=sizes, rank=sizes, transposed=st.tuples(st.booleans(), st.booleans()), **shared)
def test_transposed_factors_with_default_configurations(
    rows, in_size, out_size, rank, dtype, pad, seed, with_bias, transposed
):
    """The gradient towards x is such a call: factors that are views of the other one's transpose."""
    generator = torch.Generator().manual_seed(seed)

    def factor(rows, columns, turned):
        if turned:
            return random((columns, rows + pad), dtype, generator)[:, :rows].T * columns**-0.5
        return random((rows, columns + pad), dtype, generator)[:, :columns] * columns**-0.5

    x = random((rows, in_size), dtype, generator)
    v, u = factor(rank, in_size, transposed[0]), factor(out_size, rank, transposed[1])
    bias = random((out_size,), dtype, generator) if with_bias else None
    check_group([low_rank_linear(x, v, u, bias)], x, [v], [u], [bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_transposed_factors_are_not_copied(name, dtype, monkeypatch):
    x = random((1 if name.startswith("row") else 19, 50), dtype)
    v, u = random((50, 40), dtype).T * 0.1, random((40, 30), dtype).T * 0.1
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("a factor was copied"))
    y = low_rank_linear(x, v, u, config=CONFIGS[name])
    monkeypatch.undo()
    check_group([y], x, [v], [u], [None])


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_towards_the_input(rows, dtype, monkeypatch):
    """Where the factors are frozen, dX = (dY U) V runs in the forward kernels, which read the factors as they lie."""
    calls = []
    launch = sys.modules["taco_kernels.triton_kernels.low_rank_linear"].low_rank
    record = lambda *a, **k: calls.append([t.stride() for t in a[2][0][:2]]) or launch(*a, **k)  # noqa: E731
    monkeypatch.setattr(sys.modules["taco_kernels.triton_kernels.low_rank_linear"], "low_rank", record)
    x = random((rows, 40), dtype).requires_grad_()
    v, u = random((24, 40), dtype) * 0.2, random((33, 24), dtype) * 0.2
    grad = random((rows, 33), dtype)
    with taco_kernels.use_backend("triton"):
        (actual,) = torch.autograd.grad(taco_kernels.low_rank_linear(x, v, u), x, grad)
    assert calls == [[(40, 1), (24, 1)], [(1, 24), (1, 40)]]
    exact, magnitude = linear_exact(grad, u.T, v.T, None, None)
    assert_within(actual, exact, bound(exact, magnitude, 33 + 24, dtype, "library"))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_op(dtype, frozen):
    """Against the reference's gradients in float64: the backward pass of each op, on the Triton backend."""
    gate, up, down = draw(24, (8, 5, 9), 20, 24, dtype)
    x = random((5, 24), dtype)
    bridge = draw(24, (8, 1, 1), 24, 1, dtype)[0]

    def results(x, *factors):
        sides = [factors[:3], factors[3:6], factors[6:9], factors[9:12]]
        yield taco_kernels.low_rank_mlp(x, *sides[:3])
        yield torch.cat(taco_kernels.low_rank_linear_group(x, *zip(*sides[:2], strict=True)), dim=1)
        yield taco_kernels.low_rank_bridge(x, *sides[3])

    factors = (*gate, *up, *down, *bridge)
    leaves = [t.detach().requires_grad_(i == 0 or not frozen) for i, t in enumerate((x, *factors))]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    with taco_kernels.use_backend("triton"):
        actual = list(results(*leaves))
    exact = list(results(*wide))
    ops = (
        (gradient_bounds.mlp, range(10)),
        (gradient_bounds.group, range(7)),
        (gradient_bounds.bridge, (0, 10, 11, 12)),
    )
    for a, e, (op, mine) in zip(actual, exact, ops, strict=True):
        weight = random(a.shape, dtype)
        wanted = [i for i in mine if leaves[i].requires_grad]
        with taco_kernels.use_backend("triton"):
            got = torch.autograd.grad(a, [leaves[i] for i in wanted], weight)
        want = torch.autograd.grad(e, [wide[i] for i in wanted], weight.double())
        _, pull = op(*(known(leaves[i]) for i in mine))
        bounds = dict(zip(mine, pull(known(weight)), strict=True))
        assert_gradients_within(got, want, [bounds[i] for i in wanted])


def test_default_configurations_fuse_no_gate():
    for rows in (1, 16, 64, 8192):
        config = default_config(rows, 4096, 2 * 11008, 128, 2, 132, gated=True)
        assert config.path != "fused"
    assert default_config(8192, 4096, 11008, 128, 2, 132).path == "fused"


def test_no_rows():
    vs, us, biases = members(8, [(2, 4), (3, 5)], torch.float32)
    assert [y.shape for y in low_rank_linear_group(torch.zeros(0, 8), vs, us, biases)] == [(0, 4), (0, 5)]
    gate, up, down = draw(8, (2, 3, 2), 5, 8, torch.float32)
    assert low_rank_mlp(torch.zeros(0, 8), gate, up, down, "relu").shape == (0, 8)
