"""Calls into csrc/cuda: addresses, strides, work space from torch's allocator, the current stream."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from taco_kernels import dispatch, native
from taco_kernels._library import rows_of

__all__ = ["GATES", "LAUNCHES", "Member", "gather", "launch", "low_rank", "set_launch"]

GATES = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4}
"""codes of the gated form's activations in ``csrc/``"""

LAUNCHES = {"cooperative": 0, "dependent": 1}
"""how the two products of a call follow each other: one kernel with a grid-wide barrier, or two kernels of which the
second starts early (programmatic dependent launch, Hopper and later)"""


class Member(NamedTuple):
    """One factorised linear: v [rank, in], u [out, rank], bias [out].

    With a ``pivot`` [in], int32 or int64, v is [rank, in - rank] and multiplies x[..., pivot[rank:]], and
    x[..., pivot[:rank]] is added to that; an index out of range reads zero.
    """

    v: Tensor
    u: Tensor
    bias: Tensor | None = None
    pivot: Tensor | None = None

    def readable(self) -> Member:
        """The same with rows, bias and pivot that lie as the kernels read them."""
        v, u = (t if t.stride(1) == 1 else t.contiguous() for t in (self.v, self.u))
        return Member(v, u, *(None if t is None else t.contiguous() for t in (self.bias, self.pivot)))


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
def _workspace_bytes(device: int, rows: int, in_size: int, gate: int, dtype: int, *sizes: tuple[int, int, bool]) -> int:
    """Bytes of work space on the current device, which must be ``device`` (part of the key: GPUs differ).

    ``sizes`` are (rank, out, whether there is a pivot) of each member.
    """
    members = [(0, 0, 0, 0, 0, 0, 0, rank, out, int(pivot), False) for rank, out, pivot in sizes]
    module = native.module
    assert module is not None
    return int(module.cuda_low_rank_workspace_bytes(members, rows, in_size, gate, dtype))


def _on(device: int) -> AbstractContextManager[object]:
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


def gather(x: Tensor, pivot: Tensor) -> Tensor:
    """``x[..., pivot]`` with the leading dimensions flattened; zero where x has no such column.

    x [..., width] of elements of 2 or 4 bytes on a GPU, no dimension of size 0; pivot [width], int32 or int64. Raises
    RuntimeError with CUDA's message when the launch fails.
    """
    module = native.module
    assert module is not None
    x, rows, stride = rows_of(x)
    pivot = pivot.contiguous()
    y = x.new_empty((rows, x.shape[-1]))
    device = x.get_device()
    with _on(device):
        module.cuda_gather(
            x.data_ptr(), stride, pivot.data_ptr(), pivot.dtype == torch.int64, y.data_ptr(), y.stride(0), *y.shape,
            x.element_size(), torch._C._cuda_getCurrentRawStream(device),
        )  # fmt: skip
    return y


def low_rank(
    x: Tensor,
    members: Sequence[Member],
    residual: Tensor | None = None,
    eps: float | None = None,
    act: str | None = None,
    together: bool = False,
) -> list[Tensor]:
    """``scale * (x v^T) u^T + bias + residual`` for every member; the results, in order.

    scale is the inverse root mean square of x's rows if ``eps`` is given (not with a pivot). x [..., in], residual
    [..., out] (with one member only) and the members' tensors but the pivots are of one dtype (float32, float16,
    bfloat16) on one GPU, no dimension of size 0. With ``act`` there are two members of one width and one result,
    act(first) * second. More rows or members than one launch takes are done in several. Results are contiguous, or,
    ``together``, one that has them side by side. Raises RuntimeError with CUDA's message when a launch fails.
    """
    module = native.module
    assert module is not None  # the dispatcher has asked
    how = launch()
    widths = [member.u.shape[0] for member in members[: 1 if act else None]]
    ys = [x.new_empty((*x.shape[:-1], width)) for width in ([sum(widths)] if together else widths)]
    places = list(ys[0].split(widths, dim=-1)) if together else ys
    x, rows, x_stride = rows_of(x)
    in_size = x.shape[-1]
    # The names keep every temporary copy alive until the launches are on the stream.
    members = [member.readable() for member in members]
    residual_ptr = residual_stride = 0
    if residual is not None:
        residual, _, residual_stride = rows_of(residual)
        residual_ptr = residual.data_ptr()
    device, dtype, size = x.get_device(), dispatch.CPP_DTYPES[x.dtype], x.element_size()
    gate = GATES[act]
    most, at_once = int(module.CUDA_MAX_ROWS), int(module.CUDA_MAX_MEMBERS)
    with _on(device):
        stream = torch._C._cuda_getCurrentRawStream(device)
        for start in range(0, len(members), at_once):
            some = members[start : start + at_once]
            sizes = [(m.u.shape[1], m.u.shape[0], m.pivot is not None) for m in some]
            for first in range(0, rows, most):
                count = min(most, rows - first)
                # Freed on return, while the kernel may still run: the allocator gives it to this stream only, in order.
                needed = _workspace_bytes(device, count, in_size, gate, dtype, *sizes)
                workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
                parts = [_part(m, places[0 if act else start + i], first) for i, m in enumerate(some)]
                module.cuda_low_rank(
                    x.data_ptr() + first * x_stride * size, x_stride, parts,
                    residual_ptr and residual_ptr + first * residual_stride * size, residual_stride, count, in_size,
                    gate, dtype, eps is not None, eps or 0.0, how, workspace.data_ptr(), needed, stream,
                )  # fmt: skip
    return ys


def _part(member: Member, y: Tensor, first: int) -> tuple[int, int, int, int, int, int, int, int, int, int, bool]:
    """What the extension takes of a member whose result's rows from ``first`` on are computed."""
    v, u, bias, pivot = member
    y_stride = y.stride(-2) if y.dim() > 1 else y.shape[-1]
    return (
        v.data_ptr(), v.stride(0), u.data_ptr(), u.stride(0), 0 if bias is None else bias.data_ptr(),
        y.data_ptr() + first * y_stride * y.element_size(), y_stride, u.shape[1], u.shape[0],
        0 if pivot is None else pivot.data_ptr(), pivot is not None and pivot.dtype == torch.int64,
    )  # fmt: skip
