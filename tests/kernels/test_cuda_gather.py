"""The CUDA gather of many rows, run on the CPU under sanitizers, and what ``_cuda.gather`` hands to it."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
import sys

import pytest
import torch
from emulation_programs import built

from taco_kernels import _cuda, dispatch
from taco_kernels.pivoted_low_rank_linear import gathered

# (rows, width): less than a block and more, rows that fill a thread's share and do not
SIZES = [(1, 1), (3, 255), (8, 256), (9, 257), (20, 700), (16, 64)]


def test_against_indexing(tmp_path):
    program = built("gather_rows", tmp_path / "gather_rows")
    generator = torch.Generator().manual_seed(0)
    cases = []
    for rows, width in SIZES:
        for element, index in ((torch.int16, torch.int32), (torch.int32, torch.int64)):
            x = torch.randint(-9999, 9999, (rows, width + 3), generator=generator).to(element)[:, :width]
            cases.append((x, torch.randperm(width, generator=generator).to(index), width + rows % 2))
    bad = torch.tensor([4, -1, 5, 0, 2**31 - 1], dtype=torch.int64)  # what x has no column for
    cases.append((torch.arange(10).view(2, 5).to(torch.int16) + 1, bad, 5))
    with open(tmp_path / "calls", "wb") as file:
        for x, pivot, pitch in cases:
            rows, width = x.shape
            sizes = rows, width, x.stride(0), pitch, x.element_size(), pivot.element_size()
            file.write(struct.pack("<6q", *sizes))
            whole = torch.as_strided(x, ((rows - 1) * x.stride(0) + width,), (1,))
            file.write(whole.numpy().tobytes() + pivot.numpy().tobytes())
    command = [str(program), str(tmp_path / "calls"), str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    data = bytearray((tmp_path / "results").read_bytes())
    at = 0
    for x, pivot, pitch in cases:
        rows, width = x.shape
        flat = torch.frombuffer(data, dtype=x.dtype, count=(rows - 1) * pitch + width, offset=at)
        at += flat.numel() * flat.element_size()
        inside = (pivot >= 0) & (pivot < width)
        expected = torch.where(inside, x[:, pivot.long().clamp(0, width - 1)], 0)
        assert torch.equal(flat.as_strided((rows, width), (pitch, 1)), expected)
        assert (flat.as_strided((rows - 1, pitch - width), (pitch, 1), width) == -1).all(), "written beside a row"
    assert at == len(data)


class Extension:
    """Stands in for the extension: finds the tensors by their addresses in CPU memory."""

    def cuda_gather(self, x, x_stride, pivot, long_pivot, y, y_stride, rows, width, element, stream):
        assert element == 4 and stream == 77
        index = list(((ctypes.c_int64 if long_pivot else ctypes.c_int32) * width).from_address(pivot))
        for row in range(rows):
            source = (ctypes.c_float * width).from_address(x + row * x_stride * element)
            target = (ctypes.c_float * width).from_address(y + row * y_stride * element)
            for column, found in enumerate(index):
                target[column] = source[found]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_what_the_extension_is_handed(monkeypatch, index):
    monkeypatch.setattr(_cuda.native, "module", Extension())
    monkeypatch.setattr(_cuda, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    x, pivot = torch.randn(5, 20)[:, 3:13], torch.randperm(20)[::2].argsort().to(index)
    assert torch.equal(_cuda.gather(x, pivot), x[:, pivot.long()])
    deep = torch.randn(2, 3, 10)
    assert torch.equal(_cuda.gather(deep, pivot), deep[..., pivot.long()].view(6, 10))


def test_many_rows_on_a_gpu_go_to_it(monkeypatch):
    """A tensor said to be on a GPU; what the two parts are is the same as from torch."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    calls = []
    module = sys.modules[gathered.__module__]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "gather_on_gpu", lambda x, pivot: calls.append(pivot) or x[:, pivot])
    monkeypatch.setitem(dispatch._reasons, ("cuda", "cuda"), "")
    x, pivot = torch.randn(4, 6).as_subclass(OnGpu), torch.randperm(6)
    first, rest = gathered(x, pivot, 2)
    assert torch.equal(first, x[:, pivot[:2]]) and torch.equal(rest, x[:, pivot[2:]]) and len(calls) == 1
    monkeypatch.setitem(dispatch._reasons, ("cuda", "cuda"), "no kernels")
    gathered(x, pivot, 2)
    assert len(calls) == 1
