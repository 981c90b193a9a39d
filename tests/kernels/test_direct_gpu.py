"""Direct calls on a GPU, on one that is made of CPU memory (csrc/direct/emulation): what is served, and what is not.

The sources are those of the extension; only torch's tensors are said to lie elsewhere, and the CUDA kernels (tested in
``test_cuda_emulated.py``) are plain loops.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sysconfig
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import assert_within, bound, bridge_exact, linear_exact, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from taco_kernels import _cuda, direct, dispatch, native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
SOURCES = ("direct", "tensors", "gpu", "torch_c", "registered", "emulation/fake_gpu")
CPU, GPU = 1, 2  # DLPack's device types
PLENTY = 1 << 30

pytestmark = [
    pytest.mark.skipif(not direct.usable, reason=f"direct calls: {direct.reason}"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++, c++)"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("fake_gpu") / f"fake_gpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [str(COMPILER), "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DTACO_WITH_CUDA"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_paths()['include']}"]
    command += [str(ROOT / "csrc" / "direct" / f"{name}.cpp") for name in SOURCES]
    subprocess.run([*command, "-ldl", "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("fake_gpu", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsule = module.fake_api(torch.Tensor.__dlpack_c_exchange_api__)
    assert module.direct_setup(
        capsule, torch.Tensor, torch.nn.Parameter, direct._guards(), torch.get_num_threads, forward_ad.__dict__
    )
    return module


@pytest.fixture
def gpu(built: Any) -> Iterator[Any]:
    built.set(0, 0, PLENTY)
    built.direct_forget()
    built.direct_enable(True)
    with torch.no_grad():
        yield built
    assert built.noted()[-1] == 0  # every work space was given back


def some(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [random(shape, torch.float32) for shape in shapes]


def linear(lead: tuple[int, ...], dtype: torch.dtype = torch.float32, rank: int = 5, optional: bool = True) -> tuple:
    x, v, u = random((*lead, 23), dtype), random((rank, 23), dtype), random((19, rank), dtype)
    return x, v, u, random((19,), dtype) if optional else None, random((*lead, 19), dtype) if optional else None


def assert_linear(y: torch.Tensor, args: tuple) -> None:
    """As exact as rounding allows: the stand-in sums in float64, the bound is that of float32 sums."""
    exact, magnitude = linear_exact(*args)
    assert_within(y, exact, bound(exact, magnitude, 64, y.dtype, "cuda"))


def launches(gpu: Any) -> int:
    return gpu.noted()[0]


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("lead", [(1,), (3,), (2, 1, 8), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_is_direct_once_the_ordinary_way_has_served_it(
    gpu: Any, dtype: torch.dtype, lead: tuple[int, ...], optional: bool
) -> None:
    args = linear(lead, dtype, optional=optional)
    assert gpu.direct_low_rank_linear(*args) is None
    gpu.direct_remember("low_rank_linear", 1, *args)
    again = linear(lead, dtype, optional=optional)
    y = gpu.direct_low_rank_linear(*again)
    assert y.shape == (*lead, 19) and y.dtype == dtype and y.is_contiguous()
    assert_linear(y, again)
    _, rows, members, how, bytes_, _ = gpu.noted()
    assert (rows, members, how, bytes_) == (again[0].numel() // 23, 1, 1, 64 * again[0].numel() // 23)


def test_a_bridge_and_a_group(gpu: Any) -> None:
    h, v, u, bias = some((2, 4, 23), (6, 23), (23, 6), (23,))
    gpu.direct_remember("low_rank_bridge", 0, h, v, u, bias, 1e-5)
    y = gpu.direct_low_rank_bridge(h, v, u, bias, 1e-5)
    exact, magnitude = bridge_exact(h, v, u, bias, 1e-5)
    assert_within(y, exact, bound(exact, magnitude, 64, y.dtype, "cuda"))
    assert gpu.direct_low_rank_bridge(h, v, u, bias, 1) is None  # an integer: the ordinary way makes it a float

    vs, us = some((4, 23), (1, 23), (9, 23)), some((7, 4), (1, 1), (30, 9))
    group = h, vs, us, [None, *some((1,), (30,))]
    assert gpu.direct_low_rank_linear_group(*group) is None
    gpu.direct_remember("low_rank_linear_group", 0, *group)
    ys = gpu.direct_low_rank_linear_group(h, tuple(vs), us, group[3])
    for y, one, other, offset in zip(ys, *group[1:], strict=True):
        assert_linear(y, (h, one, other, offset, None))
    assert gpu.noted()[2] == 3


def test_only_what_was_served_is(gpu: Any) -> None:
    args = linear((3,))
    gpu.direct_remember("low_rank_linear", 0, *args)
    for other in (linear((4,)), linear((3,), torch.bfloat16), linear((3,), rank=6)):
        assert gpu.direct_low_rank_linear(*other) is None
    assert gpu.direct_low_rank_linear(*linear((3,), optional=False)) is not None  # same sizes
    x, v, u, bias, residual = args
    part = some((3, 30))[0][:, 2:25]  # rows further apart
    assert_linear(gpu.direct_low_rank_linear(part, v, u, bias, residual), (part, v, u, bias, residual))
    turned = v.T.contiguous().T
    assert gpu.direct_low_rank_linear(x, turned, u, bias, residual) is None
    gpu.direct_forget()
    assert gpu.direct_low_rank_linear(*args) is None


def test_the_library_keeps_what_it_serves(gpu: Any) -> None:
    args = linear((40,))
    gpu.direct_remember("low_rank_linear", 0, *args)  # more rows than a launch takes: the ordinary way makes several
    assert gpu.direct_low_rank_linear(*args) is None
    gpu.direct_remember("low_rank_linear", -1, *args)
    assert gpu.direct_low_rank_linear(*args) is False
    x, v, u = some((2, 23), (2, 23), (3, 2))
    five = x, [v] * 5, [u] * 5, [None] * 5  # more members as well
    gpu.direct_remember("low_rank_linear_group", 0, *five)
    assert gpu.direct_low_rank_linear_group(*five) is None


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_behind_a_pivot(gpu: Any, index: torch.dtype) -> None:
    x, v, u, bias, residual = some((3, 9), (4, 5), (7, 4), (7,), (3, 7))
    args = x, v, u, torch.randperm(9).to(index), bias, residual
    assert gpu.direct_pivoted_low_rank_linear(*args) is None
    gpu.direct_remember("pivoted_low_rank_linear", 0, *args)
    gathered, whole = x[:, args[3].long()], torch.cat([torch.eye(4), v], 1)
    assert_linear(gpu.direct_pivoted_low_rank_linear(*args), (gathered, whole, u, bias, residual))
    gpu.place(args[3].data_ptr(), CPU, 0)
    assert gpu.direct_pivoted_low_rank_linear(*args) is None


def test_an_mlp_takes_the_ordinary_way(gpu: Any) -> None:
    before = launches(gpu)
    x, gate_v, gate_u, up_v, up_u, down_v, down_u = some((2, 9), (2, 9), (5, 2), (2, 9), (5, 2), (2, 5), (9, 2))
    mlp = x, gate_v, gate_u, None, up_v, up_u, None, down_v, down_u, None, "silu"
    gpu.direct_remember("low_rank_mlp", 0, *mlp)
    assert gpu.direct_low_rank_mlp(*mlp) is None
    assert launches(gpu) == before
    with pytest.raises(TypeError, match="direct_remember"):
        gpu.direct_remember("low_rank_linear")


def test_tensors_must_be_on_the_current_device_all_of_them(gpu: Any) -> None:
    args = linear((3,))
    gpu.direct_remember("low_rank_linear", 0, *args)
    for number in range(5):
        gpu.set(0, 0, PLENTY)
        gpu.place(args[number].data_ptr(), CPU, 0)
        assert gpu.direct_low_rank_linear(*args) is None
        gpu.place(args[number].data_ptr(), GPU, 1)
        assert gpu.direct_low_rank_linear(*args) is None
    gpu.set(1, 0, PLENTY)  # all on the first device, another is current
    assert gpu.direct_low_rank_linear(*args) is None
    for tensor in args:
        gpu.place(tensor.data_ptr(), GPU, 1)
    # the results of this GPU are said to lie on the first one, and are not asked again where they are
    assert gpu.direct_low_rank_linear(*args) is not None


def test_errors_and_no_memory(gpu: Any) -> None:
    args = linear((3,))
    gpu.direct_remember("low_rank_linear", 0, *args)
    gpu.set(0, 700, PLENTY)
    with pytest.raises(RuntimeError, match="cuda: the launch failed"):
        gpu.direct_low_rank_linear(*args)
    gpu.set(0, 0, 0)  # of the work space: the ordinary way has the message
    assert gpu.direct_low_rank_linear(*args) is None
    gpu.set(0, 0, PLENTY)
    y = gpu.direct_low_rank_linear(*args)
    alive = weakref.ref(y)
    del y
    assert alive() is None


def test_results_are_blocks_of_torchs_allocator(gpu: Any) -> None:
    """Memory with an owner of its own, as DLPack hands it out, is none: `record_stream` would do nothing there."""
    args = linear((3,))
    gpu.direct_remember("low_rank_linear", 0, *args)
    assert gpu.direct_low_rank_linear(*args).untyped_storage().resizable()
    vs, us = some((4, 23), (1, 23)), some((7, 4), (1, 1))
    gpu.direct_remember("low_rank_linear_group", 0, args[0], vs, us, [None, None])
    for y in gpu.direct_low_rank_linear_group(args[0], vs, us, [None, None]):
        assert y.untyped_storage().resizable()


def test_what_asks_for_the_dispatcher_gets_it(gpu: Any) -> None:
    args = linear((3,))
    gpu.direct_remember("low_rank_linear", 0, *args)
    with torch.enable_grad():
        assert gpu.direct_low_rank_linear(*args) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert gpu.direct_low_rank_linear(*args) is None
    gpu.direct_enable(False)  # a backend is forced
    assert gpu.direct_low_rank_linear(*args) is None


def test_the_ordinary_way_tells_what_it_has_served(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct.native, "module", gpu)
    monkeypatch.setattr(_cuda, "_launch", _cuda.LAUNCHES["dependent"])
    args = linear((3,))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_forced", "cuda")
        direct.served("low_rank_linear", "cuda", *args)
    direct.served("low_rank_linear", "triton", *args)
    assert gpu.direct_low_rank_linear(*args) is None
    direct.served("low_rank_linear", "cuda", *args)
    assert gpu.direct_low_rank_linear(*args) is not None and gpu.noted()[3] == 1
    _cuda.set_launch("cooperative")
    assert gpu.direct_low_rank_linear(*args) is None  # it will be launched otherwise


@pytest.mark.parametrize(
    "op", ["low_rank_linear", "low_rank_bridge", "low_rank_linear_group", "pivoted_low_rank_linear"]
)
def test_every_op_tells(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that say they are on a GPU, and have no data."""
    module = importlib.import_module(f"taco_kernels.{op}")
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(direct, "served", lambda *args: told.append(args))
    monkeypatch.setattr(dispatch, "choose", lambda *args, **more: "cuda")
    table = "_BACKENDS" if op == "low_rank_bridge" else "BACKENDS"
    monkeypatch.setattr(module, table, {"cuda": lambda *args: "result"})
    with FakeTensorMode():
        x, v, u, rest = (torch.empty(shape, device="cuda") for shape in ((3, 8), (2, 8), (8, 2), (2, 6)))
        pivot = torch.empty(8, dtype=torch.int64, device="cuda")
        args: tuple[Any, ...] = {
            "low_rank_linear": (x, v, u, None, None),
            "low_rank_bridge": (x, v, u, None, 1e-6),
            "low_rank_linear_group": (x, [v], [u], [None]),
            "pivoted_low_rank_linear": (x, rest, u, pivot, None, None),
        }[op]
        assert module._compute(*args) == "result"
    assert len(told) == 1 and told[0][:2] == (op, "cuda") and len(told[0]) == 2 + len(args)


def test_calls_on_a_cpu_are_not_remembered() -> None:
    assert native.module is not None
    args = linear((3,))
    native.module.direct_remember("low_rank_linear", -1, *args)
    with torch.no_grad():
        assert isinstance(native.module.direct_low_rank_linear(*args), torch.Tensor)
