"""The steps of randomized_svd one by one: sketch, products, orthonormal bases, small problem, certificate."""

from __future__ import annotations

import pytest
import torch

import taco_kernels
from taco_kernels import native
from taco_kernels.svd import orthonormal, sketch
from taco_kernels.svd.adaptive import certified_error
from taco_kernels.svd.factorise import small_svd
from taco_kernels.svd.operand import Operand, product
from taco_kernels.svd.orthonormal import condition, orthonormalise

EPS = torch.finfo(torch.float32).eps
SEED = 0xFEDCBA9876543210
WINDOWS = [
    ((0, 1), (0, 1)),
    ((0, 7), (0, 511)),
    ((3, 20), (512, 2000)),
    ((1000, 1003), (1024, 1536)),
    ((0, 5), (0, 33)),
]


# --- sketch ----------------------------------------------------------------------------------------------------------


def test_philox_is_philox():
    """The generator's published known answers (Random123's kat_vectors: philox4x32, 10 rounds)."""
    zero = torch.tensor([0])
    assert [int(w) for w in sketch.philox_reference(zero, zero, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")
@pytest.mark.parametrize("vectors, entries", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_extension_and_reference_make_the_same_bits(vectors, entries, dtype):
    for seed in (0, 1, SEED, 2**64 - 1):
        expected = sketch.fill_reference(vectors, entries, seed, dtype, "cpu")
        assert torch.equal(sketch.fill(vectors, entries, seed, dtype, "cpu"), expected)
        # exact in every dtype, so products in different precisions see the same test vectors
        assert torch.equal(expected.double(), sketch.fill_reference(vectors, entries, seed, torch.float64, "cpu"))


def test_a_window_is_a_window():
    whole = sketch.fill((0, 40), (0, 1500), SEED, torch.float32, "cpu")
    assert torch.equal(sketch.fill((7, 31), (512, 1400), SEED, torch.float32, "cpu"), whole[7:31, 512:1400])
    with taco_kernels.use_backend("reference"):
        assert torch.equal(sketch.fill((0, 40), (0, 1500), SEED, torch.float32, "cpu"), whole)
    with pytest.raises(ValueError, match="multiple of 512"):
        sketch.fill((0, 1), (31, 60), SEED, torch.float32, "cpu")


def test_numbers_look_random():
    x = sketch.fill((0, 256), (0, 4096), 7, torch.float64, "cpu")
    count = x.numel()
    # five standard deviations each: mean, variance (fourth moment of the uniform: 9/5 sigma^4), correlations
    assert abs(float(x.mean())) < 5 * (sketch.VARIANCE / count) ** 0.5
    assert abs(float(x.square().mean()) / sketch.VARIANCE - 1) < 5 * (0.8 / count) ** 0.5
    for gram, terms in ((x @ x.T, 4096), (x.T[:256] @ x[:, :256], 256)):
        correlation = gram / terms / sketch.VARIANCE
        correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < 6 / terms**0.5
    assert len(x.unique()) == 256
    assert not torch.equal(x, sketch.fill((0, 256), (0, 4096), 8, torch.float64, "cpu"))


def test_seed_follows_the_generator():
    seeds = [sketch.draw_seed(torch.Generator().manual_seed(n)) for n in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    torch.manual_seed(3)
    first, second = sketch.draw_seed(None), sketch.draw_seed(None)
    torch.manual_seed(3)
    assert sketch.draw_seed(None) == first != second
    assert max(first, second) >= 2**32, "the upper half of the seed is unused"


# --- products --------------------------------------------------------------------------------------------------------


def _weights(kind: str, size: int, side: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "diagonal":
        return torch.rand(size) + 0.5
    shape = (size + 3, size) if side == "left" else (size, size - 2)
    return torch.randn(shape) / size**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("right", ["none", "diagonal", "matrix"])
@pytest.mark.parametrize("left", ["none", "diagonal", "matrix"])
def test_products_with_the_operand(monkeypatch, left, right, dtype):
    monkeypatch.setattr("taco_kernels.svd.operand._PANEL_BYTES", 20_000)  # several panels
    a = torch.randn(90, 1301, dtype=torch.float64).to(dtype)
    lw, rw = _weights(left, 90, "left"), _weights(right, 1301, "right")
    m = Operand(a, lw, rw, torch.bfloat16)
    exact, size = a.double(), a.double().abs()
    for w, side in ((lw, 0), (rw, 1)):
        if w is not None:
            w = torch.diag(w.double()) if w.dim() == 1 else w.double()
            exact, size = (w @ exact, w.abs() @ size) if side == 0 else (exact @ w, size @ w.abs())
    assert (m.rows, m.columns) == exact.shape
    panels = torch.cat([m.panel(begin, end, torch.float64) for begin, end in m.panels()])
    torch.testing.assert_close(panels, exact, rtol=1e-12, atol=1e-12)
    eps = torch.finfo(m.dtype).eps
    terms = 90 + 2 * 1301
    x, y = torch.randn(5, m.columns, dtype=m.dtype), torch.randn(5, m.rows, dtype=m.dtype)
    omega = sketch.fill_reference((2, 7), (0, m.columns), SEED, torch.float64, "cpu")
    for got, vectors, matrix, magnitude in (
        (m.forward(x), x, exact.T, size.T),
        (m.backward(y), y, exact, size),
        (m.sketch((2, 7), SEED), omega, exact.T, size.T),
    ):
        bound = terms * eps * (vectors.double().abs() @ magnitude)
        assert got.dtype == m.dtype
        assert bool(((got.double() - vectors.double() @ matrix).abs() <= bound).all())
    # Low precision: each factor and each intermediate result rounded to bfloat16.
    for got, vectors, matrix, magnitude in (
        (m.forward(x, True), x, exact.T, size.T),
        (m.backward(y, True), y, exact, size),
        (m.sketch((2, 7), SEED, True), omega, exact.T, size.T),
    ):
        error = (got.double() - vectors.double() @ matrix).abs()
        assert bool((error <= 9 * 2.0**-8 * (vectors.double().abs() @ magnitude)).all())
        assert bool((error > 2.0**-14 * (vectors.double() @ matrix).abs()).any()), "that was not low precision"


@pytest.mark.parametrize("sizes", [(3, 5, 4), (300, 200, 100), (70, 600, 90)])
def test_product_of_views(sizes):
    n, k, m = sizes
    x, w = torch.randn(n, k), torch.randn(m, k)
    exact, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    for a in (x, x.T.contiguous().T):
        for b in (w, w.T.contiguous().T, torch.randn(m, 2 * k).copy_(torch.cat([w, w], 1))[:, :k]):
            assert bool(((product(a, b).double() - exact).abs() <= (k + 4) * EPS * size).all())


# --- orthonormal bases -----------------------------------------------------------------------------------------------


def _rows(values: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    count = len(values)
    left = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64)).Q
    return ((left * values.double()) @ right.T).to(dtype)


SPECTRA = {
    "well conditioned": torch.linspace(1, 3, 24),
    "1e3": torch.logspace(0, -3, 24),
    "1e6": torch.logspace(0, -6, 24),
    "1e12": torch.logspace(0, -12, 24, dtype=torch.float64),
    "rank 5": torch.cat([torch.ones(5), torch.zeros(19)]),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(23)]),
    "zero": torch.zeros(24),
    "large": 1e15 * torch.logspace(0, -2, 24),
    "small": 1e-15 * torch.logspace(0, -2, 24),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [24, 25, 700])
@pytest.mark.parametrize("name", SPECTRA)
def test_orthonormal_whatever_comes(name, columns, dtype):
    x = _rows(SPECTRA[name], columns, dtype)
    basis, fix = orthonormalise(x)
    q = fix @ basis.double()
    eps = torch.finfo(dtype).eps
    # entries of basis and Gram matrix are off by rounding of sums of `columns` terms, most of which cancels; the last
    # factor amplifies it by at most the square of its condition number, 3
    assert float((q @ q.T - torch.eye(24)).abs().max()) <= 9 * columns**0.5 * 4 * eps
    # x lies in the span
    x = x.double()
    assert float(torch.linalg.matrix_norm(x - x @ q.T @ q)) <= 24 * columns**0.5 * eps * float(
        torch.linalg.matrix_norm(x)
    )
    low, factor, diagonal = condition(x.to(dtype), dtype)
    assert low.shape == x.shape and bool(torch.isfinite(low).all())
    assert diagonal is None or bool((diagonal > 0).all())
    if factor is not None:
        error = torch.linalg.matrix_norm(factor @ x - low.double(), dim=(0, 1))
        assert float(error) <= 24 * 4 * eps * float(torch.linalg.matrix_norm(factor) * torch.linalg.matrix_norm(x))


def test_shifts_do_not_drown_short_rows():
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1e-12]], dtype=torch.float64)
    inverse, diagonal, shifted = orthonormal._inverse_factor(gram, EPS)
    assert shifted and bool(torch.isfinite(inverse).all())
    assert abs(float(inverse[2, 2]) / 1e6 - 1) < 1e-3 and abs(float(diagonal[2]) / 1e-6 - 1) < 1e-3
    assert orthonormal._inverse_factor(gram * float("nan"), EPS) is None


def test_paths_of_orthonormalise(monkeypatch):
    """Plain, shifted and Householder paths are each taken where they are meant."""
    calls: list[bool | None] = []
    original = orthonormal._inverse_factor

    def watch(gram, eps):
        found = original(gram, eps)
        calls.append(None if found is None else found[2])
        return found

    monkeypatch.setattr(orthonormal, "_inverse_factor", watch)
    orthonormalise(_rows(SPECTRA["well conditioned"], 300, torch.float32))
    assert calls == [False]
    calls.clear()
    orthonormalise(_rows(SPECTRA["rank 5"], 300, torch.float32))
    assert True in calls
    calls.clear()
    hard = _rows(SPECTRA["1e6"], 300, torch.float32)
    monkeypatch.setattr(torch.linalg, "qr", lambda x: pytest.fail("Householder QR was not needed"))
    orthonormalise(hard)
    with pytest.raises(pytest.fail.Exception):
        orthonormalise(torch.zeros(4, 9))


# --- small problem ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("span", [1.0, 3.0, 6.0, 14.0])
def test_small_svd(exact, span):
    size, rank = 20, 13
    core = torch.stack(
        [_rows(torch.logspace(0, -span, size, dtype=torch.float64), size, torch.float64) for _ in range(3)]
    )
    left, sigma, right = small_svd(core, rank, exact)
    expected = torch.linalg.svdvals(core)[:, :rank]
    assert float((sigma - expected).abs().max()) <= 1e-12
    assert bool((sigma[:, 1:] <= sigma[:, :-1]).all())
    eye = torch.eye(rank)
    # a Gram matrix squares the condition number; it is used as long as float32 does not notice
    assert float((left.mT @ left - eye).abs().max()) <= 1e-7
    assert float((right @ right.mT - eye).abs().max()) <= 1e-12
    image = left * sigma.unsqueeze(-2) @ right
    best = torch.linalg.svdvals(core)[:, rank:].norm(dim=-1)
    assert bool((torch.linalg.matrix_norm(core - image) <= best * (1 + 1e-9) + 1e-12).all())


# --- certificate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_certificate_is_above_the_error_and_close_to_it(dtype, weighted):
    a = torch.randn(70, 90, dtype=torch.float64).to(dtype)
    lw, rw = (torch.randn(70, 70), torch.rand(90)) if weighted else (None, None)
    m = Operand(a, lw, rw, None)
    exact = a.double() if lw is None or rw is None else lw.double() @ a.double() * rw.double()
    exact = exact * 2.0**-m.exponent
    for scale in (1.0, 1e-3, 1e-6):
        u, s, vh = torch.linalg.svd(exact + scale * torch.randn_like(exact), full_matrices=False)
        true = float(torch.linalg.matrix_norm(exact - (u * s) @ vh))
        bound = certified_error(m, u, s, vh)
        assert true * (1 - 1e-9) <= bound <= true * (1 + 1e-9) + 1e-9 * float(torch.linalg.matrix_norm(exact))
