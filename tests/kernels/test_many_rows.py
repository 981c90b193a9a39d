"""The CPU kernels for many rows (csrc/cpu/many_rows*.inl), beyond what the op tests' grid reaches."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    ascending,
    assert_within,
    bound,
    bridge_exact,
    linear_exact,
    mlp_bound,
    mlp_exact,
    pivoted_exact,
    random,
    using,
    window,
)

from taco_kernels import (
    dispatch,
    low_rank_bridge,
    low_rank_linear,
    low_rank_linear_group,
    low_rank_mlp,
    native,
    use_backend,
)
from taco_kernels.low_rank_mlp import _compute
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear

BF16 = torch.bfloat16
KERNELS = [("avx512bf16", BF16), ("avx2", torch.float32), ("avx2", torch.float16), ("avx2", BF16)]
HERE = [] if native.module is None else [kind for kind in KERNELS if kind[0] in native.module.cpu_isas()]
if not HERE:
    pytest.skip("this CPU has no kernels for many rows, or the extension is not built", allow_module_level=True)


@pytest.fixture(params=HERE, ids=lambda kind: f"{kind[0]}-{str(kind[1]).removeprefix('torch.')}")
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.dtype]]:
    """Instruction set and dtype; the C++ backend is forced."""
    isa, dtype = request.param
    with using(f"cpp:{isa}"):
        yield isa, dtype


@pytest.fixture
def dtype(kind: tuple[str, torch.dtype]) -> torch.dtype:
    return kind[1]


def test_where_they_begin(kind: tuple[str, torch.dtype]) -> None:
    isa, dtype = kind
    code = dispatch.CPP_DTYPES[dtype]
    assert native.module.cpu_many_rows_from(code) == {"avx512bf16": 17, "avx2": 3}[isa]
    native.module.set_cpu_isa("baseline")
    assert native.module.cpu_many_rows_from(code) == 2**63 - 1


# a lone row in the last group, whole groups, all numbers of groups in a block, uneven blocks
ROWS = [3, 4, 5, 8, 11, 12, 13, 16, 17, 32, 33, 48, 49, 64, 65, 80, 97, 129, 300]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "sizes", [(70, 33, 95), (31, 1, 1), (1, 64, 32), (129, 17, 37), (256, 96, 64), (75, 195, 50)], ids=str
)
def test_any_number_of_rows(sizes: tuple[int, int, int], rows: int, dtype: torch.dtype) -> None:
    width, rank, out = sizes
    x, v, u = random((rows, width), dtype), random((rank, width), dtype), random((out, rank), dtype)
    bias, residual = random((out,), dtype), random((rows, out), dtype)
    for more in ((None, None), (bias, None), (None, residual), (bias, residual)):
        y = low_rank_linear(x, v, u, *more)
        exact, magnitude = linear_exact(x, v, u, *more)
        assert_within(y, exact, bound(exact, magnitude, width + rank, dtype, "cpp"))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        (1024, 40, 50),
        (1025, 65, 41),
        (6144, 40, 50),
        (6145, 33, 41),
        (12289, 20, 7),
        (40, 6145, 30),
        (9, 13000, 5),
        (2100, 210, 21),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "rows", [9, 14, 49]
)  # one group of rows, and several, take different numbers of columns at once
def test_more_columns_than_go_through_at_once(
    rows: int, sizes: tuple[int, int, int], threads: int, dtype: torch.dtype
) -> None:
    """Sums wait between blocks of columns, of either product, in several maps at once; threads share each."""
    width, rank, out = sizes
    x = random((rows, width), dtype)
    maps = [(random((r, width), dtype), random((o, r), dtype)) for r, o in ((rank, out), (19, 23), (rank, 2))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = low_rank_linear_group(x, *zip(*maps, strict=True))
    finally:
        torch.set_num_threads(before)
    for y, (v, u) in zip(found, maps, strict=True):
        exact, magnitude = linear_exact(x, v, u, None, None)
        assert_within(y, exact, bound(exact, magnitude, width + v.shape[0], dtype, "cpp"))


# pieces of columns of other lengths than the one before, and runs and tiles of weight rows that end early
@pytest.mark.parametrize("width", [15, 128, 136, 250, 272, 656, 1000])
@pytest.mark.parametrize("rank", [5, 6, 11, 95, 96, 97, 192, 203])
def test_pieces_and_tiles_that_end_early(width: int, rank: int, dtype: torch.dtype) -> None:
    for rows in (7, 15, 40):
        x, v, u = random((rows, width), dtype), random((rank, width), dtype), random((width, rank), dtype)
        exact, magnitude = linear_exact(x, v, u, None, None)
        assert_within(low_rank_linear(x, v, u), exact, bound(exact, magnitude, width + rank, dtype, "cpp"))


@pytest.mark.parametrize("rows", [6, 16, 31])
def test_nothing_comes_from_an_earlier_call(rows: int, dtype: torch.dtype) -> None:
    """What fills vectors up in the shared work space may be anything there, a nan for one."""
    v, u = random((197, 90), dtype), random((50, 197), dtype)
    x = random((rows, 90), dtype)
    before = low_rank_linear(x, v, u)
    wide = torch.full((64, 4000), float("nan"), dtype=dtype)
    assert low_rank_linear(wide, random((300, 4000), dtype), random((300, 300), dtype)).isnan().all()
    assert torch.equal(low_rank_linear(x, v, u), before)


@pytest.mark.parametrize("rows", [5, 12, 63, 100, 161, 256, 300])
def test_threads_do_not_change_a_bit(rows: int, dtype: torch.dtype) -> None:
    """Blocks of rows go through by one thread each, or by all together, and in blocks of other sizes."""
    x, v, u = random((rows, 700), dtype), random((301, 700), dtype), random((515, 301), dtype)
    bias, residual = random((515,), dtype), random((rows, 515), dtype)
    behind, pivot = random((301, 399), dtype), torch.randperm(700)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(
                [
                    low_rank_linear(x, v, u, bias, residual),
                    *low_rank_linear_group(x, [v, v[:50]], [u, u[:, :50]]),
                    pivoted_low_rank_linear(x, behind, u, pivot, bias, residual),
                    pivoted_low_rank_linear(x, behind, u, ascending(pivot, 301)),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows, width, rank", [(17, 90, 35), (200, 301, 150), (129, 64, 64), (97, 33, 1)])
@pytest.mark.parametrize("in_order", [False, True])
def test_gathered_on_the_way(
    in_order: bool, rows: int, width: int, rank: int, threads: int, dtype: torch.dtype
) -> None:
    """A pivot's inputs are gathered block by block, whatever its order and type, from rows with gaps between them."""
    x = random((rows, width + 5), dtype)[:, :width]
    pivot = torch.randperm(width)
    if in_order:
        pivot = ascending(pivot, rank)
    v, u, residual = random((rank, width - rank), dtype), random((61, rank), dtype), random((rows, 61), dtype)
    exact, magnitude = pivoted_exact(x, v, u, pivot, residual)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index in (pivot, pivot.int()):
            y = pivoted_low_rank_linear(x, v, u, index, None, residual)
            assert_within(y, exact, bound(exact, magnitude, width + rank, dtype, "cpp"))
        wrong = pivot.clone()
        wrong[width // 2] = width
        with pytest.raises(IndexError):
            pivoted_low_rank_linear(x, v, u, wrong)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [17, 64, 130])
def test_bridge_and_pivot(rows: int, dtype: torch.dtype) -> None:
    h, v, u, bias = random((rows, 90), dtype), random((35, 90), dtype), random((90, 35), dtype), random((90,), dtype)
    y = low_rank_bridge(h, v, u, bias, 1e-5)
    exact, magnitude = bridge_exact(h, v, u, bias, 1e-5)
    assert_within(y, exact, bound(exact, magnitude, 2 * 90 + 35, dtype, "cpp"))

    pivot = torch.randperm(90).int()
    v, u = random((35, 55), dtype), random((61, 35), dtype)
    residual = random((rows, 61), dtype)
    y = pivoted_low_rank_linear(h, v, u, pivot, None, residual)
    exact, magnitude = pivoted_exact(h, v, u, pivot, residual)
    assert_within(y, exact, bound(exact, magnitude, 90 + 35, dtype, "cpp"))


@pytest.mark.parametrize("rows, rank", [(5, 130), (9, 40), (13, 20), (70, 600)])
def test_an_mlp_is_composed_of_its_maps(
    rows: int, rank: int, kind: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    isa, dtype = kind
    begins = {"avx512bf16": ((0, 4, dispatch.ANY),), "avx2": ((0, 12, dispatch.ANY),)}[isa]
    monkeypatch.setattr(dispatch, "_many_rows", frozenset([dtype]))
    monkeypatch.setattr(importlib.import_module("taco_kernels.low_rank_mlp"), "COMPOSED_ROWS", begins)
    x = random((rows, 90), dtype) / 4
    gate, up = ((random((rank, 90), dtype) / 16, random((110, rank), dtype) / 16, None) for _ in range(2))
    down = (random((rank, 110), dtype) / 16, random((90, rank), dtype) / 16, None)  # no bias: it would hide the rest
    with use_backend(None):
        y = _compute(x, *gate, *up, *down, "silu")  # past the direct call, whose limits are those of this CPU
    exact = mlp_exact(x, gate, up, down, "silu")
    assert_within(y, exact, mlp_bound(x, gate, up, down, "silu", "library"))
    fused = low_rank_mlp(x, gate, up, down)
    composed = not dispatch.within(begins, 2 * rank, rows)
    if composed:  # another way of rounding: it did not go through the kernel for a whole MLP
        assert not torch.equal(y, fused)
    else:
        assert torch.equal(y, fused)


def test_strides_and_what_lies_beyond(dtype: torch.dtype) -> None:
    """Windows of tensors that are NaN everywhere else: nothing of it comes in, nothing outside y is written."""
    rows, width, rank, out = 37, 45, 21, 39

    sizes = (rows, width), (rank, width), (out, rank), (rows, out)
    x, v, u, residual = (window(*size, dtype) for size in sizes)
    y = low_rank_linear(x, v, u, None, residual)
    exact, magnitude = linear_exact(x, v, u, None, residual)
    assert_within(y, exact, bound(exact, magnitude, width + rank, dtype, "cpp"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float, dtype: torch.dtype) -> None:
    x, v, u = random((50, 64), dtype), random((32, 64), dtype), random((48, 32), dtype)
    clean = low_rank_linear(x, v, u)
    x[20, 3] = value
    y = low_rank_linear(x, v, u)
    others = torch.arange(50) != 20
    assert torch.equal(y[others], clean[others]) and not torch.isfinite(y[20]).any()


def test_dispatch_goes_by_rank_where_there_are_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(rows: int, rank: int, dtype: torch.dtype = BF16) -> str:
        return dispatch.choose("cpu", dtype, rows, rank=rank)

    limits = {torch.float32: 64, torch.float16: 2**62, BF16: 16}
    monkeypatch.setattr(dispatch, "CPU_MAX_ROWS", limits)
    monkeypatch.setattr(dispatch, "isa", "avx512bf16")
    monkeypatch.setattr(dispatch, "_many_rows", frozenset([BF16]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for rows, rank, backend in (
        (17, 16, "cpp"), (64, 64, "cpp"), (65, 64, "library"), (128, 128, "cpp"), (129, 128, "library"),
        (128, 192, "cpp"), (129, 192, "library"), (256, 768, "cpp"), (257, 768, "library"), (383, 1280, "library"),
        (384, 192, "cpp"), (10**6, 1280, "cpp"), (10**6, 128, "library"),
    ):  # fmt: skip
        assert chosen(rows, rank) == backend
    assert chosen(65, 4096, torch.float32) == "library"
    monkeypatch.setattr(dispatch, "_many_rows", frozenset())
    assert chosen(17, 4096) == "library"


def test_a_library_without_16_bit_products_serves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2: torch multiplies bfloat16 and float16 at a tenth of its float32 rate."""
    monkeypatch.setattr(dispatch, "isa", "avx2")
    monkeypatch.setattr(dispatch, "_many_rows", frozenset(dispatch.CPP_DTYPES))
    monkeypatch.setattr(dispatch, "CPU_MAX_ROWS", {torch.float32: 64, torch.float16: 2**62, BF16: 2**62})
    limits = dict(dispatch.MANY_ROWS)
    limits.pop("avx2", None)
    monkeypatch.setattr(dispatch, "MANY_ROWS", limits)

    def of_float32(rank: int) -> list[str]:
        return [dispatch.choose("cpu", torch.float32, rows, rank=rank) for rows in (64, 65)]

    for _ in range(2):
        assert {dispatch.choose("cpu", dtype, 4096, rank=64) for dtype in (BF16, torch.float16)} == {"cpp"}
        assert dispatch.choose("cpu", BF16, 4096, turned=True) == "library"
        assert of_float32(127) == ["cpp", "library"]
        # where MKL's own kernels are slow, as on AMD's cores, larger ranks are served whatever the number of rows
        assert of_float32(4096) == of_float32(128) == ["cpp", "cpp" if "avx2" in limits else "library"]
        limits["avx2"] = ((128, dispatch.ANY, dispatch.ANY),)


def test_what_this_cpu_is_taken_for() -> None:
    slow = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (dispatch.CPU_MAX_ROWS[BF16] > 16) == (slow and dispatch.isa != "baseline")
    assert dispatch.multiplies_many_rows(torch.float32) == (dispatch.isa == "avx2")
