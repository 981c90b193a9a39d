"""``randomized_svd``: the leading singular triplets of ``L A R`` in a few matrix products.

Read top to bottom: reference -> arguments -> public function. The steps are in ``taco_kernels/svd/``. A plain
function, not a registered op: it runs for milliseconds to seconds and looks at its data on the way, so there is
nothing to compile or fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taco_kernels._factored import require_tensors
from taco_kernels._library import FLOATS, exact_products
from taco_kernels.svd.adaptive import IDENTITY_LIMIT, adaptive_svd
from taco_kernels.svd.factorise import Projection, project, small_svd, vectors
from taco_kernels.svd.operand import Operand, low_precision, scaled
from taco_kernels.svd.sketch import draw_seed

__all__ = ["RandomizedSVD", "randomized_svd", "randomized_svd_reference"]

# Columns times products below which a copy of the matrix in low precision costs more than it saves.
_LOW_PAYS = 512
# Flat spectra (small MLP weights) need this much for errors within 1% of the optimum after two power iterations.
_LEAST_OVERSAMPLE = 32
# Smallest certified tolerance of float32 results: rounding the factors alone costs about 1e-7.
_SMALLEST_TOLERANCE = {torch.float32: 1e-6, torch.float64: IDENTITY_LIMIT[torch.float64]}


class _Triplets(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class RandomizedSVD(_Triplets):
    """``(U, S, Vh)``, three tensors to unpack, like the result of ``torch.linalg.svd``.

    U is [..., p, rank], S [..., rank] and Vh [..., rank, q].

    Attributes:
        error_bound: with ``tolerance``: a certified upper bound of ``||L A R - U diag(S) Vh||_F``; else None.
    """

    error_bound: float | None = None


# --- reference -------------------------------------------------------------------------------------------------------


def randomized_svd_reference(
    a: Tensor, rank: int, left: Tensor | None = None, right: Tensor | None = None
) -> RandomizedSVD:
    """What :func:`randomized_svd` approximates: the truncated SVD of ``L A R``, formed in float64; batched."""
    m = a.double()
    if left is not None:
        m = left.double()[..., :, None] * m if left.dim() == 1 else left.double() @ m
    if right is not None:
        m = m * right.double() if right.dim() == 1 else m @ right.double()
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return RandomizedSVD(u[..., :rank], s[..., :rank], vh[..., :rank, :])


# --- arguments -------------------------------------------------------------------------------------------------------


def _matrices(a: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The matrices one by one, and the leading dimensions of the results."""
    if isinstance(a, Tensor):
        if a.dim() < 2:
            raise ValueError(f"randomized_svd: a must be [..., m, n], but its shape is {tuple(a.shape)}")
        return list(a.reshape(a.shape[:-2].numel(), *a.shape[-2:])), tuple(a.shape[:-2])
    if not isinstance(a, (list, tuple)):
        require_tensors("randomized_svd", a=a)
    found = list(a)
    if not found:
        raise ValueError("randomized_svd: a is an empty list")
    for number, t in enumerate(found):
        require_tensors("randomized_svd", **{f"a[{number}]": t})
    for t in found:
        if t.shape != found[0].shape or t.dim() != 2 or t.dtype != found[0].dtype or t.device != found[0].device:
            raise ValueError("randomized_svd: a list of matrices must agree in shape [m, n], dtype and device")
    return found, (len(found),)


def _weights(
    weight: Tensor | Sequence[Tensor] | None, name: str, count: int, batch: tuple[int, ...], a: Tensor
) -> list[Tensor | None]:
    """One weight per matrix: None, one for all (1-D or 2-D), a list, or a tensor with a's leading dimensions."""
    if weight is None:
        return [None] * count
    if isinstance(weight, Tensor):
        shared = weight.dim() in (1, 2)
        if not shared and tuple(weight.shape[:-2]) != batch:
            raise ValueError(f"randomized_svd: {name} {tuple(weight.shape)} must have 1 or 2 dimensions, or those of a")
        found = [weight] * count if shared else list(weight.reshape(count, *weight.shape[-2:]))
    else:
        found = list(weight)
    if len(found) != count:
        raise ValueError(f"randomized_svd: {name} holds {len(found)} weights for {count} matrices")
    for t in found:
        require_tensors("randomized_svd", **{name: t})
        if t.dtype != found[0].dtype:
            raise TypeError(f"randomized_svd: all of {name} must have one dtype, not {found[0].dtype} and {t.dtype}")
        if t.dtype not in FLOATS:
            raise TypeError(f"randomized_svd: {name} has dtype {t.dtype}; a floating dtype is needed")
        if t.device != a.device:
            raise ValueError(f"randomized_svd: {name} is on {t.device}, but a is on {a.device}")
        side = a.shape[0] if name == "left" else a.shape[1]
        inner = t.shape[-1 if name == "left" else 0] if t.dim() in (1, 2) else -1
        if inner != side:
            wanted = f"[{side}] or [any, {side}]" if name == "left" else f"[{side}] or [{side}, any]"
            raise ValueError(f"randomized_svd: {name} {tuple(t.shape)} must be {wanted} for a {tuple(a.shape)}")
        if t.shape != found[0].shape:
            raise ValueError(f"randomized_svd: all of {name} must have one shape")
    return [t.detach() for t in found]


def _low_for(
    a: Tensor, dtype: torch.dtype, width: int, power_iters: int, asked: torch.dtype | None
) -> torch.dtype | None:
    """The dtype of the power iterations, None for full precision."""
    if asked is not None:
        return None if asked == dtype or asked.itemsize >= dtype.itemsize else asked
    low = low_precision(dtype, a.device)
    return low if low == a.dtype or 2 * power_iters * width >= _LOW_PAYS else None


def _direct(m: Operand, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """All of M and a dense SVD: where the sketch would be as large as M."""
    u, s, vh = torch.linalg.svd(m.panel(0, m.rows, m.dtype), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


# --- public function -------------------------------------------------------------------------------------------------


def randomized_svd(
    a: Tensor | Sequence[Tensor],
    rank: int | None,
    oversample: int | None = None,
    power_iters: int = 2,
    left: Tensor | Sequence[Tensor] | None = None,
    right: Tensor | Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    *,
    tolerance: float | None = None,
    power_dtype: torch.dtype | None = None,
) -> RandomizedSVD:
    """The ``rank`` leading singular triplets of ``L A R``, which is never formed.

    The Frobenius error of ``U diag(S) Vh`` is close to the least that any matrix of this rank has: within 1% on weights
    of trained models with the defaults, and closer with more ``power_iters`` or ``oversample``.

    Args:
        a: A, [m, n] or [..., m, n]; or a list of matrices of one shape, which are not copied together.
        rank: triplets wanted, 1 to the smaller side of ``L A R``. With ``tolerance``: the most that are allowed, None
            for no limit.
        oversample: test vectors beyond ``rank``; an eighth of the rank and at least 32 for None.
        power_iters: power (subspace) iterations; each costs two products with ``L A R`` and its transpose.
        left: L: None for the identity, [p, m], or [m] for a diagonal. One for all matrices of ``a``; one per matrix
            as a list, or as a tensor [..., p, m] with ``a``'s leading dimensions. Whether a matrix is triangular (a
            Cholesky factor) does not matter.
        right: R: None, [n, q], or [n], likewise.
        generator: where the 64-bit seed of the sketch comes from; torch's default generator for None. The same seed
            gives the same test vectors on every device and backend, and the same bits on one machine and thread count.
            All matrices of a batch share the test vectors.
        tolerance: instead of a fixed rank: the smallest rank found with ``||L A R - U diag(S) Vh||_F <= tolerance *
            ||L A R||_F``. One matrix only. The result's ``error_bound`` is an upper bound of the left side for the
            numbers returned, computed from them in float64 with all rounding errors accounted for: it holds whatever
            happened before. If ``rank`` is too small for the tolerance, the bound is above it. Tolerances below 5e-3
            (float32) compute in float64.
        power_dtype: dtype of all products but the last two. None chooses: one step below the input where the hardware
            makes that several times faster (float32 for float64; bfloat16 on GPUs and on CPUs with AVX512-BF16),
            checked against the spectrum met on the way and given up where the result would suffer. The dtype of the
            result forbids it.

    Returns:
        ``(U [..., p, rank], S [..., rank], Vh [..., rank, q])`` as ``torch.linalg.svd`` gives them: orthonormal
        columns and rows (also for singular values of zero), S descending. float64 if any input is float64, else
        float32, with float32 products and sums for half-precision inputs. No gradients. The leading dimension of a
        list comes first.

    Raises:
        TypeError: an input of a dtype other than float32, float16, bfloat16, float64.
        ValueError: shapes or devices that do not fit together, a NaN or an infinity in an input, a rank or tolerance
            out of range.

    Source: Halko, Martinsson, Tropp (SIAM Review 53, 2011), algorithm 5.1 with subspace iteration (4.4); bases by
    CholeskyQR2 with shifts; sketch and precisions in :mod:`taco_kernels.svd`.
    """
    matrices, batch = _matrices(a)
    if not matrices:
        raise ValueError(f"randomized_svd: a has shape {(*batch, '...')}; there is no matrix in it")
    first = matrices[0]
    if first.dtype not in FLOATS:
        raise TypeError(
            f"randomized_svd: a has dtype {first.dtype}; float32, float16, bfloat16 and float64 are supported"
        )
    lefts = _weights(left, "left", len(matrices), batch, first)
    rights = _weights(right, "right", len(matrices), batch, first)
    rows = first.shape[0] if lefts[0] is None else lefts[0].shape[0]
    columns = first.shape[1] if rights[0] is None else rights[0].shape[-1]
    most = min(rows, columns)
    if rank is None and tolerance is not None:
        rank = most
    if rank is None or not 1 <= rank <= most:
        raise ValueError(f"randomized_svd: rank must be 1 to {most} for a matrix of {rows} x {columns}, not {rank}")
    if oversample is None:
        oversample = max(_LEAST_OVERSAMPLE, rank // 8)
    if oversample < 0 or power_iters < 0:
        raise ValueError(
            f"randomized_svd: oversample ({oversample}) and power_iters ({power_iters}) cannot be negative"
        )
    # float16 has not the range for products that are not normalised
    if power_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"randomized_svd: power_dtype must be bfloat16, float32 or float64, not {power_dtype}")

    with exact_products(first.device), torch.no_grad():
        seed = draw_seed(generator)
        if tolerance is not None:
            if len(matrices) > 1:
                raise ValueError("randomized_svd: tolerance takes one matrix at a time, for ranks differ")
            return _with_tolerance(
                first.detach(), lefts[0], rights[0], rank, tolerance, oversample, power_iters, seed, batch
            )
        width = min(rank + oversample, most)
        dense: list[tuple[Tensor, Tensor, Tensor]] = []
        projections: list[Projection] = []
        exponents: list[int] = []
        for t, left_weight, right_weight in zip(matrices, lefts, rights, strict=True):
            m = Operand(t.detach(), left_weight, right_weight, None)
            m.low = _low_for(t, m.dtype, width, power_iters, power_dtype)
            exponents.append(m.exponent)
            if width == most:
                dense.append(_direct(m, rank))
            else:
                projections.append(project(m, width, power_iters, seed))
        if projections:
            # The small problems of a batch in one call; on a GPU they would wait for each other otherwise.
            cores = torch.stack([p.core for p in projections])
            p, sigma, w = small_svd(cores, rank, exact=projections[0].left.dtype == torch.float64)
            for index, projection in enumerate(projections):
                u, vh = vectors(projection, p[index], w[index])
                dense.append((u, sigma[index].to(u.dtype), vh))
        us, sigmas, vhs = zip(*dense, strict=True)
        sigmas = tuple(scaled(s, e).to(s.dtype) for s, e in zip(sigmas, exponents, strict=True))
        if not batch:
            return RandomizedSVD(us[0], sigmas[0], vhs[0])
        return RandomizedSVD(*(torch.stack(ts).view(*batch, *ts[0].shape) for ts in (us, sigmas, vhs)))


def _with_tolerance(
    a: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    rank: int,
    tolerance: float,
    oversample: int,
    power_iters: int,
    seed: int,
    batch: tuple[int, ...],
) -> RandomizedSVD:
    m = Operand(a, left, right, None)
    dtype = m.dtype
    smallest = _SMALLEST_TOLERANCE[dtype]
    if not smallest <= tolerance < 1:
        raise ValueError(f"randomized_svd: tolerance must be {smallest} to 1 for {dtype} results, not {tolerance}")
    if tolerance < IDENTITY_LIMIT[dtype]:
        m.dtype = torch.float64
    u, s, vh, error = adaptive_svd(m, rank, tolerance, oversample, power_iters, seed, dtype)
    found = RandomizedSVD(*(t.view(*batch, *t.shape) for t in (u, s, vh)))
    found.error_bound = error
    return found
