"""``singular_attribution``: what each singular direction of a weight contributes to a gradient.

Read top to bottom: reference -> backends -> registered op, fake -> public function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from taco_kernels import dispatch, native
from taco_kernels._factored import require_tensors
from taco_kernels._library import FLOATS, below_autograd, computing_dtype, define, exact_products, implement

__all__ = ["SingularAttribution", "singular_attribution", "singular_attribution_reference"]

# Rows that are widened to float32 at a time: bounds the copy of half-precision inputs to a few megabytes.
_CHUNK_ROWS = 4096
# Elements of one product that the C++ backend has at a time: both stay in a core's second-level cache.
_CPP_ELEMENTS = 1 << 17
# but no fewer rows than a matrix product needs to run at full speed
_CPP_MIN_ROWS = 256

_Sums = tuple[Tensor, Tensor, Tensor, Tensor]


class SingularAttribution(NamedTuple):
    """Sums over tokens t of ``p[t, k] = (grad[t] . u[:, k]) (x[t] . v[k])``; each field is [k], float32 or float64.

    signed: ``sum_t p``, which is dL/dsigma_k
    absolute: ``sum_t |p|``, which does not cancel between tokens
    squares: ``sum over sequences of (sum over the sequence's tokens of p)^2``, the diagonal Fisher information per
        sequence; each row counts as a sequence of its own where the input has no sequence dimension
    token_squares: ``sum_t p^2``, the same per token
    """

    signed: Tensor
    absolute: Tensor
    squares: Tensor
    token_squares: Tensor


# --- reference -------------------------------------------------------------------------------------------------------


def _wide(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for t in tensors:
        wide = torch.promote_types(wide, computing_dtype(t.dtype))
    return wide


def _rows(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """x [rows, in], grad [rows, out], number of sequences, tokens of each."""
    sequences, tokens = (x.shape[0], 1) if x.dim() == 2 else (x.shape[:-2].numel(), x.shape[-2])
    rows = sequences * tokens
    return x.reshape(rows, x.shape[-1]), grad.reshape(rows, grad.shape[-1]), sequences, tokens


def _in_chunks(x: Tensor, grad: Tensor, u: Tensor, v: Tensor, product: torch.dtype) -> _Sums:
    wide = _wide(x, grad, u, v)
    x, grad, sequences, tokens = _rows(x, grad)
    right, left = v.to(product).T, u.to(product)
    directions = u.shape[1]
    zeros = torch.zeros(directions, dtype=wide, device=x.device)
    signed, absolute, squares, token_squares = zeros, zeros.clone(), zeros.clone(), zeros.clone()
    # Chunks hold whole sequences wherever they fit, so that a sequence's sum is complete before it is squared.
    step = max(1, _CHUNK_ROWS // max(1, tokens))
    for start in range(0, sequences, step):
        rows = slice(start * tokens, min(start + step, sequences) * tokens)
        terms = (grad[rows].to(product) @ left).to(wide) * (x[rows].to(product) @ right)
        per_sequence = terms.view(min(step, sequences - start), tokens, directions).sum(1)
        signed = signed + per_sequence.sum(0)
        squares += per_sequence.square().sum(0)
        absolute += terms.abs().sum(0)
        token_squares += terms.square().sum(0)
    return signed, absolute, squares, token_squares


def singular_attribution_reference(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> SingularAttribution:
    """The specification: same arguments and result as :func:`singular_attribution`, in plain torch.

    Products and sums are float32 (float64 where any input is).
    """
    return SingularAttribution(*_in_chunks(x, grad, u, v, _wide(x, grad, u, v)))


# --- backends --------------------------------------------------------------------------------------------------------


def _product_dtype(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> torch.dtype:
    """bfloat16 where everything is; not float16, whose range gradients leave at both ends."""
    same = x.dtype == grad.dtype == u.dtype == v.dtype == torch.bfloat16
    return torch.bfloat16 if same else _wide(x, grad, u, v)


def _library(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> _Sums:
    return _in_chunks(x, grad, u, v, _product_dtype(x, grad, u, v))


def _cpp(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> _Sums:
    totals = torch.zeros((5, u.shape[1]), dtype=torch.float64, device=x.device)
    if not _multiplied_here(x, grad, u, v, totals):
        _multiplied_by_the_library(x, grad, u, v, totals)
    # an op's results share no memory
    signed, absolute, squares, token_squares = (row.float() for row in totals[:4])
    return signed, absolute, squares, token_squares


def _multiplied_here(x: Tensor, grad: Tensor, u: Tensor, v: Tensor, totals: Tensor) -> bool:
    """Adds to ``totals`` by a kernel that multiplies as well; False, and nothing done, where that does not pay.

    It does for 16-bit inputs: nothing is rounded between, where the library's products have the inputs' dtype, in about
    the same time (AVX-512) or a thirtieth of it (AVX2, where the library multiplies them slowly). Not on matrix units
    (AMX), which are several times faster. float32 inputs are the library's.
    """
    alike = x.dtype == grad.dtype == u.dtype == v.dtype
    if not alike or x.dtype == torch.float32 or rounds_products(x.dtype):
        return False
    x, grad, sequences, tokens = _rows(x, grad)
    x, grad, right, left = (t if t.stride(1) == 1 else t.contiguous() for t in (x, grad, v, u.T))
    return native.module.cpu_singular_attribution(  # type: ignore[union-attr]
        x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0), right.data_ptr(), right.stride(0), left.data_ptr(),
        left.stride(0), totals.data_ptr(), sequences * tokens, x.shape[1], grad.shape[1], right.shape[0],
        max(1, tokens), dispatch.CPP_DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip


def rounds_products(dtype: torch.dtype) -> bool:
    """Whether ``cpp`` leaves products of that dtype to the library, and so to its rounding, on this CPU."""
    return dtype == torch.bfloat16 and dispatch.isa == "avx512bf16" and not dispatch.multiplies_many_rows(dtype)


def _multiplied_by_the_library(x: Tensor, grad: Tensor, u: Tensor, v: Tensor, totals: Tensor) -> None:
    """Adds to ``totals``: a few rows at a time are multiplied, then our kernel takes all four sums in one pass."""
    product = _product_dtype(x, grad, u, v)
    x, grad, sequences, tokens = _rows(x, grad)
    right, left = v.to(product).T, u.to(product)
    directions = u.shape[1]
    rows = sequences * tokens
    step = min(rows, max(_CPP_MIN_ROWS, _CPP_ELEMENTS // max(1, directions)))
    work = torch.empty((2, step, directions), dtype=product, device=x.device)
    threads, code = torch.get_num_threads(), dispatch.CPP_DTYPES[product]
    for start in range(0, rows, max(1, step)):
        count = min(step, rows - start)
        first, second = work[0, :count], work[1, :count]
        torch.mm(grad[start : start + count].to(product), left, out=first)
        torch.mm(x[start : start + count].to(product), right, out=second)
        native.module.cpu_attribution(  # type: ignore[union-attr]
            first.data_ptr(), directions, second.data_ptr(), directions, totals.data_ptr(), count, directions, tokens,
            start % tokens, code, threads,
        )  # fmt: skip


def _triton(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> _Sums:
    # Imported here because triton takes a second to import and CPU users never need it.
    from taco_kernels.triton_kernels.singular_attribution import singular_attribution as kernel

    product = _product_dtype(x, grad, u, v)
    x, grad, sequences, tokens = _rows(x, grad)
    return kernel(x.to(product), grad.to(product), u.to(product), v.to(product), sequences, tokens)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], _Sums]] = {
    "reference": singular_attribution_reference,
    "library": _library,
    "cpp": _cpp,
    "triton": _triton,
}


def _choose(device_type: str, wide: torch.dtype) -> str:
    if dispatch.get_backend() == "cuda":
        raise RuntimeError("cuda: singular_attribution has no kernel in CUDA C++; use triton, library or reference")
    if dispatch.get_backend() is not None or wide == torch.float64:
        return dispatch.choose(device_type, wide, 1)
    if device_type == "cpu":
        return "cpp" if native.module is not None else "library"
    return "library" if dispatch.why_not("triton", device_type) else "triton"


def _check(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> None:
    require_tensors("singular_attribution", x=x, grad=grad, u=u, v=v)
    for name, t in (("x", x), ("grad", grad), ("u", u), ("v", v)):
        if t.dtype not in FLOATS:
            raise TypeError(f"singular_attribution: {name} has dtype {t.dtype}; a floating dtype is needed")
        if t.device != x.device:
            raise ValueError(f"singular_attribution: {name} is on {t.device}, but x is on {x.device}")
    if x.dim() < 2 or x.shape[:-1] != grad.shape[:-1]:
        raise ValueError(
            f"singular_attribution: x {tuple(x.shape)} and grad {tuple(grad.shape)} must be [..., tokens, in] and "
            "[..., tokens, out] with equal leading dimensions"
        )
    if u.dim() != 2 or u.shape[0] != grad.shape[-1]:
        raise ValueError(f"singular_attribution: u {tuple(u.shape)} must be [out, k] with out = {grad.shape[-1]}")
    if v.dim() != 2 or v.shape != (u.shape[1], x.shape[-1]):
        raise ValueError(f"singular_attribution: v {tuple(v.shape)} must be [k, in] = {(u.shape[1], x.shape[-1])}")


# --- registered op, fake ---------------------------------------------------------------------------------------------

_op = define("singular_attribution", "(Tensor x, Tensor grad, Tensor u, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)")


def _compute(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> _Sums:
    _check(x, grad, u, v)
    backend = _BACKENDS[_choose(x.device.type, _wide(x, grad, u, v))]
    with exact_products(x.device):
        return tuple(backend(x, grad, u, v))  # type: ignore[return-value]


def _fake(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> _Sums:
    _check(x, grad, u, v)
    wide = _wide(x, grad, u, v)
    one, two, three, four = (x.new_empty(u.shape[1], dtype=wide) for _ in range(4))
    return one, two, three, four


def _no_gradient(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> _Sums:
    """Sums of gradients are statistics: nothing is differentiated through them."""
    with below_autograd():
        sums: _Sums = _op(x, grad, u, v)
    return sums


implement("singular_attribution", compute=_compute, fake=_fake, autograd=_no_gradient)


# --- public function -------------------------------------------------------------------------------------------------


def singular_attribution(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> SingularAttribution:
    """Gradient of a loss with respect to the singular values of a linear layer's weight, per direction.

    For a layer ``y = x W^T`` with ``W = u diag(sigma) v`` and ``grad = dL/dy``, ``dL/dsigma_k`` is the k-th entry of
    ``diag(u^T G v^T)`` where ``G = grad^T x`` is the weight gradient. It is summed token by token, so that ``G`` (as
    large as the weight) is never formed; and per-token terms give sums that do not cancel.

    Args:
        x: [tokens, in], [batch, tokens, in], or [..., tokens, in]; the layer's input.
        grad: [tokens, out] and so on, of the same leading dimensions; dL/dy.
        u: [out, k], left singular vectors in columns, as ``torch.linalg.svd`` returns them.
        v: [k, in], right singular vectors in rows: the ``Vh`` of ``torch.linalg.svd``.

    Returns:
        Four vectors [k], float32 (float64 where any input is float64). Inputs of different dtypes are allowed:
        activations may be half precision while the singular vectors are float32; they are then multiplied in float32.
        Where all four are bfloat16, ``library`` and ``triton`` may round the two products to it once before they go
        into the sums (as may ``cpp`` on a CPU without AVX2 or with AMX), which are float32 or better in any case.
        For a 2-D ``x`` each token is a sequence of its own; otherwise the last but one dimension runs over a
        sequence's tokens. No gradient flows through.

    Raises:
        TypeError: a dtype that is not a supported float.
        ValueError: shapes or devices that do not fit together.
        RuntimeError: a forced backend that cannot serve the call (there is none in CUDA C++).

    Source: Taco-SVD (arXiv:2501.00339), gradient attribution of singular values; per-sequence squares as in the
    empirical Fisher information.
    """
    return SingularAttribution(*_op(x, grad, u, v))
