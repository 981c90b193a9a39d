"""The factor in the lower triangle against torch's, and the matrix brought back from the upper one."""

from __future__ import annotations

import pytest
import torch

from taco_svd import triangle
from taco_svd.triangle import cholesky_below_, restore_below_, solve_below


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("n", [1, 2, 7, 63, 65, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_solution_and_restored_matrix(
    dtype: torch.dtype, n: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triangle, "BLOCK", block)
    generator = torch.Generator().manual_seed(n)
    root = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    exact = root @ root.T / n
    matrix = ((exact + exact.T) / 2).to(dtype)
    original = matrix.clone()
    diagonal = matrix.diagonal().clone()
    assert cholesky_below_(matrix)
    assert torch.equal(matrix.triu(1), original.triu(1))
    # L L^T differs from the matrix by at most about n + 1 roundings of its size (Higham, theorem 10.3)
    bound = (n + 1) * torch.finfo(dtype).eps * float(diagonal.max())
    lower = matrix.tril().double()
    assert float((lower @ lower.T - original.double()).abs().max()) <= bound
    right = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    left = solve_below(matrix, right)
    residual = original.double() @ left.double() - right.double()
    assert float(residual.abs().max()) <= 3 * n * bound * max(1.0, float(left.abs().max()))
    restore_below_(matrix, diagonal)
    assert torch.equal(matrix, original)


def test_a_matrix_that_has_no_factor_is_told_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "BLOCK", 4)
    matrix = torch.eye(11)
    matrix[9, 2] = matrix[2, 9] = 2.0
    original = matrix.clone()
    assert not cholesky_below_(matrix)
    restore_below_(matrix, torch.ones(11))
    assert torch.equal(matrix, original)
