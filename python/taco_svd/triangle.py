"""Cholesky factors of wide symmetric matrices in the memory of the matrix itself.

The statistics of a wide layer (28,672 inputs: 3.3 GB in float32) are larger than the layer, and a factor beside the
matrix doubles that. Here the factor overwrites the lower triangle, block column by block column, and the upper one
stays what it was: the matrix can be brought back from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Columns that are handled at once; the work is then in products of matrices.
BLOCK = 1024


def cholesky_below_(matrix: torch.Tensor) -> bool:
    """Overwrites the lower triangle of a symmetric matrix [n, n] with its Cholesky factor; above the diagonal it stays.

    Returns whether there is such a factor; where there is none the lower triangle holds nothing of use.
    """
    for start, stop in _blocks(len(matrix)):
        corner, below = matrix[start:stop, start:stop], matrix[stop:, start:stop]
        before = matrix[start:stop, :start]  # what the columns so far take off these ones
        corner.sub_((before @ before.T).tril_())
        below.addmm_(matrix[stop:, :start], before.T, alpha=-1)
        factor, failed = torch.linalg.cholesky_ex(corner)  # reads the lower triangle only
        if int(failed):
            return False
        corner.copy_(corner.triu(1).add_(factor))
        # X F^T = A, as F X^T = A^T
        below.copy_(torch.linalg.solve_triangular(factor, below.T, upper=False).T)
    return True


def restore_below_(matrix: torch.Tensor, diagonal: torch.Tensor) -> None:
    """Makes a matrix [n, n] symmetric again from what is above its diagonal, and `diagonal` [n]."""
    for start, stop in _blocks(len(matrix)):
        corner = matrix[start:stop, start:stop]
        upper = corner.triu(1)
        corner.copy_(upper + upper.T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    matrix.diagonal().copy_(diagonal)


def solve_below(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X [n, k] with ``L L^T X = right`` [n, k], L in the lower triangle of `matrix`; a new tensor."""
    half = torch.linalg.solve_triangular(matrix, right, upper=False)
    return torch.linalg.solve_triangular(matrix.T, half, upper=True)


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))
