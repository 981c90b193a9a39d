"""Products with ``M = L A R`` and its transpose, without forming M, in full or in low precision.

Bases are rows: ``forward(x)`` is ``x M^T`` ([r, columns] -> [r, rows]), ``backward(y)`` is ``y M``.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from taco_kernels import dispatch, native
from taco_kernels.svd import sketch

__all__ = ["Operand", "low_precision", "product", "scaled"]

# Half-precision matrices are widened this many bytes at a time, so that no float32 copy of them exists.
_PANEL_BYTES = 32 * 2**20
# A product this small is over before oneDNN has picked a kernel.
_ONEDNN_FLOPS = 2e6


@functools.cache
def _has_onednn() -> bool:
    """Whether torch offers oneDNN's float32 product (a private operator, so it is tried out first)."""
    try:
        x = torch.ones(2, 2)
        return bool(torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "").sum() == 8)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


def product(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T`` of x [r, k] and w [n, k] (a transposed view is as good), both of one dtype."""
    # torch gives float32 products on CPUs to MKL, which uses half of the vector unit on processors not of Intel's
    # make; oneDNN uses all of it (measured: twice as fast on Zen 5, no slower elsewhere).
    large = x.dtype == torch.float32 and x.device.type == "cpu" and 2 * x.numel() * w.shape[0] > _ONEDNN_FLOPS
    if large and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return x @ w.T


def scaled(x: Tensor, exponent: int) -> Tensor:
    """``2^exponent x`` in float64; exponents of three matrices add up to powers of two that no dtype holds."""
    if not exponent:
        return x.double()
    half = max(-1000, min(1000, exponent // 2))
    return x.double() * 2.0**half * 2.0 ** max(-1000, min(1000, exponent - half))


def low_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype that power iterations are several times faster in on this device; None where there is none."""
    if dtype == torch.float64:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else None
    if device.type == "cpu" and native.module is not None and "avx512bf16" in native.module.cpu_isas():
        return torch.bfloat16
    return None


def _triton_sketch(device: torch.device) -> bool:
    if dispatch.get_backend() in ("reference", "library", "cpp"):
        return False
    if device.type == "cpu":  # the interpreter, for tests: only where it was asked for
        return dispatch.get_backend() == "triton"
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _widened_product(x: Tensor, w: Tensor) -> Tensor:
    """``x w`` in x's dtype, w widened a panel at a time: a wide copy of all of it may not fit."""
    if w.dtype == x.dtype:
        return product(x, w.T)
    step = max(1, _PANEL_BYTES // max(1, x.element_size() * w.shape[1]))
    found = x.new_zeros((x.shape[0], w.shape[1]))
    for begin in range(0, w.shape[0], step):
        rows = slice(begin, begin + step)
        found += product(x[:, rows], w[rows].to(x.dtype).T)
    return found


class Operand:
    """``M = L A R`` [rows, columns] for A [m, n]; L is None, [m] (a diagonal) or [rows, m]; R None, [n], [n, columns].

    Attributes:
        dtype: float32, or float64 where one of the three is; what full precision means here.
        low: the dtype of low precision, or None.
        exponent: M is 2^exponent times what the products compute: entries near one keep sums of squares in range.
    """

    def __init__(self, a: Tensor, left: Tensor | None, right: Tensor | None, low: torch.dtype | None) -> None:
        tensors = [t for t in (left, a, right) if t is not None]
        wide = any(t.dtype == torch.float64 for t in tensors)
        self.dtype = torch.float64 if wide else torch.float32
        self.low = low
        self.device = a.device
        self.exponent = 0
        # Squares of M's entries, summed over a column, must neither overflow nor vanish: 2^127 for float32, which
        # float64 iterates in.
        limit = 40 // len(tensors)
        self._a, self._left, self._right = (
            None if t is None else self._near_one(t, name, limit)
            for t, name in ((a, "a"), (left, "left"), (right, "right"))
        )
        self.rows = a.shape[0] if left is None else left.shape[0]
        self.columns = a.shape[1] if right is None else right.shape[-1]
        # Length of the sums inside M, for error bounds.
        self.inner = sum(t.shape[axis] for t, axis in ((left, -1), (right, 0)) if t is not None and t.dim() == 2)
        self._lowered: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def weighted(self) -> bool:
        return self._left is not None or self._right is not None

    def _near_one(self, t: Tensor, name: str, limit: int) -> Tensor:
        if not t.numel():
            return t
        low, high = (float(value) for value in torch.aminmax(t))
        largest = max(abs(low), abs(high))
        if not math.isfinite(largest):
            raise ValueError(f"randomized_svd: {name} holds a NaN or an infinity")
        exponent = math.frexp(largest)[1] if largest else 0
        if abs(exponent) <= limit:
            return t
        self.exponent += exponent
        # In two steps: 2^-exponent alone may lie outside the range.
        half = -exponent // 2
        return t.to(self.dtype) * 2.0**half * 2.0 ** (-exponent - half)

    def _lower(self, w: Tensor) -> Tensor:
        if w.dtype == self.low:
            return w
        if id(w) not in self._lowered:
            # The original is kept beside its copy, or another tensor might come to have its id.
            self._lowered[id(w)] = (w, w.to(self.low))
        return self._lowered[id(w)][1]

    def drop_low(self) -> None:
        """Frees the copies in low precision; full precision only from here on."""
        self._lowered.clear()
        self.low = None

    def _times(self, x: Tensor, w: Tensor | None, transposed: bool, low: bool) -> Tensor:
        """``x w^T``, or ``x w`` when ``transposed``."""
        if w is None:
            return x
        if w.dim() == 1:
            return (x.to(self.dtype) * w.to(self.dtype)).to(x.dtype)
        if low:
            assert self.low is not None
            w = self._lower(w)
            return product(x.to(self.low), w.T if transposed else w)
        x = x.to(self.dtype)
        if w.dtype == self.dtype:
            return product(x, w.T if transposed else w)
        step = max(1, _PANEL_BYTES // max(1, w.shape[1] * self.dtype.itemsize))
        if transposed:
            out = x.new_zeros(x.shape[0], w.shape[1])
            for panel, part in zip(w.split(step), x.split(step, dim=1), strict=True):
                out += product(part, panel.to(self.dtype).T)
            return out
        return torch.cat([product(x, panel.to(self.dtype)) for panel in w.split(step)], dim=1)

    def forward(self, x: Tensor, low: bool = False) -> Tensor:
        """``x M^T``, in ``self.low`` if ``low``, else in ``self.dtype``."""
        for w in (self._right, self._a, self._left):
            x = self._times(x, w, False, low)
        return x

    def backward(self, y: Tensor, low: bool = False) -> Tensor:
        """``y M``."""
        for w in (self._left, self._a, self._right):
            y = self._times(y, w, True, low)
        return y

    def panel(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows ``begin`` to ``end`` of M, formed in ``dtype``."""
        left, a, right = self._left, self._a, self._right
        assert a is not None
        if left is None:
            rows = a[begin:end].to(dtype)
        elif left.dim() == 1:
            rows = left[begin:end, None].to(dtype) * a[begin:end].to(dtype)
        else:
            rows = _widened_product(left[begin:end].to(dtype), a)
        if right is None:
            return rows
        return rows * right.to(dtype) if right.dim() == 1 else _widened_product(rows, right)

    def panels(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that :meth:`panel` forms in bounded memory."""
        # Not too few: each panel of a weighted M reads all of A and R.
        step = max(512, _PANEL_BYTES // max(1, 8 * self.columns))
        for begin in range(0, self.rows, step):
            yield begin, min(begin + step, self.rows)

    def sizes(self) -> list[float]:
        """Frobenius norms of L, A and R (largest magnitude of a diagonal), those that are there, in float64."""
        found = []
        for t in (self._left, self._a, self._right):
            if t is not None:
                order = float("inf") if t.dim() == 1 else 2
                found.append(float(torch.linalg.vector_norm(t, order, dtype=torch.float64)))
        return found

    def sketch(self, vectors: tuple[int, int], seed: int, low: bool = False) -> Tensor:
        """``Omega M^T`` for test vectors ``vectors[0] .. vectors[1]`` of the seed.

        Omega is made inside the product: tile by tile in registers on a GPU, panel by panel elsewhere.
        """
        diagonal = self._right if self._right is not None and self._right.dim() == 1 else None
        matrix = self._a if self._right is None or diagonal is not None else self._right
        assert matrix is not None
        rest = (self._a, self._left) if matrix is self._right else (self._left,)
        kind = self.low if low and self.low is not None else self.dtype
        if _triton_sketch(self.device) and self.dtype != torch.float64:
            from taco_kernels.triton_kernels.sketch import sketch_product

            x = sketch_product(matrix, diagonal, vectors, seed, kind)
        else:
            x = self._sketch_by_panels(matrix, diagonal, vectors, seed, kind)
        for w in rest:
            x = self._times(x, w, False, low)
        return x

    def _sketch_by_panels(
        self, matrix: Tensor, diagonal: Tensor | None, vectors: tuple[int, int], seed: int, kind: torch.dtype
    ) -> Tensor:
        count, size = vectors[1] - vectors[0], matrix.shape[1]
        step = max(1, _PANEL_BYTES // max(1, count * kind.itemsize) // sketch.BLOCK) * sketch.BLOCK
        total: Tensor | None = None
        for start in range(0, size, step):
            stop = min(start + step, size)
            omega = sketch.fill(vectors, (start, stop), seed, kind, self.device)
            if diagonal is not None:
                omega = (omega.to(self.dtype) * diagonal[start:stop].to(self.dtype)).to(kind)
            # Lowered before it is sliced: a slice is a new tensor each time.
            source = matrix if kind == self.dtype else self._lower(matrix)
            part = self._times(omega, source[:, start:stop], False, kind != self.dtype)
            total = part if total is None else total.to(self.dtype).add_(part)
        assert total is not None
        return total
