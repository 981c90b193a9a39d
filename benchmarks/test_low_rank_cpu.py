"""CPU benchmarks of low_rank_linear and low_rank_bridge: against dense, against library calls, against memory.

    python -m pytest benchmarks [--full] [--benchmark-json out.json]

Every case first checks its result against float64 and fails, untimed, when it is wrong. Columns: ``us`` and its 20th
and 80th percentile; ``x library`` (two F.linear calls, with norm and addition for the bridge) and ``x dense``, medians
of interleaved pairs (above 1: we are faster); ``GB/s`` of weights, and ``of read``, the time that plain loads of as
many bytes out of memory take, as a share of ours, everything from Python on included.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu.timing import pairs_of, ratio, read_cold, spread

import taco_kernels
from taco_kernels import low_rank_bridge, low_rank_linear, native

pytestmark = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")

# (in, out) of Llama-2-7B's attention and MLP projections, and of the demo model
SHAPES = [(4096, 4096), (4096, 11008), (128, 128)]
RANKS = {4096: [64, 256, 1024], 128: [32]}
CASES = [(i, o, r, rows) for i, o in SHAPES for r in RANKS[i] for rows in (1, 2, 4, 8, 16, 64, 512)]
SHORT_ROWS = (1, 16)
ROUNDS = 40


def skip_long(config: pytest.Config, rows: int) -> None:
    if rows not in SHORT_ROWS and not config.getoption("--full"):
        pytest.skip("other rows than 1 and 16: with --full")


def check(actual: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, terms: int, one_rounding: bool) -> None:
    """No speed is reported for a wrong result: rounding errors of ``terms`` fp32 sums and one final rounding.

    Where two library calls answer, or the kernels for many rows, the intermediate is rounded as well.
    """
    eps = torch.finfo(actual.dtype).eps
    bound = (terms * torch.finfo(torch.float32).eps) * size + eps * (exact.abs() if one_rounding else size) + 1e-30
    error = (actual.double() - exact).abs()
    # What roundings could add up to at worst is more than a large result is; what they do add up to is a few roundings
    # of the whole: a missing column or a result of zeros is far beyond that.
    assert bool((error <= bound).all()) and float(error.norm()) <= 2 * eps * float(exact.norm()), "wrong: not timed"


def one_rounding(dtype: torch.dtype, rows: int) -> bool:
    """Whether rows are few enough for an intermediate in float32 (csrc/cpu/taco_cpu.h)."""
    return rows <= (4 if dtype == torch.bfloat16 else 16)


def measure(name, dtype, shape, rows, ours, library, dense, read, size):
    against_library = pairs_of(ours, library, ROUNDS)
    against_dense = pairs_of(ours, dense, ROUNDS // 2)
    against_read = pairs_of(ours, read, ROUNDS)
    mine = spread(against_library[0])
    return {
        "op": name,
        "dtype": str(dtype)[6:],
        "in x out": f"{shape[0]}x{shape[1]}",
        "rank": shape[2],
        "rows": rows,
        "us": f"{mine['p50']:.1f}",
        "p20..p80": f"{mine['p20']:.1f}..{mine['p80']:.1f}",
        "x library": f"{ratio(against_library):.2f}",
        "x dense": f"{ratio(against_dense):.2f}",
        "GB/s": f"{size / mine['p50'] / 1e3:.1f}",
        "of read": f"{ratio(against_read):.0%}",
    }


@pytest.mark.parametrize(("in_features", "out_features", "rank", "rows"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_rank_linear(benchmark, request, arenas, report, dtype, in_features, out_features, rank, rows):
    skip_long(request.config, rows)
    arena = arenas(dtype)
    pairs = arena.matrices((rank, in_features), (out_features, rank))
    weights = arena.matrices((out_features, in_features))
    x = torch.randn(rows, in_features).to(dtype)

    def ours(k):
        return low_rank_linear(x, *pairs[k % len(pairs)])

    def two_calls(k):
        v, u = pairs[k % len(pairs)]
        return F.linear(F.linear(x, v), u)

    def dense(k):
        return F.linear(x, weights[k % len(weights)][0])

    with torch.inference_mode(), taco_kernels.use_backend(None):
        v, u = (t.double() for t in pairs[0])
        wide = x.double()
        exact, magnitude = wide @ v.T @ u.T, wide.abs() @ v.abs().T @ u.abs().T
        check(ours(0), exact, magnitude, in_features + rank, one_rounding(dtype, rows))
        size = (in_features + out_features) * rank * dtype.itemsize
        shape = (in_features, out_features, rank)
        row = measure("linear", dtype, shape, rows, ours, two_calls, dense, read_cold(arena, size), size)
        report(row)
        benchmark.extra_info.update(row)
        calls = iter(range(10**9))
        benchmark.pedantic(lambda: ours(next(calls)), rounds=ROUNDS, iterations=1)


@pytest.mark.parametrize("rank", [64, 256, 1024])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_rank_bridge(benchmark, arenas, report, dtype, rows, rank):
    hidden = 4096
    arena = arenas(dtype)
    pairs = arena.matrices((rank, hidden), (hidden, rank))
    weights = arena.matrices((hidden, hidden))
    h, bias = torch.randn(rows, hidden).to(dtype), torch.randn(hidden).to(dtype)

    def ours(k):
        return low_rank_bridge(h, *pairs[k % len(pairs)], bias)

    def library(k):
        v, u = pairs[k % len(pairs)]
        return F.linear(F.linear(F.rms_norm(h, (hidden,), eps=1e-6), v), u, bias).add_(h)

    def dense(k):
        return F.linear(h, weights[k % len(weights)][0])

    with torch.inference_mode(), taco_kernels.use_backend(None):
        v, u = (t.double() for t in pairs[0])
        wide = h.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        exact = wide + normed @ v.T @ u.T + bias.double()
        magnitude = wide.abs() + normed.abs() @ v.abs().T @ u.abs().T + bias.double().abs()
        check(ours(0), exact, magnitude, 2 * hidden + rank, one_rounding(dtype, rows))
        size = 2 * hidden * rank * dtype.itemsize
        row = measure("bridge", dtype, (hidden, hidden, rank), rows, ours, library, dense, read_cold(arena, size), size)
        report(row)
        benchmark.extra_info.update(row)
        calls = iter(range(10**9))
        benchmark.pedantic(lambda: ours(next(calls)), rounds=ROUNDS, iterations=1)


def test_call_overhead(benchmark):
    """One eager call on sizes that cost nothing: Python, dispatcher and pybind11."""
    x, v, u = torch.randn(1, 8), torch.randn(4, 8), torch.randn(8, 4)
    with torch.inference_mode():
        benchmark(low_rank_linear, x, v, u)
