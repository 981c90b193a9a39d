"""What ``_cuda.low_rank`` hands to csrc/cuda: addresses, strides, sizes, how many rows and members at a time.

Without a GPU a stand-in for the extension takes the same arguments, finds the tensors by their addresses in CPU
memory, and computes with them; the kernels themselves are tested in ``test_cuda_emulated.py``.
"""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

from taco_kernels import _cuda
from taco_kernels.low_rank_linear_concat import _cuda as concat_cuda
from taco_kernels.low_rank_linear_concat import low_rank_linear_concat_reference
from taco_kernels.low_rank_linear_group import _cuda as group_cuda
from taco_kernels.low_rank_mlp import ACTIVATIONS, low_rank_mlp_reference
from taco_kernels.low_rank_mlp import _cuda as mlp_cuda
from taco_kernels.pivoted_low_rank_linear import _cuda as pivot_cuda
from taco_kernels.pivoted_low_rank_linear import pivoted_low_rank_linear_reference

CODES = {code: name for name, code in _cuda.GATES.items()}


def tensor_at(address, rows, columns, stride):
    """The float32 matrix that begins at an address, as a view of that memory."""
    size = (rows - 1) * stride + columns
    flat = torch.frombuffer((ctypes.c_float * size).from_address(address), dtype=torch.float32)
    return flat.as_strided((rows, columns), (stride, 1))


class Extension:
    """Stands in for ``taco_kernels._C``; notes every call's (rows, members, launch)."""

    CUDA_MAX_ROWS, CUDA_MAX_MEMBERS = 16, 4

    def __init__(self):
        self.calls = []

    def direct_forget(self):
        pass

    def cuda_low_rank_workspace_bytes(self, members, rows, in_size, gate, dtype):
        assert 1 <= rows <= 16 and 1 <= len(members) <= 4 and dtype == 0
        assert all(member[:7] == (0,) * 7 for member in members)
        return 64 * rows + sum(rank * (2 if pivot else 1) for *_, rank, _, pivot, _ in members)

    def cuda_low_rank(
        self, x, x_stride, members, residual, residual_stride, rows, in_size, gate, dtype, norm, eps, launch,
        workspace, workspace_bytes, stream,
    ):  # fmt: skip
        sizes = [(*[0] * 7, *member[7:]) for member in members]
        assert workspace_bytes == self.cuda_low_rank_workspace_bytes(sizes, rows, in_size, gate, dtype)
        assert workspace and stream == 77
        self.calls.append((rows, len(members), launch))
        x = tensor_at(x, rows, in_size, x_stride)
        if norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        results = []
        for v, v_stride, u, u_stride, bias, _, _, rank, out, pivot, long_pivot in members:
            behind, identity = x, 0
            if pivot:
                kind = ctypes.c_int64 if long_pivot else ctypes.c_int32
                gathered = x[:, list((kind * in_size).from_address(pivot))]
                identity, behind = gathered[:, :rank], gathered[:, rank:]
            t = behind @ tensor_at(v, rank, behind.shape[1], v_stride).T + identity
            y = t @ tensor_at(u, out, rank, u_stride).T
            y = y + (tensor_at(bias, 1, out, out) if bias else 0)
            results.append(y + (tensor_at(residual, rows, out, residual_stride) if residual else 0))
        if gate:
            results = [ACTIVATIONS[CODES[gate]](results[0]) * results[1]]
        for (*_, y, y_stride, _, out, _, _), result in zip(members, results, strict=False):
            tensor_at(y, rows, out, y_stride).copy_(result)


@pytest.fixture
def extension(monkeypatch):
    stand_in = Extension()
    monkeypatch.setattr(_cuda.native, "module", stand_in)
    monkeypatch.setattr(_cuda, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    monkeypatch.setenv("TACO_CUDA_LAUNCH", "dependent")
    _cuda.set_launch(None)
    _cuda._workspace_bytes.cache_clear()
    yield stand_in
    _cuda.set_launch(None)
    _cuda._workspace_bytes.cache_clear()


def projection(rank, columns, rows, bias=True):
    v = torch.randn(rank, columns + 3)[:, :columns]
    return v, torch.randn(rank, rows).T, torch.randn(2 * rows)[::2] if bias else None


def exact(x, v, u, bias):
    y = x.double() @ v.double().T @ u.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_one_linear_in_pieces_of_sixteen_rows(extension, rows):
    x, residual = torch.randn(rows, 15)[:, 2:12], torch.randn(7, rows).T
    v, u, bias = projection(4, 10, 7)
    (y,) = _cuda.low_rank(x, [_cuda.Member(v, u, bias)], residual)
    torch.testing.assert_close(y.double(), exact(x, v, u, bias) + residual.double(), rtol=1e-4, atol=1e-4)
    whole, rest = divmod(rows, 16)
    assert extension.calls == [(16, 1, 1)] * whole + [(rest, 1, 1)] * bool(rest)


def test_norm_and_leading_dimensions(extension):
    h, (v, u, _) = torch.randn(3, 2, 10), projection(4, 10, 10)
    (y,) = _cuda.low_rank(h, [_cuda.Member(v, u)], h, 1e-2)
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-2)
    torch.testing.assert_close(y.double(), exact(normed, v, u, None) + h.double(), rtol=1e-4, atol=1e-4)
    assert y.shape == h.shape


@pytest.mark.parametrize("count", [1, 3, 4, 6, 9])
def test_groups_in_pieces_of_four_members(extension, count):
    x = torch.randn(2, 9, 10)
    members = [projection(3 + i, 10, 5 + 2 * i, bias=i % 2 == 0) for i in range(count)]
    ys = group_cuda(x, *map(list, zip(*members, strict=True)))
    for y, member in zip(ys, members, strict=True):
        torch.testing.assert_close(y.double(), exact(x, *member), rtol=1e-4, atol=1e-4)
    pieces = [min(4, count - at) for at in range(0, count, 4)]
    assert extension.calls == [(rows, size, 1) for size in pieces for rows in (16, 2)]


def test_members_without_a_rank_have_no_kernel(extension):
    x = torch.randn(3, 10)
    members = [projection(2, 10, 5), projection(0, 10, 4), projection(3, 10, 6)]
    ys = group_cuda(x, *map(list, zip(*members, strict=True)))
    for y, member in zip(ys, members, strict=True):
        torch.testing.assert_close(y.double(), exact(x, *member), rtol=1e-4, atol=1e-4)
    assert extension.calls == [(3, 2, 1)]


@pytest.mark.parametrize("rows", [1, 17])
def test_side_by_side_with_pivots_and_without(extension, rows):
    x = torch.randn(rows, 15)[:, 2:12]
    indices = [torch.int32, None, torch.int64, None, torch.int32]
    members = []
    for i, index in enumerate(indices):
        rank, pivot = 2 + i, None if index is None else torch.randperm(10).to(index)
        members.append((*projection(rank, 10 if pivot is None else 10 - rank, 5 + 2 * i, bias=i % 2 == 0), pivot))
    arguments = list(map(list, zip(*members, strict=True)))
    y = concat_cuda(x, *arguments)
    torch.testing.assert_close(y, low_rank_linear_concat_reference(x, *arguments), rtol=1e-4, atol=1e-4)
    assert y.is_contiguous()
    assert extension.calls == [(count, size, 1) for size in (4, 1) for count in [16] * (rows > 16) + [1]]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mlp_is_two_calls(extension, act):
    x = torch.randn(20, 10)
    gate, up, down = projection(4, 10, 12), projection(3, 10, 12, bias=False), projection(5, 12, 10)
    y = mlp_cuda(x, gate, up, down, act)
    torch.testing.assert_close(y, low_rank_mlp_reference(x, gate, up, down, act), rtol=1e-3, atol=1e-3)
    assert [call[:2] for call in extension.calls] == [(16, 2), (4, 2), (16, 1), (4, 1)]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [1, 17])
def test_behind_a_pivot(extension, rows, index):
    x, residual, pivot = torch.randn(rows, 15)[:, 2:12], torch.randn(7, rows).T, torch.randperm(10).to(index)
    v, u, bias = projection(4, 6, 7)
    y = pivot_cuda(x, v, u, pivot, bias, residual)
    expected = pivoted_low_rank_linear_reference(x, v, u, pivot, bias, residual)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert extension.calls == [(16, 1, 1)] * (rows > 16) + [(1, 1, 1)]


def test_launch_is_chosen_by_name(extension, monkeypatch):
    x, member = torch.randn(1, 10), _cuda.Member(*projection(2, 10, 3))
    for name, code in _cuda.LAUNCHES.items():
        _cuda.set_launch(name)
        _cuda.low_rank(x, [member])
        assert extension.calls[-1][2] == code
    _cuda.set_launch(None)
    monkeypatch.setenv("TACO_CUDA_LAUNCH", "later")
    with pytest.raises(RuntimeError, match="'later'; choose one of cooperative, dependent"):
        _cuda.low_rank(x, [member])
