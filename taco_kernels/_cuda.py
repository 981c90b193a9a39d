"""Calls into csrc/cuda: addresses, strides, work space from torch's allocator, the current stream."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from taco_kernels import dispatch, native
from taco_kernels._library import rows_of

__all__ = ["GATES", "LAUNCHES", "launch", "low_rank", "set_launch"]

GATES = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4}
"""codes of the gated form's activations in ``csrc/``"""

LAUNCHES = {"cooperative": 0, "dependent": 1}
"""how the two products of a call follow each other: one kernel with a grid-wide barrier, or two kernels of which the
second starts early (programmatic dependent launch, Hopper and later)"""

Member = tuple[Tensor, Tensor, "Tensor | None"]
"""(v, u, bias) of one factorised linear"""


def _default_launch() -> int:
    """What ``TACO_CUDA_LAUNCH`` says, else what was faster where this kind of GPU was measured, else cooperative."""
    name = os.environ.get("TACO_CUDA_LAUNCH", "").strip().lower()
    if not name:
        from taco_kernels.triton_kernels.config import content

        name = content(torch.cuda.get_device_name()).get("cuda_launch", "cooperative")
    if name not in LAUNCHES:
        raise RuntimeError(f"TACO_CUDA_LAUNCH is {name!r}; choose one of {', '.join(LAUNCHES)}")
    return LAUNCHES[name]


_launch: int | None = None


def set_launch(name: str | None) -> None:
    """Forces one of ``LAUNCHES`` for later calls; None gives the choice back to ``_default_launch``."""
    global _launch
    _launch = None if name is None else LAUNCHES[name]
    if native.module is not None:
        native.module.direct_forget()


def launch() -> int:
    """The code of the launch that calls are made with."""
    global _launch
    if _launch is None:
        _launch = _default_launch()
    return _launch


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    device: int, rows: int, in_size: int, gate: int, dtype: int, pivot: bool, *sizes: tuple[int, int]
) -> int:
    """Bytes of work space on the current device, which must be ``device`` (part of the key: GPUs differ).

    ``sizes`` are (rank, out) of each member.
    """
    members = [(0, 0, 0, 0, 0, 0, rank, out) for rank, out in sizes]
    module = native.module
    assert module is not None
    return int(module.cuda_low_rank_workspace_bytes(members, rows, in_size, gate, dtype, pivot))


def _on(device: int) -> AbstractContextManager[object]:
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


def _rows(factor: Tensor) -> Tensor:
    return factor if factor.stride(1) == 1 else factor.contiguous()


def low_rank(
    x: Tensor,
    members: Sequence[Member],
    residual: Tensor | None = None,
    eps: float | None = None,
    act: str | None = None,
    pivot: Tensor | None = None,
) -> list[Tensor]:
    """``scale * (x v^T) u^T + bias + residual`` for every (v, u, bias); the results, in order.

    scale is the inverse root mean square of x's rows if ``eps`` is given. x [..., in], v [rank, in], u [out, rank],
    bias [out], residual [..., out] (with one member only) of one dtype (float32, float16, bfloat16) on one GPU, no
    dimension of size 0. With ``act`` there are two members of one width and one result, act(first) * second. With a
    ``pivot`` [in], int32 or int64, there is one member, v is [rank, in - rank] and multiplies x[..., pivot[rank:]], and
    x[..., pivot[:rank]] is added to that; an index out of range reads zero, and ``eps`` is not given. More rows or
    members than one launch takes are done in several. Results are contiguous; raises RuntimeError with CUDA's
    message when a launch fails.
    """
    module = native.module
    assert module is not None  # the dispatcher has asked
    how = launch()
    widths = [u.shape[0] for _, u, _ in members[: 1 if act else None]]
    ys = [torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device) for width in widths]
    x, rows, x_stride = rows_of(x)
    in_size = x.shape[-1]
    pivot_ptr, long_pivot = 0, False
    if pivot is not None:
        pivot = pivot.contiguous()
        pivot_ptr, long_pivot = pivot.data_ptr(), pivot.dtype == torch.int64
        in_size -= members[0][0].shape[0]
    # The names keep every temporary copy alive until the launches are on the stream.
    factors = [(_rows(v), _rows(u), None if bias is None else bias.contiguous()) for v, u, bias in members]
    residual_ptr = residual_stride = 0
    if residual is not None:
        residual, _, residual_stride = rows_of(residual)
        residual_ptr = residual.data_ptr()
    device, dtype, size = x.get_device(), dispatch.CPP_DTYPES[x.dtype], x.element_size()
    gate = GATES[act]
    most, at_once = int(module.CUDA_MAX_ROWS), int(module.CUDA_MAX_MEMBERS)
    with _on(device):
        stream = torch._C._cuda_getCurrentRawStream(device)
        for start in range(0, len(factors), at_once):
            some = factors[start : start + at_once]
            sizes = [(u.shape[1], u.shape[0]) for _, u, _ in some]
            for first in range(0, rows, most):
                count = min(most, rows - first)
                # Freed on return, while the kernel may still run: the allocator gives it to this stream only, in order.
                needed = _workspace_bytes(device, count, in_size, gate, dtype, pivot is not None, *sizes)
                workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
                parts = [
                    (
                        v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), 0 if bias is None else bias.data_ptr(),
                        ys[0 if act else start + i].data_ptr() + first * u.shape[0] * size, *sizes[i],
                    )
                    for i, (v, u, bias) in enumerate(some)
                ]  # fmt: skip
                module.cuda_low_rank(
                    x.data_ptr() + first * x_stride * size, x_stride, parts,
                    residual_ptr and residual_ptr + first * residual_stride * size, residual_stride, count, in_size,
                    gate, dtype, eps is not None, eps or 0.0, how, workspace.data_ptr(), needed, stream,
                    pivot_ptr, long_pivot,
                )  # fmt: skip
    return ys
