"""Weighted decompositions: exact at full rank, optimal in their own metric at every other."""

from __future__ import annotations

import pytest
import torch

from taco_svd.decomposition import Decomposition, WeightedMap, damped, full_svd, plain_svd, weighted_svd

EPS = torch.finfo(torch.float32).eps


def moment(size: int, samples: int = 200) -> torch.Tensor:
    rows = torch.randn(samples, size, dtype=torch.float64) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return rows.T @ rows / samples


def loss(error: torch.Tensor, inputs: torch.Tensor | None, gradients: torch.Tensor | None) -> float:
    """tr(G D A D^T)"""
    a = torch.eye(error.shape[1], dtype=torch.float64) if inputs is None else inputs
    g = torch.eye(error.shape[0], dtype=torch.float64) if gradients is None else gradients
    return float(torch.trace(g @ error @ a @ error.T))


def product(parts: Decomposition, rank: int) -> torch.Tensor:
    u, v = parts.factors(torch.arange(rank))
    return u.double() @ v.double()


@pytest.mark.parametrize("two_sided", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(17, 17), (31, 13), (13, 31), (1, 9), (9, 1)])
def test_full_rank_is_exact_and_truncation_loses_the_tail(shape: tuple[int, int], two_sided: tuple[bool, bool]) -> None:
    m, n = shape
    weight = torch.randn(m, n)
    inputs = damped(moment(n), 0.01) if two_sided[0] else None
    gradients = damped(moment(m), 0.01) if two_sided[1] else None
    parts = weighted_svd(weight, inputs, gradients)
    full = min(m, n)
    assert parts.left.shape == (m, full) and parts.right.shape == (full, n)
    assert bool((parts.sigma.diff() <= 0).all())
    # the inverse roots amplify the rounding of the stored float32 factors by at most sqrt(cond A cond G)
    condition = 1.0
    for matrix in (inputs, gradients):
        if matrix is not None:
            condition *= float(torch.linalg.cond(matrix)) ** 0.5
    exact = product(parts, full)
    assert float((exact - weight).norm()) <= 8 * condition * EPS * float(weight.norm())
    for rank in {1, full // 2, full - 1} - {0}:
        lost = loss(weight.double() - product(parts, rank), inputs, gradients)
        tail = float(parts.sigma.double()[rank:].pow(2).sum())
        assert lost == pytest.approx(tail, rel=1e-4, abs=1e-4 * EPS * float(parts.sigma[0]) ** 2)


def test_no_other_factors_do_better_in_the_metric() -> None:
    m, n, rank = 19, 14, 5
    weight = torch.randn(m, n)
    inputs, gradients = damped(moment(n), 0.01), damped(moment(m), 0.01)
    u, v = weighted_svd(weight, inputs, gradients).factors(torch.arange(rank))
    best = loss(weight.double() - u.double() @ v.double(), inputs, gradients)
    others = [plain_svd(weight), weighted_svd(weight, inputs), weighted_svd(weight, None, gradients)]
    assert all(loss(weight.double() - product(parts, rank), inputs, gradients) > best for parts in others)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(20):
            near = (u + scale * torch.randn_like(u)).double() @ (v + scale * torch.randn_like(v)).double()
            assert loss(weight.double() - near, inputs, gradients) > best


def test_one_sided_metric_is_the_error_on_the_inputs() -> None:
    """With G left out the loss is the mean squared error of the outputs, counted on the inputs themselves."""
    weight, rows = torch.randn(12, 9), torch.randn(300, 9) @ torch.randn(9, 9)
    parts = weighted_svd(weight, (rows.T @ rows / len(rows)).double())
    error = rows.double() @ (weight.double() - product(parts, 4)).T
    assert float(error.pow(2).sum(1).mean()) == pytest.approx(float(parts.sigma.double()[4:].pow(2).sum()), rel=1e-4)


def test_plain_svd_is_orthonormal() -> None:
    parts = plain_svd(torch.randn(23, 11))
    torch.testing.assert_close(parts.left.T @ parts.left, torch.eye(11), rtol=0, atol=50 * EPS)
    torch.testing.assert_close(parts.right @ parts.right.T, torch.eye(11), rtol=0, atol=50 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 33)])
def test_full_svd_by_the_gram_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What large matrices on a GPU take: six decades of singular values, well above the floor of 1e-8."""
    left, right = (torch.linalg.qr(torch.randn(size, min(shape), dtype=torch.float64)).Q for size in shape)
    sigma = torch.logspace(0, -6, min(shape), dtype=torch.float64)
    matrix = ((left * sigma) @ right.T).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    u, s, v = full_svd(matrix, by_gram=True)
    assert u.dtype == s.dtype == v.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert torch.linalg.matrix_norm((u * s) @ v - matrix) <= 8 * eps * min(shape) ** 0.5
    # an eigenvalue errs by float64's rounding of the largest, a singular value by that over twice itself
    bound = 64 * torch.finfo(torch.float64).eps / (2 * exact) + eps * exact
    assert bool(((s.double() - exact).abs() <= bound).all())
    eye = torch.eye(min(shape), dtype=torch.float64)
    largest = 64 * torch.finfo(torch.float64).eps / float(exact[-1]) ** 2 + 8 * eps * min(shape) ** 0.5
    assert (u.double().T @ u.double() - eye).abs().max() <= largest
    assert (v.double() @ v.double().T - eye).abs().max() <= largest


def test_moments_of_few_tokens_are_handled() -> None:
    weight, rows = torch.randn(8, 20), torch.randn(3, 20)
    parts = weighted_svd(weight, (rows.T @ rows).double())
    assert torch.isfinite(parts.left).all() and torch.isfinite(parts.right).all()
    # three directions are enough for three tokens, up to the floor under the eigenvalues
    torch.testing.assert_close(rows @ product(parts, 3).float().T, rows @ weight.T, rtol=0, atol=1e-2)


def test_zero_or_broken_moments_are_an_error() -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        weighted_svd(torch.randn(3, 4), torch.zeros(4, 4))


def test_damping_keeps_the_trace() -> None:
    c = moment(7)
    for share in (0.0, 0.3, 1.0):
        assert float(damped(c, share).trace()) == pytest.approx(float(c.trace()), rel=1e-12)
    torch.testing.assert_close(damped(c, 1.0), torch.eye(7, dtype=torch.float64) * c.trace() / 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("two_sided", [(True, False), (False, True), (True, True)])
def test_sketched_truncation_loses_at_most_one_percent_more(two_sided: tuple[bool, bool], dtype: torch.dtype) -> None:
    m, n, rank = 530, 600, 60
    # singular values that fall like those of trained weights, and moments of a few large directions
    weight = torch.randn(m, n) * torch.linspace(0, 3, n).neg().exp()
    inputs = damped(moment(n, 2000), 0.1, dtype) if two_sided[0] else None
    gradients = damped(moment(m, 2000), 0.01, dtype) if two_sided[1] else None
    sketched = weighted_svd(weight, inputs, gradients, rank)
    assert sketched.left.shape == (m, rank) and sketched.right.shape == (rank, n)
    exact = weighted_svd(weight, inputs, gradients)
    lost, least = (
        loss(
            weight.double() - product(parts, rank),
            *(None if matrix is None else matrix.double() for matrix in (inputs, gradients)),
        )
        for parts in (sketched, exact)
    )
    assert least * (1 - 1e-5) <= lost <= 1.01 * least
    again = weighted_svd(weight, inputs, gradients, rank)
    assert torch.equal(again.left, sketched.left) and torch.equal(again.right, sketched.right)


def test_what_has_no_triangular_root_goes_the_exact_way() -> None:
    rows = torch.randn(5, 600)
    singular = (rows.T @ rows).double()
    parts = weighted_svd(torch.randn(530, 600), singular, None, 40)
    assert parts.left.shape == (530, 530) and torch.isfinite(parts.right).all()
    weight = torch.randn(530, 600)
    parts = weighted_svd(weight, None, None, 400)  # too many for a sketch: of the Gram matrix's eigenvectors the first
    sigma = torch.linalg.svdvals(weight.double())
    assert parts.left.shape == (530, 400)
    assert torch.allclose(parts.sigma.double(), sigma[:400], rtol=1e-5)
    kept = (parts.left * parts.sigma).double() @ parts.right.double()
    assert float((weight - kept).norm()) <= 1.0001 * float(sigma[400:].norm())


def test_roots_are_made_in_the_memory_of_moments_that_are_given_away() -> None:
    weight = torch.randn(530, 600)
    inputs, gradients = damped(moment(600, 2000), 0.1), damped(moment(530, 2000), 0.01)
    kept = inputs.clone(), gradients.clone()
    parts = WeightedMap(weight, inputs, gradients).svd(400)
    assert torch.equal(inputs, kept[0]) and torch.equal(gradients, kept[1])
    before = [inputs.data_ptr(), gradients.data_ptr()]
    weighted = WeightedMap(weight, inputs, gradients, own=True)
    assert weighted._roots is not None
    assert [root.data_ptr() for root in weighted._roots if root is not None] == before
    again = weighted.svd(400)
    assert torch.equal(again.left, parts.left) and torch.equal(again.right, parts.right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_that_are_given_away_are_whole_again_where_one_has_no_root(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 530, dtype=dtype)
    inputs, singular = damped(moment(600, 2000), 0.1, dtype), rows.T @ rows
    weight = torch.randn(530, 600)
    expected = weighted_svd(weight, inputs.clone(), singular.clone(), 40)
    assert expected.left.shape == (530, 530)  # by the symmetric roots
    parts = WeightedMap(weight, inputs, singular, own=True).svd(40)
    torch.testing.assert_close(parts.sigma, expected.sigma)


@pytest.mark.parametrize("shape", [(520, 1100), (1100, 520)])
def test_directions_and_spectrum_at_once(shape: tuple[int, int]) -> None:
    """In float32, as moments of more than 1024 features are kept: massive inputs stretch the spectrum."""
    generator = torch.Generator().manual_seed(7)
    m, n = shape
    rows = torch.randn(2 * n, n, generator=generator) * torch.logspace(0, -3, n)
    outputs = torch.randn(2 * m, m, generator=generator) * torch.logspace(-1, 0, m)
    inputs = damped(rows.T @ rows / len(rows), 0.01, torch.float32)
    gradients = damped(outputs.T @ outputs / len(outputs), 0.01, torch.float32)
    weight = torch.randn(m, n, generator=generator)
    weighted = WeightedMap(weight, inputs, gradients)
    parts, spectrum = weighted.svd_and_spectrum(200)
    root_a, root_g = (torch.linalg.cholesky(moment.double()) for moment in (inputs, gradients))
    sigma = torch.linalg.svdvals(root_g.T @ weight.double() @ root_a)
    assert len(parts.sigma) == 200 and len(spectrum) == 520
    torch.testing.assert_close(spectrum.double(), sigma, rtol=1e-4, atol=1e-6 * float(sigma[0]))
    torch.testing.assert_close(weighted.spectrum().double()[:200], sigma[:200], rtol=1e-4, atol=0)
    for rank in (20, 200):
        kept = (parts.left[:, :rank] * parts.sigma[:rank]).double() @ parts.right[:rank].double()
        loss = (root_g.T @ (weight.double() - kept) @ root_a).norm()
        assert float(loss) <= 1.001 * float(sigma[rank:].norm())


@pytest.mark.parametrize("shape", [(520, 600), (600, 520)])
def test_all_directions_of_a_large_matrix_cut_as_well_as_a_full_svd(shape: tuple[int, int]) -> None:
    """They go through triangular roots and Gram eigenvectors: the truncation loss must be the least possible."""
    generator = torch.Generator().manual_seed(6)
    m, n = shape

    def moment(size: int) -> torch.Tensor:
        rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
        rows *= torch.logspace(0, -2, size, dtype=torch.float64)
        return damped(rows.T @ rows / len(rows), 0.01)

    inputs, gradients = moment(n), moment(m)
    weight = torch.randn(m, n, generator=generator)
    values, vectors = torch.linalg.eigh(inputs)
    root_a = (vectors * values.sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(gradients)
    root_g = (vectors * values.sqrt()) @ vectors.T
    sigma = torch.linalg.svdvals(root_g @ weight.double() @ root_a)
    parts = weighted_svd(weight, inputs, gradients)
    assert torch.allclose(parts.sigma.double(), sigma, rtol=1e-6)
    for rank in (10, 300, min(m, n)):
        kept = (parts.left[:, :rank] * parts.sigma[:rank]).double() @ parts.right[:rank].double()
        error = weight.double() - kept
        loss = float(((gradients @ error @ inputs) * error).sum())
        # factors are stored in float32: their rounding is what remains at full rank
        assert loss <= float(sigma[rank:].square().sum()) * (1 + 1e-6) + 1e-10 * float(sigma.square().sum())
