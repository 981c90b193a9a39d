"""The CPU kernels' products for up to 16 rows, and beside them (csrc/cpu/few_rows.inl, staged.inl, panel.inl)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DTYPES, assert_within, bound, bridge_exact, linear_exact, pivoted_exact, random, using, window

from taco_kernels import low_rank_bridge, low_rank_linear, low_rank_linear_group, native
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear

pytestmark = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")
ISAS = [] if native.module is None else native.module.cpu_isas()
# (in, rank, out): fewer columns than a broadcast brings, odd ends of it, of a tile and of its half, a rank on either
# side of where small ones are handled otherwise (128, and 160 for x), and shares of threads that begin within a
# neighbourhood
SIZES = [(3, 1, 2), (7, 0, 5), (70, 6, 9), (65, 33, 17), (40, 127, 31), (129, 128, 24), (33, 301, 40), (600, 258, 700)]
SIZES += [(0, 160, 3), (1, 161, 2), (2, 170, 19), (67, 175, 1), (133, 160, 16), (1030, 163, 6)]


@pytest.fixture(params=ISAS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(f"cpp:{request.param}"):
        yield f"cpp:{request.param}"


@pytest.mark.parametrize("rows", range(3, 19))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(backend: str, dtype: torch.dtype, rows: int) -> None:
    for width, rank, out in SIZES:
        x, v, u = random((rows, width), dtype), random((rank, width), dtype), random((out, rank), dtype)
        bias, residual = random((out,), dtype), random((rows, out), dtype)
        for more in ((None, None), (bias, residual)):
            exact, magnitude = linear_exact(x, v, u, *more)
            assert_within(low_rank_linear(x, v, u, *more), exact, bound(exact, magnitude, width + rank, dtype, backend))


@pytest.mark.parametrize("rows", [5, 8, 9, 11, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_pivot(backend: str, dtype: torch.dtype, rows: int) -> None:
    for width, rank in ((90, 135), (91, 187)):
        h, bias = random((rows, width), dtype), random((width,), dtype)
        v, u = random((rank, width), dtype), random((width, rank), dtype)
        exact, magnitude = bridge_exact(h, v, u, bias, 1e-5)
        y = low_rank_bridge(h, v, u, bias, 1e-5)
        assert_within(y, exact, bound(exact, magnitude, 2 * width + rank, dtype, backend))

    for width, rank in ((90, 37), (261, 163)):
        h, pivot, residual = random((rows, width), dtype), torch.randperm(width).int(), random((rows, 61), dtype)
        v, u = random((rank, width - rank), dtype), random((61, rank), dtype)
        y = pivoted_low_rank_linear(h, v, u, pivot, None, residual)
        exact, magnitude = pivoted_exact(h, v, u, pivot, residual)
        assert_within(y, exact, bound(exact, magnitude, width + rank, dtype, backend))


@pytest.mark.parametrize("rows", [5, 8, 9, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_company_do_not_change_a_bit(backend: str, dtype: torch.dtype, rows: int) -> None:
    x = random((rows, 700), dtype)
    maps = [
        (random((rank, 700), dtype), random((out, rank), dtype)) for rank, out in ((301, 515), (40, 77), (129, 300))
    ]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(low_rank_linear_group(x, *zip(*maps, strict=True)))
    finally:
        torch.set_num_threads(before)
    alone = [low_rank_linear(x, v, u) for v, u in maps]
    for group in found:
        assert all(torch.equal(y, other) for y, other in zip(group, alone, strict=True))


@pytest.mark.parametrize("rows", [6, 8, 13])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_what_lies_beyond(backend: str, dtype: torch.dtype, rows: int) -> None:
    """Windows of tensors that are NaN everywhere else: nothing of it comes in, nothing outside y is written."""
    for width, rank, out in ((45, 131, 39), (45, 171, 39), (3, 165, 18)):
        sizes = (rows, width), (rank, width), (out, rank), (rows, out)
        x, v, u, residual = (window(*size, dtype) for size in sizes)
        exact, magnitude = linear_exact(x, v, u, None, residual)
        y = low_rank_linear(x, v, u, None, residual)
        assert_within(y, exact, bound(exact, magnitude, width + rank, dtype, backend))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [7, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(backend: str, dtype: torch.dtype, rows: int, value: float) -> None:
    for rank in (33, 165):
        x, v, u = random((rows, 64), dtype), random((rank, 64), dtype), random((48, rank), dtype)
        clean = low_rank_linear(x, v, u)
        x[2, 3] = value
        y = low_rank_linear(x, v, u)
        others = torch.arange(rows) != 2
        assert torch.equal(y[others], clean[others]) and not torch.isfinite(y[2]).any()
