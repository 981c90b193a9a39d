"""randomized_svd against float64 SVDs: known spectra, shapes, weights, precisions, batches, tolerances, mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import taco_kernels
from taco_kernels import randomized_svd
from taco_kernels.randomized_svd import randomized_svd_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def with_spectrum(rows: int, columns: int, values: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    count = len(values)
    left = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64)).Q
    return ((left * values.double()) @ right.T).to(dtype)


def check(found, exact: torch.Tensor, rank: int, over: float = 1.01) -> None:
    """Shapes, orthonormality, singular values and error of a result for the float64 matrix ``exact``.

    ``over`` is what the error may be of the optimal one. Roundoff: results are sums of at most ``width`` products of
    unit vectors in their own dtype, and the matrix enters with one rounding per product.
    """
    u, s, vh = (t.double() for t in found)
    rows, columns = exact.shape
    assert u.shape == (rows, rank) and s.shape == (rank,) and vh.shape == (rank, columns)
    assert all(bool(torch.isfinite(t).all()) for t in (u, s, vh))
    eps = torch.finfo(found[1].dtype).eps
    width = min(rank + max(32, rank // 8), rows, columns)
    slack = 4 * width**0.5 * eps
    eye = torch.eye(rank, dtype=torch.float64)
    assert float((u.T @ u - eye).abs().max()) <= slack
    assert float((vh @ vh.T - eye).abs().max()) <= slack
    assert bool((s[1:] <= s[:-1]).all()) and bool((s >= 0).all())
    sigma = torch.linalg.svdvals(exact)
    norm, largest = float(sigma.norm()), float(sigma[0])
    rounding = 4 * (rows + columns) ** 0.5 * eps * largest
    # A projection never makes a singular value larger.
    assert bool((s <= sigma[:rank] + rounding).all())
    error = float(torch.linalg.matrix_norm(exact - (u * s) @ vh))
    best = float(sigma[rank:].norm())
    # rounding errors point anywhere, so they add to the rest by squares
    assert error <= math.hypot(over * best, rank**0.5 * rounding), f"{error / best:.4f} times the optimal error"
    # What the singular values hold is what the error lacks.
    assert abs(error**2 + float(s.square().sum()) - norm**2) <= 2 * rank**0.5 * rounding * norm + 1e-300


# --- spectra and shapes ----------------------------------------------------------------------------------------------

SPECTRA = {
    "flat": torch.ones(120),
    "exponential": torch.exp(-torch.arange(120) / 6.0),
    "step": torch.cat([torch.ones(30), 1e-3 * torch.ones(90)]),
    "step at the rank": torch.cat([torch.ones(20), 1e-2 * torch.ones(100)]),
    "twelve decades": torch.logspace(0, -12, 120),
    "power law": (torch.arange(120) + 1.0) ** -1.0,
    "rank 7": torch.cat([torch.linspace(1, 2, 7).flip(0), torch.zeros(113)]),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(119)]),
    "zero": torch.zeros(120),
}


@pytest.mark.parametrize("power_dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(name, dtype, power_dtype):
    a = with_spectrum(150, 190, SPECTRA[name], dtype)
    check(randomized_svd(a, 20, power_dtype=power_dtype), a.double(), 20)


@pytest.mark.parametrize("head, scale", [(10, 3e-3), (1, 1e-3), (30, 3e-3)])
def test_directions_below_the_roundoff_of_low_precision(head, scale):
    """A slowly falling tail far below the head: iterations in bfloat16 would see roundoff there, and must notice."""
    tail = scale * (torch.arange(300 - head) + 1.0) ** -0.4
    a = with_spectrum(400, 320, torch.cat([torch.ones(head), tail]), torch.float32)
    for power_dtype in (torch.bfloat16, torch.float32):
        check(randomized_svd(a, 60, power_dtype=power_dtype), a.double(), 60, over=1.013)


@pytest.mark.parametrize(
    "rows, columns, rank, oversample",
    [
        (1, 1, 1, 16), (1, 9, 1, 16), (9, 1, 1, 0), (5, 5, 5, 16), (40, 7, 7, 3), (600, 33, 20, 5), (33, 600, 20, 5),
        (129, 65, 48, 16), (64, 64, 48, 16), (513, 1025, 10, 16), (900, 50, 30, 16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(rows, columns, rank, oversample, dtype):
    a = torch.randn(rows, columns).to(dtype)
    # pure noise has the flattest spectrum there is
    check(randomized_svd(a, rank, oversample), a.double(), rank, over=1.03)


# `usual` is beyond the 90th percentile of error over optimal error, as 300 draws of matrix and sketch had it (1.06 and
# at most 2.02); without power iterations their medians were 1.15 and 12.
@pytest.mark.parametrize(("rows", "columns", "rank", "usual"), [(7, 40, 3, 1.07), (128, 128, 127, 2.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_oversampling(rows, columns, rank, usual, dtype):
    """Nothing bounds the error of one sketch then (Halko et al., section 10.2, needs two vectors more).

    So the median of 25 is told: above a bound that one draw in ten exceeds it comes once in six million runs.
    """
    ratios = []
    for _ in range(25):
        a = torch.randn(rows, columns).to(dtype)
        u, s, vh = found = randomized_svd(a, rank, 0)
        check(found, a.double(), rank, over=math.inf)
        error = torch.linalg.matrix_norm(a.double() - (u.double() * s.double()) @ vh.double())
        ratios.append(float(error / torch.linalg.svdvals(a.double())[rank:].norm()))
    assert sorted(ratios)[12] <= usual


@pytest.mark.parametrize("iterations, over", [(0, 1.3), (1, 1.05), (2, 1.02), (5, 1.005)])
def test_power_iterations_bring_the_error_down(iterations, over):
    a = with_spectrum(400, 300, (torch.arange(300) + 1.0) ** -0.5, torch.float32)
    check(randomized_svd(a, 40, 10, power_iters=iterations), a.double(), 40, over)


def test_strides_and_views():
    a = with_spectrum(90, 120, (torch.arange(90) + 1.0) ** -1.0, torch.float32)
    big = torch.zeros(200, 250)
    big[10:190:2, 7:247:2] = a
    seeded = [randomized_svd(t, 12, generator=torch.Generator().manual_seed(1)) for t in (a, big[10:190:2, 7:247:2])]
    for x, y in zip(*seeded, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    check(randomized_svd(a.T.contiguous().T, 12), a.double(), 12)
    check(randomized_svd(a.T, 12), a.double().T, 12)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100, 2.0**126, 1e-44])
def test_entries_of_any_size(scale):
    a = with_spectrum(60, 80, torch.linspace(1, 0.1, 60), torch.float32)
    found = randomized_svd(a * scale, 10, generator=torch.Generator().manual_seed(3))
    assert bool(torch.isfinite(found.S).all())
    if scale > 1e-40:  # powers of two change nothing but the exponent
        plain = randomized_svd(a, 10, generator=torch.Generator().manual_seed(3))
        assert torch.equal(found.S, plain.S * scale)
        torch.testing.assert_close(found.U, plain.U, rtol=1e-3, atol=1e-4)
    else:
        exact = torch.linalg.svdvals((a * scale).double())[:10]
        assert float((found.S.double() - exact).abs().max()) <= 60 * 1.5e-45


# --- weights ---------------------------------------------------------------------------------------------------------


def weight(kind: str, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "diagonal":
        return torch.exp(torch.randn(size)).to(dtype)
    moment = torch.randn(size, 3 * size, dtype=torch.float64) * torch.exp(torch.randn(size, 1, dtype=torch.float64))
    if kind == "cholesky":
        return torch.linalg.cholesky(moment @ moment.T / (3 * size)).to(dtype)
    return (moment[:, : size + 5] / size**0.5).to(dtype)  # rectangular


@pytest.mark.parametrize("power_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right", ["none", "diagonal", "cholesky", "matrix"])
@pytest.mark.parametrize("left", ["none", "diagonal", "cholesky", "matrix"])
def test_weighted(left, right, power_dtype):
    a = with_spectrum(130, 100, (torch.arange(100) + 1.0) ** -0.7, torch.float32)
    lw, rw = weight(left, 130), weight(right, 100)
    if left == "matrix":
        lw = lw.T  # [rows, 130]
    exact = a.double()
    for w, side in ((lw, "left"), (rw, "right")):
        if w is not None:
            w = torch.diag(w.double()) if w.dim() == 1 else w.double()
            exact = w @ exact if side == "left" else exact @ w
    found = randomized_svd(a, 25, left=lw, right=rw, power_dtype=power_dtype)
    check(found, exact, 25, over=1.02)
    reference = randomized_svd_reference(a, 25, lw, rw)
    torch.testing.assert_close(reference.S, torch.linalg.svdvals(exact)[:25])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(dtype):
    a = with_spectrum(80, 60, (torch.arange(60) + 1.0) ** -1.0, dtype)
    lw, rw = weight("cholesky", 80, torch.float32), weight("diagonal", 60, torch.float16)
    found = randomized_svd(a, 10, left=lw, right=rw)
    assert found.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(found, lw.double() @ a.double() * rw.double(), 10, over=1.02)


def test_ill_conditioned_weights():
    """Whitening by second moments over ten decades: the products in low precision are mostly roundoff."""
    a = torch.randn(140, 120, dtype=torch.float64)
    lw = with_spectrum(140, 140, torch.logspace(2, -4, 140))
    rw = with_spectrum(120, 120, torch.logspace(1, -3, 120))
    exact = lw @ a @ rw
    for power_dtype in (None, torch.float32, torch.bfloat16):
        check(randomized_svd(a, 30, left=lw, right=rw, power_dtype=power_dtype), exact, 30)
        found = randomized_svd(a.float(), 30, left=lw.float(), right=rw.float(), power_dtype=power_dtype)
        check(found, lw.float().double() @ a.float().double() @ rw.float().double(), 30, over=1.02)


@pytest.mark.parametrize("power_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", [8000.0, 1.0 / 8000.0])
def test_products_far_from_one(entry, power_dtype):
    """Each factor is of an ordinary size; the squares of the product's norm are outside float32."""
    a, lw, rw = (torch.full((300, 300), entry) * (1 + 0.1 * torch.rand(300, 300)) for _ in range(3))
    found = randomized_svd(a, 4, left=lw, right=rw, power_dtype=power_dtype)
    exact = torch.linalg.svdvals(lw.double() @ a.double() @ rw.double())
    assert all(bool(torch.isfinite(t).all()) for t in found)
    assert abs(float(found.S[0]) / float(exact[0]) - 1) < 1e-5


def test_weights_that_cancel():
    """R removes what dominates A: M itself is harmless, but products in bfloat16 consist of A's roundoff."""
    a = with_spectrum(400, 320, 1e-3 * (torch.arange(320) + 1.0) ** -0.4)
    v = torch.linalg.qr(torch.randn(320, 1, dtype=torch.float64)).Q
    a = (a + torch.randn(400, 1).double() @ v.T).float()
    rw = (torch.eye(320).double() - v @ v.T).float()
    exact = a.double() @ rw.double()
    for power_dtype in (torch.bfloat16, torch.float32):
        u, s, vh = (t.double() for t in randomized_svd(a, 60, right=rw, power_dtype=power_dtype))
        error = float(torch.linalg.matrix_norm(exact - (u * s) @ vh))
        assert error <= 1.02 * float(torch.linalg.svdvals(exact)[60:].norm())


def test_the_product_is_never_formed(monkeypatch):
    from taco_kernels.svd.operand import Operand

    monkeypatch.setattr(Operand, "panel", lambda *_: pytest.fail("L A R was formed"))
    a = torch.randn(100, 90)
    randomized_svd(a, 20, left=torch.randn(100, 100), right=torch.rand(90))
    with pytest.raises(pytest.fail.Exception):
        randomized_svd(a, 90)


# --- batches, seeds, surroundings ------------------------------------------------------------------------------------


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_batch_is_its_matrices():
    a = torch.randn(2, 3, 70, 50)
    rw, lw = torch.rand(50), torch.randn(2, 3, 60, 70)
    whole = randomized_svd(a, 9, left=lw, right=rw, generator=seeded())
    assert whole.U.shape == (2, 3, 60, 9) and whole.S.shape == (2, 3, 9) and whole.Vh.shape == (2, 3, 9, 50)
    for i in range(2):
        for j in range(3):
            one = randomized_svd(a[i, j], 9, left=lw[i, j], right=rw, generator=seeded())
            for x, y in zip(whole, one, strict=True):
                torch.testing.assert_close(x[i, j], y, rtol=1e-4, atol=1e-5)
    listed = randomized_svd(list(a[1]), 9, left=list(lw[1]), right=[rw] * 3, generator=seeded())
    for x, y in zip(listed, whole, strict=True):
        torch.testing.assert_close(x, y[1], rtol=1e-4, atol=1e-5)
    dense = randomized_svd(a, 50)
    assert dense.U.shape == (2, 3, 70, 50)
    torch.testing.assert_close(dense.S, torch.linalg.svdvals(a), rtol=1e-4, atol=1e-4)


def test_reproducible():
    a = torch.randn(120, 130)
    first = randomized_svd(a, 10, generator=seeded())
    assert all(torch.equal(x, y) for x, y in zip(first, randomized_svd(a, 10, generator=seeded()), strict=True))
    assert not torch.equal(first.U, randomized_svd(a, 10, generator=seeded(6)).U)
    torch.manual_seed(1)
    one, two = randomized_svd(a, 10), randomized_svd(a, 10)
    assert not torch.equal(one.U, two.U)
    torch.manual_seed(1)
    assert torch.equal(one.U, randomized_svd(a, 10).U)
    with taco_kernels.use_backend("reference"):
        assert all(torch.equal(x, y) for x, y in zip(first, randomized_svd(a, 10, generator=seeded()), strict=True))


def test_surroundings_do_not_matter():
    a = torch.randn(90, 80, requires_grad=True)
    plain = randomized_svd(a, 8, generator=seeded())
    assert not plain.U.requires_grad
    with torch.inference_mode():
        inside = randomized_svd(a, 8, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = randomized_svd(a, 8, generator=seeded())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        medium = randomized_svd(a, 8, generator=seeded())
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ValueError, match="NaN"):
            randomized_svd(a * math.nan, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for other in (inside, cast, medium):
        assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this torch has no precision setting per backend",
)
def test_precision_settings_per_backend():
    """Both kinds of setting at once make torch's common getter raise; ours must not care."""
    a = torch.randn(300, 400)
    plain = randomized_svd(a, 20, generator=seeded())
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        other = randomized_svd(a, 20, generator=seeded())
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


# --- tolerance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 1e-4, 2e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tolerance(dtype, tolerance, weighted):
    a = with_spectrum(200, 150, torch.exp(-torch.arange(150) / 9.0), dtype)
    lw, rw = (weight("cholesky", 200), weight("diagonal", 150)) if weighted else (None, None)
    exact = a.double() if lw is None or rw is None else lw.double() @ a.double() * rw.double()
    found = randomized_svd(a, None, left=lw, right=rw, tolerance=tolerance)
    u, s, vh = (t.double() for t in found)
    norm = float(torch.linalg.matrix_norm(exact))
    error = float(torch.linalg.matrix_norm(exact - (u * s) @ vh))
    assert error * (1 - 1e-12) <= found.error_bound <= tolerance * norm * (1 + 1e-6)
    assert found.error_bound <= error + 1e-9 * norm  # and it is not a loose one
    tails = torch.linalg.svdvals(exact).square().flip(0).cumsum(0).flip(0).sqrt()
    needed = int((tails > tolerance * norm).sum())
    assert needed <= len(s) <= max(needed + 2, math.ceil(1.05 * needed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["rows", "diagonal", "columns"])
def test_tolerance_of_matrices_with_rows_of_zeros(dtype, where):
    """A basis as large as what there is cannot grow: what rounding leaves is no direction."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(300, 400, generator=generator, dtype=dtype)
    live = torch.zeros(300, dtype=dtype)
    live[::3] = 1
    weighted = a * live[:, None]
    given = {"rows": (weighted, {}), "diagonal": (a, {"left": live}), "columns": (weighted.T.contiguous(), {})}[where]
    for tolerance in (0.05, 1e-3):
        found = randomized_svd(given[0], None, tolerance=tolerance, generator=generator, **given[1])
        assert found.error_bound <= tolerance * float(weighted.double().norm()) and len(found.S) <= 100
        for side in (found.U.T @ found.U, found.Vh @ found.Vh.T):
            assert float((side - torch.eye(len(found.S), dtype=side.dtype)).abs().max()) < 1e3 * torch.finfo(dtype).eps
        expected = torch.linalg.svdvals(weighted)[0]
        assert float(found.S[0]) == pytest.approx(float(expected), rel=1e-4)


def test_another_default_device():
    a = torch.randn(200, 300)
    expected = randomized_svd(a, 20, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        found = randomized_svd(a, 20, generator=torch.Generator(device="cpu").manual_seed(1))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_weights_of_several_dtypes_are_named():
    a = [torch.randn(30, 40) for _ in range(2)]
    with pytest.raises(TypeError, match="all of left must have one dtype"):
        randomized_svd(a, 5, left=[torch.ones(30), torch.ones(30, dtype=torch.float64)])


def test_nothing_between_weights_is_nothing():
    found = randomized_svd(torch.empty(0, 7), 3, left=torch.empty(5, 0))
    assert found.S.tolist() == [0, 0, 0] and found.U.shape == (5, 3)


def test_tolerance_that_the_limit_does_not_reach():
    a = torch.randn(100, 100)
    found = randomized_svd(a, 20, tolerance=0.1)
    assert found.S.shape == (20,)
    assert found.error_bound > 0.1 * float(a.norm())
    assert found.error_bound >= float((a - (found.U * found.S) @ found.Vh).double().norm()) * (1 - 1e-6)
    assert randomized_svd(a, 20).error_bound is None


def test_tolerance_of_degenerate_matrices():
    zero = randomized_svd(torch.zeros(20, 30), None, tolerance=0.1)
    assert zero.S.shape == (1,) and float(zero.S) == 0.0 and zero.error_bound == 0.0
    rank_two = with_spectrum(60, 50, torch.tensor([3.0, 1.0]), torch.float32)
    found = randomized_svd(rank_two, None, tolerance=1e-5)
    assert found.S.shape == (2,)
    assert found.error_bound <= 1e-5 * float(rank_two.norm())
    scaled = randomized_svd(rank_two * 2.0**90, None, tolerance=1e-5)
    assert scaled.S.shape == (2,) and scaled.error_bound <= 1e-5 * float(rank_two.norm()) * 2.0**90


@pytest.mark.parametrize("size", [1e-45, 1e-43, 1e-40, 1e36])
def test_tolerance_at_the_ends_of_the_range(size):
    """The bound is that of the numbers returned: subnormal singular values have lost digits."""
    a = torch.randn(60, 5) @ torch.randn(5, 40) * size
    found = randomized_svd(a, None, tolerance=1e-4)
    # near one, so that squares stay in float64's range; exactly
    exact, s, bound = a.double() * 2.0**100, found.S.double() * 2.0**100, found.error_bound * 2.0**100
    assert float(torch.linalg.matrix_norm(exact - (found.U.double() * s) @ found.Vh.double())) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("tolerance", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_beyond_the_range(dtype, tolerance):
    """Exponents of three factors add up to what no power of two of the dtype can be; the singular values still may."""
    tiny, huge = 2.0 ** (-700 if dtype == torch.float64 else -100), 2.0 ** (700 if dtype == torch.float64 else 100)
    a, lw, rw = (torch.randn(40, 40, dtype=dtype) for _ in range(3))
    exact = randomized_svd(a, 3, left=lw, right=rw, tolerance=tolerance)
    for sizes, expected in (((huge, huge, huge), float("inf")), ((tiny, tiny, tiny), 0.0), ((tiny, huge, 1.0), None)):
        factors = (t * size for t, size in zip((a, lw, rw), sizes, strict=True))
        found = randomized_svd(next(factors), 3, left=next(factors), right=next(factors), tolerance=tolerance)
        if expected is None:
            torch.testing.assert_close(found.S, exact.S)
        else:
            assert found.S.tolist() == [expected] * len(found.S)
            # nothing less bounds the distance from infinite values
            assert tolerance is None or expected == 0 or found.error_bound == expected
    # the largest of these is outside the range, the other is not
    root = 2.0 ** (516 if dtype == torch.float64 else 67)
    steep = torch.diag(torch.tensor([1.0, 2.0**-10], dtype=dtype)) * root
    found = randomized_svd(steep, 2, left=steep)
    assert found.S[0] == float("inf") and abs(float(found.S[1]) / root / root * 2.0**20 - 1) < 0.1


# --- trained weights -------------------------------------------------------------------------------------------------


def test_trained_weights():
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    folder = Path(__file__).resolve().parents[2] / "python" / "taco_svd" / "data" / "classics-16l"
    tensors = safetensors.load_file(folder / "model.safetensors")
    names = [name for name, t in tensors.items() if t.dim() == 2 and ".layers." in name]
    assert len(names) > 50
    worst = 0.0
    for name in names[::9]:
        a = tensors[name]
        sigma = torch.linalg.svdvals(a.double())
        for rank in (max(1, min(a.shape) // 10), min(a.shape) // 3):
            for power_dtype in (None, torch.bfloat16):
                u, s, vh = (t.double() for t in randomized_svd(a, rank, power_dtype=power_dtype))
                error = float(torch.linalg.matrix_norm(a.double() - (u * s) @ vh))
                worst = max(worst, error / float(sigma[rank:].norm()))
    # 1% is the promise; shifted iterations do better, and unshifted ones would miss this
    assert 1.0 - 1e-6 <= worst <= 1.006


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "left", "right"])
def test_nan_and_infinity_are_named(where, value):
    given = {"a": torch.randn(20, 30), "left": torch.randn(20, 20), "right": torch.rand(30)}
    given[where].view(-1)[7] = value
    for rank in (5, 20):
        with pytest.raises(ValueError, match=f"{where} holds a NaN or an infinity"):
            randomized_svd(given["a"], rank, left=given["left"], right=given["right"])
    with pytest.raises(ValueError, match=f"{where} holds a NaN or an infinity"):
        randomized_svd(given["a"], None, left=given["left"], right=given["right"], tolerance=0.1)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "a has dtype torch.int64", {"a": torch.ones(4, 5, dtype=torch.int64)}),
        (TypeError, "left has dtype torch.complex64", {"left": torch.ones(4, dtype=torch.complex64)}),
        (TypeError, "power_dtype", {"power_dtype": torch.int8}),
        (TypeError, "power_dtype", {"power_dtype": torch.float16}),
        (ValueError, r"must be \[..., m, n\]", {"a": torch.ones(4)}),
        (ValueError, "empty list", {"a": []}),
        (ValueError, "no matrix in it", {"a": torch.ones(0, 4, 5)}),
        (ValueError, "must agree in shape", {"a": [torch.ones(4, 5), torch.ones(5, 4)]}),
        (ValueError, "rank must be 1 to 4", {"rank": 5}),
        (ValueError, "rank must be 1 to 4", {"rank": 0}),
        (ValueError, "rank must be 1 to 4", {"rank": None}),
        (ValueError, "rank must be 1 to 0", {"a": torch.ones(0, 5)}),
        (ValueError, "rank must be 1 to 2", {"rank": 3, "right": torch.ones(5, 2)}),
        (ValueError, r"left \(5,\) must be \[4\] or \[any, 4\]", {"left": torch.ones(5)}),
        (ValueError, r"right \(4, 5\) must be \[5\] or \[5, any\]", {"right": torch.ones(4, 5)}),
        (ValueError, "must have 1 or 2", {"right": torch.ones(1, 1, 5, 5)}),
        (ValueError, "holds 2 weights for 1", {"left": [torch.ones(4)] * 2}),
        (ValueError, "one shape", {"a": torch.ones(2, 4, 5), "left": [torch.ones(4), torch.ones(4, 4)]}),
        (ValueError, "cannot be negative", {"oversample": -1}),
        (ValueError, "cannot be negative", {"power_iters": -1}),
        (ValueError, "tolerance must be", {"tolerance": 0.0}),
        (ValueError, "tolerance must be", {"tolerance": math.nan}),
        (ValueError, "tolerance must be", {"tolerance": 1.0}),
        (ValueError, "one matrix at a time", {"a": torch.ones(2, 4, 5), "tolerance": 0.1}),
    ],
)  # fmt: skip
def test_mistakes(error, message, change):
    with pytest.raises(error, match=message):
        randomized_svd(**{"a": torch.ones(4, 5), "rank": 2, **change})
