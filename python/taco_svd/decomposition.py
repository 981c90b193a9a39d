"""Singular value decompositions of a weight: plain, whitened by its inputs, or weighted on both sides.

All return factors of the same kind, so that what follows (attribution, selection, replacement) does not know which
one it works on: ``W = left @ diag(sigma) @ right`` with the directions in an order that the method's metric gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

import taco_kernels
from taco_kernels._library import exact_products

from .errors import TacoError, first_line
from .triangle import cholesky_below_, restore_below_

# Eigenvalues below this share of the largest are rounding of float32 statistics, not information.
RELATIVE_FLOOR = 1e-6
# From which smaller side on a randomized SVD pays, and for at most which share of the directions. In the weighted case
# it stands against eigenvectors of a Gram matrix in float64 (5632 x 2048: 3.8 s; 205 directions 1.7 s, 410 3.2 s, 819
# 8.9 s). LAPACK's plain SVD in float32 is hard to beat: with four power iterations and 45% of the directions both cost
# the same at 1024 x 1024 (0.7 times the speed at 512 x 512).
WEIGHTED_LEAST, WEIGHTED_SHARE = 512, 0.2
PLAIN_LEAST, PLAIN_SHARE = 1024, 0.25
# The smaller side from which on a full SVD on a GPU goes through a Gram matrix. Not measured: no GPU was there.
GRAM_LEAST = 512
# Attribution looks at single directions, not only at the space that they span: two iterations more than that needs.
PLAIN_POWER_ITERS = 4
# Columns of a matrix that are widened to float64 at a time.
WIDENED_COLUMNS = 1024
# Second moments of more features than this are handled in float32.
LARGE_MOMENT = 1024


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Decomposition:
    """``W = left @ diag(sigma) @ right`` in float32.

    Attributes:
        left: [out, k]; orthonormal columns for a plain SVD.
        sigma: [k], descending singular values, in the metric of the decomposition.
        right: [k, in].
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor

    def factors(self, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(u [out, rank], v [rank, in]) of the directions `keep` (indices): of each, a column and a row of one norm.

        A weighted decomposition's vectors are as long as its metric makes them, those of one side a million times those
        of the other where gradients are small: out of float16's range, and nothing that an optimiser can train.
        """
        left, right = self.left[:, keep], self.right[keep]
        ratio = right.double().norm(dim=1) / left.double().norm(dim=0)
        ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)  # of nothing at all: as it is
        sigma = self.sigma[keep]
        return left * (sigma * ratio).sqrt().to(left.dtype), (sigma / ratio).sqrt().to(right.dtype)[:, None] * right

    def to(self, device: torch.device | str) -> Decomposition:
        return Decomposition(self.left.to(device), self.sigma.to(device), self.right.to(device))


def _exactly(function: Callable[P, R]) -> Callable[P, R]:
    """Computes in float32 what is to be float32, whatever precision the user has allowed for the model's own products.

    The first tensor among the arguments, or the first one's `weight`, says on which device.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [getattr(value, "weight", value) for value in args]
        device = next(value.device for value in given if isinstance(value, torch.Tensor))
        with exact_products(device):
            return function(*args, **kwargs)

    return run


@_exactly
def plain_svd(weight: torch.Tensor, rank: int | None = None) -> Decomposition:
    """SVD of a weight [out, in]; the truncation minimises the Frobenius norm of the error in the weight.

    With a `rank` only that many directions are found, of a large matrix by a randomized SVD (see `sketch_pays`); its
    trailing directions are a little less exact than its leading ones.
    """
    if rank is not None and sketch_pays(weight.shape[0], weight.shape[1], rank, weighted=False):
        generator = torch.Generator(device="cpu").manual_seed(0)  # the same weight gives the same factors
        found = taco_kernels.randomized_svd(weight.float(), rank, power_iters=PLAIN_POWER_ITERS, generator=generator)
        return Decomposition(*found)
    return Decomposition(*full_svd(weight.float()))


def weighted_svd(
    weight: torch.Tensor,
    inputs: torch.Tensor | None = None,
    gradients: torch.Tensor | None = None,
    rank: int | None = None,
) -> Decomposition:
    """SVD of ``G^(1/2) W A^(1/2)``, taken back to the coordinates of W.

    With D the truncation error it minimises tr(G D A D^T): the second-order loss in the Kronecker-factored (K-FAC)
    approximation when A = E[x x^T] are the second moments of the inputs and G = E[g g^T] those of the gradients at
    the outputs. With G left out it is the SVD in whitened input coordinates (SVD-LLM, arXiv 2403.07378).

    Args:
        weight: [out, in].
        inputs: A, symmetric positive semi-definite [in, in], or None for the identity.
        gradients: G, symmetric positive semi-definite [out, out], or None for the identity.
        rank: how many directions are wanted, None for all. A large matrix of which few are wanted goes through a
            randomized SVD with triangular roots of A and G (float32 if they are), whose truncation loss is within 1%
            of the least possible; one of which many are, through the same roots and its Gram matrix in float64; a small
            one, or moments without such roots, through symmetric roots and a full SVD in float64, which gives all.
    """
    return WeightedMap(weight, inputs, gradients).svd(rank)


class WeightedMap:
    """A weight with the moments of both its sides, to be asked for its directions and for all its singular values.

    Of a large matrix triangular roots of the moments are taken once, and the moments themselves are let go.
    Arguments as for `weighted_svd`; with `own` the moments are the map's to be overwritten, and the roots are made in
    their memory: those of a wide layer are larger than the layer.
    """

    @_exactly
    def __init__(
        self,
        weight: torch.Tensor,
        inputs: torch.Tensor | None = None,
        gradients: torch.Tensor | None = None,
        own: bool = False,
    ) -> None:
        self.weight = weight
        self._roots = _triangular_roots(inputs, gradients, own) if min(weight.shape) >= WEIGHTED_LEAST else None
        self._moments = (inputs, gradients) if self._roots is None else (None, None)

    @_exactly
    def svd(self, rank: int | None = None) -> Decomposition:
        """The `rank` leading directions at least; see `weighted_svd`."""
        if self._roots is None:
            return _full_by_symmetric_roots(self.weight, *self._moments)
        if rank is not None and sketch_pays(self.weight.shape[0], self.weight.shape[1], rank, weighted=True):
            return sketched_weighted_svd(self.weight, *self._roots, rank)
        return _by_triangular_roots(self.weight, *self._roots, rank)[0]

    @_exactly
    def svd_and_spectrum(self, rank: int) -> tuple[Decomposition, torch.Tensor]:
        """`svd(rank)` without a sketch, and `spectrum()`, for the price of one: the directions in its first columns."""
        if self._roots is None:
            whole = self.svd()
            return whole, whole.sigma
        return _by_triangular_roots(self.weight, *self._roots, rank)

    @_exactly
    def spectrum(self) -> torch.Tensor:
        """All singular values of ``G^(1/2) W A^(1/2)``, descending.

        Those of a large matrix come from its Gram matrix in the dtype of the moments: of values below a thousandth of
        the largest only the size is right, which is all that a sum of their squares needs.
        """
        if self._roots is None:
            return self.svd().sigma
        core = _core(self.weight, *self._roots)
        return _spectrum_of(core @ core.T if core.shape[0] <= core.shape[1] else core.T @ core).float()


def _full_by_symmetric_roots(
    weight: torch.Tensor, inputs: torch.Tensor | None, gradients: torch.Tensor | None
) -> Decomposition:
    # float64: the inverse roots below amplify rounding by the condition number of the statistics
    core = weight.double()
    left_back = right_back = None
    if gradients is not None:
        root, left_back = _root_and_inverse(gradients)
        core = root @ core
    if inputs is not None:
        root, right_back = _root_and_inverse(inputs)
        core = core @ root
    left, sigma, right = full_svd(core)
    if left_back is not None:
        left = left_back @ left
    if right_back is not None:
        right = right @ right_back
    return Decomposition(left.float(), sigma.float(), right.float())


@_exactly
def full_svd(matrix: torch.Tensor, by_gram: bool | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left [m, k], sigma [k] descending, right [k, n]) of a matrix, k = min(m, n): as ``torch.linalg.svd``'s, reduced.

    Args:
        matrix: float32 or float64 [m, n].
        by_gram: through the eigenvectors of its smaller Gram matrix in float64; default: for large matrices on a GPU,
            where torch's SVD is cuSOLVER's Jacobi method (some hundred times the time of a product of that size) and
            float64 costs little. Singular values below 1e-8 of the largest are then rounding, and vectors of the longer
            side that belong to them are short; the product is the matrix to the rounding of its dtype either way.
    """
    if by_gram is None:
        by_gram = _by_gram_here(matrix)
    if not by_gram:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, sigma, right
    left, sigma, right, _ = _svd_by_gram(matrix.double())
    return left.to(matrix.dtype), sigma.to(matrix.dtype), right.to(matrix.dtype)


@_exactly
def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values, descending; of a large matrix on a GPU by `full_svd`'s way."""
    if not _by_gram_here(matrix):
        return torch.linalg.svdvals(matrix)
    return _spectrum_of(_wide_gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)).to(matrix.dtype)


def _by_gram_here(matrix: torch.Tensor) -> bool:
    return matrix.is_cuda and min(matrix.shape) >= GRAM_LEAST


def _spectrum_of(gram: torch.Tensor) -> torch.Tensor:
    """Singular values of a matrix from its Gram matrix, descending."""
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def _svd_by_gram(
    core: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, sigma, right, all singular values) of a large matrix, from the eigenvectors of its smaller Gram matrix.

    Several times faster than an SVD. The Gram matrix is formed and decomposed in float64: singular values below 1e-8
    of the largest come out with large relative errors, which is far below what the statistics behind a weighted matrix
    can tell. The side that is derived has rows scaled to the singular values, so ``left @ diag(sigma) @ right`` is the
    matrix's projection on the `rank` leading directions (default all) to the rounding of its dtype.
    """
    if core.shape[0] > core.shape[1]:
        right, sigma, left, spectrum = _svd_by_gram(core.T, rank)
        return left.T, sigma, right.T, spectrum
    squares, vectors = torch.linalg.eigh(_wide_gram(core))
    left = vectors.flip(1)[:, :rank].to(core.dtype)
    spectrum = squares.flip(0).clamp(min=0).sqrt()
    # below it, what is left of a row is rounding, and is not to be blown up to more than a unit vector
    floor = float(spectrum[0]) * max(1e-8, torch.finfo(core.dtype).eps)
    sigma = spectrum[:rank].to(core.dtype)
    right = (left.T @ core) / sigma.clamp(min=floor or 1.0)[:, None]
    return left, sigma, right, spectrum


def _wide_gram(core: torch.Tensor) -> torch.Tensor:
    """``core core^T`` in float64, without a copy of all of it in float64."""
    gram = core.new_zeros((core.shape[0], core.shape[0]), dtype=torch.float64)
    for part in core.split(WIDENED_COLUMNS, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.T)
    return gram


def sketch_pays(out_features: int, in_features: int, rank: int, *, weighted: bool) -> bool:
    """Whether a randomized SVD of this rank beats a full one."""
    least, share = (WEIGHTED_LEAST, WEIGHTED_SHARE) if weighted else (PLAIN_LEAST, PLAIN_SHARE)
    smaller = min(out_features, in_features)
    return smaller >= least and rank <= share * smaller


def _triangular_roots(
    inputs: torch.Tensor | None, gradients: torch.Tensor | None, own: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """L with ``L L^T = moment``, lower triangular, of both moments, in one dtype, the narrower of theirs.

    None where rounding leaves one of them no such root. With `own` the roots are made in the moments' memory; where
    there are none, the moments are as they were.
    """
    given = [moment for moment in (inputs, gradients) if moment is not None]
    diagonals = [moment.diagonal().clone() for moment in given]
    narrow = min((moment.dtype for moment in given), key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
    roots = given if own else [moment.clone() for moment in given]
    for begun, root in enumerate(roots, 1):
        if not cholesky_below_(root) or not torch.isfinite(root.diagonal()).all():
            for moment, diagonal in zip(roots[:begun], diagonals[:begun], strict=True):
                restore_below_(moment, diagonal)
            return None
    made = iter([root.tril_().to(narrow) for root in roots])
    return None if inputs is None else next(made), None if gradients is None else next(made)


def sketched_weighted_svd(
    weight: torch.Tensor, root_a: torch.Tensor | None, root_g: torch.Tensor | None, rank: int
) -> Decomposition:
    """The `rank` leading directions of `weighted_svd`, from triangular roots of A and G: of ``L_G^T W L_A``.

    Any root gives the same truncation: it differs from the symmetric one by an orthogonal factor only, and triangular
    systems take the directions back without an inverse. Computed in the roots' dtype.
    """
    # a fixed seed: the same statistics give the same factors
    generator = torch.Generator(device="cpu").manual_seed(0)
    wide = (
        torch.float64
        if any(root is not None and root.dtype == torch.float64 for root in (root_a, root_g))
        else torch.float32
    )
    left, sigma, right = taco_kernels.randomized_svd(
        weight.to(wide), rank, left=None if root_g is None else root_g.T, right=root_a, generator=generator
    )
    return _taken_back(left, sigma, right, root_a, root_g)


def _by_triangular_roots(
    weight: torch.Tensor, root_a: torch.Tensor | None, root_g: torch.Tensor | None, rank: int | None
) -> tuple[Decomposition, torch.Tensor]:
    """The leading directions of a large matrix (None: all) and its spectrum: a Cholesky factor costs a fraction of an
    eigendecomposition.

    The products with the roots are in their dtype, what is sensitive (the Gram matrix) in float64.
    """
    core = _core(weight, root_a, root_g)
    left, sigma, right, spectrum = _svd_by_gram(core if rank is not None else core.double(), rank)
    del core
    return _taken_back(left, sigma, right, root_a, root_g), spectrum.float()


def _core(weight: torch.Tensor, root_a: torch.Tensor | None, root_g: torch.Tensor | None) -> torch.Tensor:
    """``L_G^T W L_A`` in the roots' dtype."""
    core = weight.to(next((root.dtype for root in (root_a, root_g) if root is not None), torch.float32))
    if root_g is not None:
        core = root_g.T @ core
    return core if root_a is None else core @ root_a


def _taken_back(
    left: torch.Tensor,
    sigma: torch.Tensor,
    right: torch.Tensor,
    root_a: torch.Tensor | None,
    root_g: torch.Tensor | None,
) -> Decomposition:
    """Singular vectors of ``L_G^T W L_A`` in the coordinates of W."""
    if root_g is not None:
        left = torch.linalg.solve_triangular(root_g.T, left.to(root_g.dtype), upper=True)
    if root_a is not None:
        right = torch.linalg.solve_triangular(root_a, right.to(root_a.dtype), upper=False, left=False)
    return Decomposition(left.float(), sigma.float(), right.float())


def damped(moment: torch.Tensor, damping: float, dtype: torch.dtype | None = None, own: bool = False) -> torch.Tensor:
    """Shrinks second moments towards their mean diagonal: ``(1 - a) C + a mean(diag C) I``.

    A new tensor, unless `moment` is the caller's `own` to be overwritten and has the dtype already.

    In float64 by default, and in float32 beyond `LARGE_MOMENT`: there it would take twice the time and memory of
    everything else, and the shrinkage holds the condition number far below what float32 can tell. Moments that are zero
    (a dead layer, a loss that does not depend on it) say nothing: the identity, by which no direction weighs more.

    Raises:
        TacoError: moments that are not finite.
    """
    if dtype is None:
        dtype = torch.float64 if moment.shape[0] <= LARGE_MOMENT else torch.float32
    mean = moment.diagonal().double().mean()
    if not torch.isfinite(mean):
        raise TacoError(
            "The second moments of activations or gradients are not finite: they are beyond the range of float32 "
            "(weights or activations of the model are huge, or NaN). No statistics can be taken; --method svd needs "
            "none."
        )
    if mean <= 0:
        return torch.eye(moment.shape[0], dtype=dtype, device=moment.device)
    result = moment.to(dtype, copy=not own).mul_(1 - damping)
    result.diagonal().add_(damping * mean)
    return result


def _root_and_inverse(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of a second-moment matrix and its inverse, with a floor under the eigenvalues.

    The symmetric root rather than Cholesky: it exists for rank-deficient moments too.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    largest = values[-1]
    if not torch.isfinite(largest) or largest <= 0:
        raise ValueError("second moments are zero or not finite; no weighting can be taken from them")
    values = values.clamp(min=float(largest) * RELATIVE_FLOOR).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


@contextmanager
def numerical_errors_named() -> Iterator[None]:
    """While open, or around a function: decompositions that fail are the statistics' fault, and said to be.

    Raises:
        TacoError: instead of torch's LinAlgError.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        first = first_line(error)
        raise TacoError(
            f"The statistics of this model and calibration text cannot be decomposed ({first}): activations are "
            "constant, zero or beyond the range of numbers. Try another --calibration; --method svd needs none."
        ) from error
