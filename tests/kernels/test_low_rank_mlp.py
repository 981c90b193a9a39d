"""low_rank_mlp on every CPU backend against float64, errors within what its roundings explain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_within, cpu_backends, mlp_bound, mlp_exact, random, using

from taco_kernels import low_rank_mlp
from taco_kernels.low_rank_mlp import ACTIVATIONS

# in, ranks of gate, up and down, width, out
SIZES = [
    (64, (32, 32, 16), 96, 64),
    (33, (5, 17, 40), 91, 33),
    (1, (1, 1, 1), 1, 1),
    (7, (3, 0, 2), 5, 9),
    (12, (4, 6, 0), 8, 3),
]


def draw(in_size, ranks, width, out, dtype, generator=None, bias=True):
    def projection(rank, columns, rows):
        v = random((rank, columns), dtype, generator) * max(columns, 1) ** -0.5
        u = random((rows, rank), dtype, generator) * max(rank, 1) ** -0.5
        return v, u, random((rows,), dtype, generator) if bias else None

    gate, up = (projection(rank, in_size, width) for rank in ranks[:2])
    return gate, up, projection(ranks[2], width, out)


def check(backend, x, gate, up, down, act):
    with using(backend):
        y = low_rank_mlp(x, gate, up, down, act)
    assert y.dtype == x.dtype and y.is_contiguous()
    exact = mlp_exact(x, gate, up, down, act)
    assert_within(y, exact, mlp_bound(x, gate, up, down, act, backend))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_matches_float64(backend, dtype, act):
    for sizes in SIZES:
        for lead in ((0,), (1,), (2, 3), (17,), (70,), ()):
            x = random((*lead, sizes[0]), dtype)
            check(backend, x, *draw(*sizes, dtype), act)
            check(backend, x, *draw(*sizes, dtype, bias=False), act)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", cpu_backends())
def test_gates_at_the_ends_of_the_range(backend, dtype, act):
    """The activation of a gate alone, against torch's: an error bound that grows with the gate would hide anything."""
    gates = [-3e38, -1e38, -1e30, -1e4, 1e4, 1e30, 3e38, float("inf"), float("-inf"), float("nan")]
    bias = torch.tensor(2 * gates, dtype=dtype)  # 20: whole vectors and a rest
    nothing, size = torch.zeros((1, 1), dtype=dtype), len(bias)
    projections = (nothing, torch.zeros((size, 1), dtype=dtype))
    for i, gate in enumerate(bias.tolist()):
        alone = torch.zeros_like(bias)
        alone[i] = gate
        one = torch.ones((1, 1), dtype=dtype)
        with using(backend):
            y = low_rank_mlp(
                nothing,
                (*projections, alone),
                (*projections, torch.ones_like(bias)),
                (torch.ones((1, size), dtype=dtype), one, None),
                act,
            )
        # torch's own gelu of 3e38 is infinite in a whole vector of AVX-512, and is not alone
        expected = ACTIVATIONS[act](alone[i]) if backend.startswith("cpp") else ACTIVATIONS[act](alone)[i]
        torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    sizes=st.tuples(st.integers(1, 60), st.tuples(*[st.integers(0, 40)] * 3), st.integers(1, 60), st.integers(1, 60)),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(list(ACTIVATIONS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_sizes(backend, rows, sizes, dtype, act, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x = random((rows, sizes[0]), dtype, generator)
    check(backend, x, *draw(*sizes, dtype, generator, bias), act)


def test_gate_and_up_are_not_the_same_thing():
    """The activation belongs to the gate: swapping the two must change the result."""
    x = random((3, 33), torch.float32)
    gate, up, down = draw(33, (5, 5, 9), 21, 33, torch.float32)
    assert not torch.allclose(low_rank_mlp(x, gate, up, down), low_rank_mlp(x, up, gate, down))


def _without(projection, position, value):
    return tuple(value if i == position else t for i, t in enumerate(projection))


BAD = {
    "activation": ({"act": "swish"}, ValueError, "act is 'swish'; choose one of silu, gelu_tanh, gelu, relu"),
    "gate's v": ({"gate": (0, torch.zeros(2, 9))}, ValueError, r"gate_v \(2, 9\).*in = 8"),
    "up's width": ({"up": (1, torch.zeros(5, 2))}, ValueError, r"up_u \(5, 2\) must have as many rows as gate_u"),
    "down's v": ({"down": (0, torch.zeros(2, 7))}, ValueError, r"down_v \(2, 7\).*width = 6"),
    "down's bias": ({"down": (2, torch.zeros(6))}, ValueError, r"down_bias \(6,\) must be \[out\] = \(8,\)"),
    "dtype": ({"up": (0, torch.zeros(2, 8).half())}, TypeError, r"up_v has dtype torch.float16"),
    "down's dtype": ({"down": (1, torch.zeros(8, 2).half())}, TypeError, r"down_u has dtype torch.float16"),
    "a vector": ({"gate": (1, torch.zeros(6))}, ValueError, "gate_u must have 2 dimensions"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_messages(case):
    change, error, message = BAD[case]
    arguments = {
        "gate": (torch.zeros(2, 8), torch.zeros(6, 2), None),
        "up": (torch.zeros(2, 8), torch.zeros(6, 2), None),
        "down": (torch.zeros(2, 6), torch.zeros(8, 2), None),
        "act": "silu",
    }
    for name, value in change.items():
        arguments[name] = value if name == "act" else _without(arguments[name], *value)
    with pytest.raises(error, match=message):
        low_rank_mlp(torch.zeros(3, 8), **arguments)
