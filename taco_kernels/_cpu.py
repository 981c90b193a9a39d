"""What the op files pass to ``csrc/cpu`` for several factorised linears at once: addresses and sizes, in its order."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

__all__ = ["Map", "map_of"]

Map: TypeAlias = tuple[int, int, int, int, int, int, int, int]
"""(v, v_stride, u, u_stride, bias, y, rank, out); 0 stands for a bias or y that is not there"""


def map_of(v: Tensor, u: Tensor, bias: Tensor | None, y: Tensor | None, keep: list[Tensor]) -> Map:
    """The numbers of one linear. Copies that had to be made go into ``keep``, which must outlive the call."""
    if v.stride(1) != 1:
        v = v.contiguous()
        keep.append(v)
    if u.stride(1) != 1:
        u = u.contiguous()
        keep.append(u)
    bias_ptr = 0
    if bias is not None:
        if bias.stride(0) != 1:
            bias = bias.contiguous()
            keep.append(bias)
        bias_ptr = bias.data_ptr()
    out, rank = u.shape
    y_ptr = 0 if y is None else y.data_ptr()
    return v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), bias_ptr, y_ptr, rank, out
