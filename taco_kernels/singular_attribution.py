"""``singular_attribution``: what each singular direction of a weight contributes to a gradient.

Plain torch on every device: the work is two thin products, which the libraries do well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from taco_kernels._library import FLOATS, computing_dtype

__all__ = ["SingularAttribution", "singular_attribution"]

# Rows that are widened to float32 at a time: bounds the copy of half-precision inputs to a few megabytes.
_CHUNK_ROWS = 4096


class SingularAttribution(NamedTuple):
    """Sums over tokens t of ``p[t, k] = (grad[t] . u[:, k]) (x[t] . v[k])``; each field is [k].

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
        activations may be half precision while the singular vectors are float32. For a 2-D ``x`` each token is a
        sequence of its own; otherwise the last but one dimension runs over a sequence's tokens.

    Raises:
        TypeError: a dtype that is not a supported float.
        ValueError: shapes or devices that do not fit together.

    Source: Taco-SVD (arXiv:2501.00339), gradient attribution of singular values; per-sequence squares as in the
    empirical Fisher information.
    """
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

    wide = torch.float32
    for t in (x, grad, u, v):
        wide = torch.promote_types(wide, computing_dtype(t.dtype))
    sequences, tokens = (x.shape[0], 1) if x.dim() == 2 else (x.shape[:-2].numel(), x.shape[-2])
    x = x.reshape(sequences * tokens, x.shape[-1])
    grad = grad.reshape(sequences * tokens, grad.shape[-1])
    right, left = v.to(wide).T, u.to(wide)

    directions = u.shape[1]
    zeros = torch.zeros(directions, dtype=wide, device=x.device)
    signed, absolute, squares, token_squares = zeros, zeros.clone(), zeros.clone(), zeros.clone()
    # Chunks hold whole sequences wherever they fit, so that a sequence's sum is complete before it is squared.
    step = max(1, _CHUNK_ROWS // max(1, tokens))
    for start in range(0, sequences, step):
        rows = slice(start * tokens, min(start + step, sequences) * tokens)
        product = (grad[rows].to(wide) @ left) * (x[rows].to(wide) @ right)
        per_sequence = product.view(-1, tokens, directions).sum(1) if tokens else product.new_zeros(1, directions)
        signed = signed + per_sequence.sum(0)
        squares += per_sequence.square().sum(0)
        absolute += product.abs().sum(0)
        token_squares += product.square().sum(0)
    return SingularAttribution(signed, absolute, squares, token_squares)
