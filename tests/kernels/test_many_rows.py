"""The CPU kernels for many rows of bfloat16 (csrc/cpu/many_rows.inl), beyond what the op tests' grid reaches."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_within, bound, bridge_exact, linear_exact, mlp_bound, mlp_exact, random

from taco_kernels import (
    dispatch,
    low_rank_bridge,
    low_rank_linear,
    low_rank_linear_group,
    low_rank_mlp,
    native,
    use_backend,
)
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear, pivoted_low_rank_linear_reference

NAME = "avx512bf16"
if native.module is None or NAME not in native.module.cpu_isas():
    pytest.skip(f"this CPU has no {NAME}, or the extension is not built", allow_module_level=True)

BF16 = torch.bfloat16


def rounded(exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> torch.Tensor:
    """The bound of so many rows that the intermediate is rounded."""
    rows = (17, exact.shape[-1])
    extra = bound(exact.new_zeros(rows), exact.new_ones(rows), terms, BF16, "cpp")
    plain = bound(exact.new_zeros((1, 1)), exact.new_ones((1, 1)), terms, BF16, "cpp")
    return bound(exact, magnitude, terms, BF16, "cpp") + (extra[0, 0] - plain[0, 0]) * magnitude


# a lone row in the last group, whole groups, all numbers of groups in a block, uneven blocks
ROWS = [17, 32, 33, 48, 49, 64, 65, 80, 97, 129, 300]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", [(70, 33, 95), (31, 1, 1), (1, 64, 32), (129, 17, 37), (256, 96, 64)], ids=str)
def test_any_number_of_rows(sizes: tuple[int, int, int], rows: int) -> None:
    width, rank, out = sizes
    x, v, u = random((rows, width), BF16), random((rank, width), BF16), random((out, rank), BF16)
    bias, residual = random((out,), BF16), random((rows, out), BF16)
    for more in ((None, None), (bias, None), (None, residual), (bias, residual)):
        with use_backend("cpp"):
            y = low_rank_linear(x, v, u, *more)
        exact, magnitude = linear_exact(x, v, u, *more)
        assert_within(y, exact, bound(exact, magnitude, width + rank, BF16, "cpp"))


@pytest.mark.parametrize("rows", [5, 8, 9, 15, 16])
@pytest.mark.parametrize("sizes", [(70, 256, 95), (1, 300, 64), (401, 257, 38)], ids=str)
def test_fewer_rows_of_large_ranks(sizes: tuple[int, int, int], rows: int) -> None:
    width, rank, out = sizes
    x, v, u = random((rows, width), BF16), random((rank, width), BF16), random((out, rank), BF16)
    bias, residual = random((out,), BF16), random((rows, out), BF16)
    with use_backend("cpp"):
        y = low_rank_linear(x, v, u, bias, residual)
        few = low_rank_linear(x[:4], v, u, bias, residual[:4])  # whose intermediate is not rounded
    exact, magnitude = linear_exact(x, v, u, bias, residual)
    assert_within(y, exact, rounded(exact, magnitude, width + rank))
    assert_within(few, exact[:4], bound(exact[:4], magnitude[:4], width + rank, BF16, "cpp"))
    with use_backend("cpp"):
        assert torch.equal(low_rank_linear(x[rows - 5 :], v, u, bias, residual[rows - 5 :]), y[rows - 5 :])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes", [(6144, 40, 50), (6145, 33, 41), (12289, 20, 7), (40, 6145, 30), (9, 13000, 5)], ids=str
)
def test_more_columns_than_go_through_at_once(sizes: tuple[int, int, int], threads: int) -> None:
    """Sums wait between blocks of columns, of either product, in several maps at once; threads share each."""
    width, rank, out = sizes
    x = random((49, width), BF16)
    maps = [(random((r, width), BF16), random((o, r), BF16)) for r, o in ((rank, out), (19, 23), (rank, 2))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("cpp"):
            found = low_rank_linear_group(x, *zip(*maps, strict=True))
    finally:
        torch.set_num_threads(before)
    for y, (v, u) in zip(found, maps, strict=True):
        exact, magnitude = linear_exact(x, v, u, None, None)
        assert_within(y, exact, bound(exact, magnitude, width + v.shape[0], BF16, "cpp"))


def test_threads_do_not_change_a_bit() -> None:
    x, v, u = random((100, 700), BF16), random((301, 700), BF16), random((515, 301), BF16)
    bias, residual = random((515,), BF16), random((100, 515), BF16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with use_backend("cpp"):
                found.append(low_rank_linear(x, v, u, bias, residual))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("rows", [17, 64, 130])
def test_bridge_and_pivot(rows: int) -> None:
    h, v, u, bias = random((rows, 90), BF16), random((35, 90), BF16), random((90, 35), BF16), random((90,), BF16)
    with use_backend("cpp"):
        y = low_rank_bridge(h, v, u, bias, 1e-5)
    exact, magnitude = bridge_exact(h, v, u, bias, 1e-5)
    assert_within(y, exact, bound(exact, magnitude, 2 * 90 + 35, BF16, "cpp"))

    pivot = torch.randperm(90).int()
    v, u = random((35, 55), BF16), random((61, 35), BF16)
    residual = random((rows, 61), BF16)
    with use_backend("cpp"):
        y = pivoted_low_rank_linear(h, v, u, pivot, None, residual)
    wide = [t.double() for t in (h, v, u)]
    exact = pivoted_low_rank_linear_reference(*wide, pivot, None, residual.double())
    magnitude = pivoted_low_rank_linear_reference(*[t.abs() for t in wide], pivot, None, residual.double().abs())
    assert_within(y, exact, bound(exact, magnitude, 90 + 35, BF16, "cpp"))


@pytest.mark.parametrize("rows, rank", [(5, 130), (9, 40), (70, 600)])
def test_an_mlp_is_composed_of_its_maps(rows: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_many_rows", True)
    x = random((rows, 90), BF16) / 4
    gate, up = ((random((rank, 90), BF16) / 16, random((110, rank), BF16) / 16, None) for _ in range(2))
    down = (random((rank, 110), BF16) / 16, random((90, rank), BF16) / 16, None)  # no bias: it would hide the rest
    with use_backend(None):
        y = low_rank_mlp(x, gate, up, down)
    exact = mlp_exact(x, gate, up, down, "silu")
    assert_within(y, exact, mlp_bound(x, gate, up, down, "silu", "library"))
    with use_backend("cpp"):
        fused = low_rank_mlp(x, gate, up, down)
    assert not torch.equal(y, fused)  # another way of rounding: it did not go through the kernel for a whole MLP


def test_strides_and_what_lies_beyond() -> None:
    """Windows of tensors that are NaN everywhere else: nothing of it comes in, nothing outside y is written."""
    rows, width, rank, out = 37, 45, 21, 39

    def window(height: int, across: int) -> torch.Tensor:
        whole = torch.full((height + 2, across + 5), float("nan"), dtype=BF16)
        whole[1:-1, 2 : 2 + across] = random((height, across), BF16)
        return whole[1:-1, 2 : 2 + across]

    x, v, u, residual = window(rows, width), window(rank, width), window(out, rank), window(rows, out)
    with use_backend("cpp"):
        y = low_rank_linear(x, v, u, None, residual)
    exact, magnitude = linear_exact(x, v, u, None, residual)
    assert_within(y, exact, bound(exact, magnitude, width + rank, BF16, "cpp"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x, v, u = random((50, 64), BF16), random((32, 64), BF16), random((48, 32), BF16)
    with use_backend("cpp"):
        clean = low_rank_linear(x, v, u)
        x[20, 3] = value
        y = low_rank_linear(x, v, u)
    others = torch.arange(50) != 20
    assert torch.equal(y[others], clean[others]) and not torch.isfinite(y[20]).any()


def test_dispatch_goes_by_rank_where_there_are_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(rows: int, rank: int, dtype: torch.dtype = BF16) -> str:
        return dispatch.choose("cpu", dtype, rows, rank=rank)

    monkeypatch.setattr(dispatch, "_many_rows", True)
    for rows, rank, backend in (
        (16, 64, "cpp"), (17, 64, "library"), (64, 256, "cpp"), (65, 256, "library"), (256, 768, "cpp"),
        (257, 768, "library"), (10**6, 1280, "cpp"),
    ):  # fmt: skip
        assert chosen(rows, rank) == backend
    assert chosen(65, 4096, torch.float32) == "library"
    monkeypatch.setattr(dispatch, "_many_rows", False)
    assert chosen(17, 4096) == "library"
