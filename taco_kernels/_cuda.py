"""Calls into csrc/cuda: addresses, strides, work space from torch's allocator, the current stream."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from taco_kernels import dispatch, native
from taco_kernels._library import rows_of

__all__ = ["low_rank"]


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(device: int, rows: int, in_size: int, rank: int, out_size: int, dtype: int) -> int:
    """Bytes of work space on the current device, which must be ``device`` (part of the key: GPUs differ)."""
    return int(native.module.cuda_low_rank_workspace_bytes(rows, in_size, rank, out_size, dtype))  # type: ignore[union-attr]


def _on(device: int) -> AbstractContextManager[object]:
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


def low_rank(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float | None
) -> Tensor:
    """``scale * (x v^T) u^T + bias + residual``; scale is the inverse root mean square of x's rows if ``eps`` is given.

    x [..., in], v [rank, in], u [out, rank], bias [out], residual [..., out] of one dtype (float32, float16, bfloat16)
    on one GPU, no dimension of size 0. More rows than one launch takes are done in several. With ``eps`` the residual
    is x itself. Returns [..., out], contiguous; raises RuntimeError with CUDA's message when the launch fails.
    """
    module = native.module
    assert module is not None  # the dispatcher has asked
    out_size, rank = u.shape
    y = torch.empty((*x.shape[:-1], out_size), dtype=x.dtype, device=x.device)
    x, rows, x_stride = rows_of(x)
    in_size = x.shape[-1]
    if v.stride(1) != 1:
        v = v.contiguous()
    if u.stride(1) != 1:
        u = u.contiguous()
    bias_ptr = residual_ptr = residual_stride = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_ptr = bias.data_ptr()
    if residual is not None:
        residual, _, residual_stride = rows_of(residual)
        residual_ptr = residual.data_ptr()
    device, dtype, size = x.get_device(), dispatch.CPP_DTYPES[x.dtype], x.element_size()
    most = int(module.CUDA_MAX_ROWS)
    with _on(device):
        stream = torch._C._cuda_getCurrentRawStream(device)
        for first in range(0, rows, most):
            count = min(most, rows - first)
            # Freed on return, while the kernel may still run: the allocator gives it to this stream only, in order.
            bytes_needed = _workspace_bytes(device, count, in_size, rank, out_size, dtype)
            workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=x.device)
            x_ptr = x.data_ptr() + first * x_stride * size
            y_ptr = y.data_ptr() + first * out_size * size
            if eps is not None:
                module.cuda_low_rank_bridge(
                    x_ptr, x_stride, v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), bias_ptr, y_ptr,
                    count, in_size, rank, eps, dtype, workspace.data_ptr(), bytes_needed, stream,
                )  # fmt: skip
            else:
                rest_ptr = residual_ptr and residual_ptr + first * residual_stride * size
                module.cuda_low_rank_linear(
                    x_ptr, x_stride, v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), bias_ptr, rest_ptr,
                    residual_stride, y_ptr, count, in_size, rank, out_size, dtype, workspace.data_ptr(),
                    bytes_needed, stream,
                )  # fmt: skip
    return y
