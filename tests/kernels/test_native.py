"""The extension itself: loading, threads, reproducibility, rounding, and memory it must not touch."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import DTYPES, HALF, random, using

import taco_kernels
from taco_kernels import dispatch, low_rank_bridge, low_rank_linear, low_rank_linear_group, low_rank_mlp, native

pytestmark = pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")

ISAS = [] if native.module is None else native.module.cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    with using(f"cpp:{request.param}"):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_baseline_is_always_there():
    assert native.module.compiled_cpu_isas()[-1] == "baseline"
    assert ISAS[-1] == "baseline"
    assert set(ISAS) <= set(native.module.compiled_cpu_isas())


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"'sse9' is not available here; choose one of auto, .*baseline"):
        native.module.set_cpu_isa("sse9")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_one_openmp_runtime_that_follows_torch():
    code = """
import torch, taco_kernels
from taco_kernels import native
x = torch.randn(64, 512)
(x @ x.T).relu().sum()
taco_kernels.set_backend("cpp")
taco_kernels.low_rank_linear(x[:4], torch.randn(512, 512), torch.randn(512, 512))
torch.set_num_threads(3); a = native.module.omp_threads()
torch.set_num_threads(1); b = native.module.omp_threads()
print(len(native.omp_libraries_in_process()), a, b)
"""
    assert run(code) in ("1 3 1",)


def test_missing_extension_leaves_the_package_usable():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "taco_kernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, taco_kernels
print(taco_kernels.low_rank_linear(torch.ones(1, 4), torch.ones(2, 4), torch.ones(1, 2)).item())
try:
    taco_kernels.set_backend("cpp")
except RuntimeError as error:
    print(error)
"""
    lines = run(code).splitlines()
    assert lines[0] == "8.0"
    assert lines[1].startswith("cpp: extension was not built")


def test_broken_extension_leaves_the_package_usable():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "taco_kernels._C":
            raise ImportError("undefined symbol: nothing_like_it")
sys.meta_path.insert(0, Block())
import torch, taco_kernels
print(taco_kernels.low_rank_bridge(torch.ones(1, 4), torch.zeros(2, 4), torch.ones(4, 2)).sum().item())
print(taco_kernels.backends()["cpp"])
"""
    lines = run(code).splitlines()
    assert lines[0] == "4.0"
    assert "undefined symbol: nothing_like_it" in lines[1]


def test_extension_binds_to_whatever_openmp_is_there():
    """Alone it must fail with a missing symbol, not bring a runtime of its own; with one loaded it must work."""
    if native.module.omp_threads() == 0:
        pytest.skip("the extension was built without OpenMP")
    path = native.module.__file__
    library = next(iter(native.omp_libraries_in_process()), "libgomp.so.1")
    code = f"""
import ctypes, importlib.util
def load():
    spec = importlib.util.spec_from_file_location("_C", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
try:
    load()
    print("loaded without a runtime")
except ImportError as error:
    print("undefined symbol" in str(error))
ctypes.CDLL({library!r}, mode=ctypes.RTLD_GLOBAL)
print(load().omp_threads() > 0)
"""
    assert run(code).split() == ["True", "True"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_run_and_for_any_number_of_threads(isa, dtype, threads):
    # large enough to be split: 300 * (1000 + 900) weights
    x, v, u = random((5, 1000), dtype), random((300, 1000), dtype), random((900, 300), dtype)
    threads(1)
    first = low_rank_linear(x, v, u)
    for count in (1, 2, 3, 7):
        threads(count)
        for _ in range(3):
            assert torch.equal(low_rank_linear(x, v, u), first)


@pytest.mark.parametrize("rows", [1, 6])
def test_groups_and_mlps_have_the_same_bits_for_any_number_of_threads(isa, rows, threads):
    dtype = torch.bfloat16
    x = random((rows, 500), dtype)
    # unlike each other, so that the threads' shares begin and end in the middle of members
    vs, us = [], []
    for rank, out in ((90, 700), (33, 130), (5, 1), (64, 301)):
        vs.append(random((rank, 500), dtype) / 20)
        us.append(random((out, rank), dtype) / 8)
    gate, up = (vs[0], us[0], None), (vs[1], random((700, 33), dtype) / 8, random((700,), dtype))
    down = (random((48, 700), dtype) / 20, random((333, 48), dtype) / 8, None)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append([*low_rank_linear_group(x, vs, us), low_rank_mlp(x, gate, up, down)])
    for v, u, y in zip(vs, us, found[0], strict=False):
        assert torch.equal(y, low_rank_linear(x, v, u))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("rank", [45, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(isa, dtype, rank):
    x, v, u = random((150, 130), dtype), random((rank, 130), dtype), random((67, rank), dtype)
    h = random((130, rank), dtype)
    # On AVX-512 the order of the additions changes with the number of rows at these places at most; elsewhere there is
    # one. Where there are kernels for many rows, those are handled in a way of their own; but AVX2's for up to 12 rows,
    # which serve ranks from 192 on, add as those for one row do.
    many = native.module.cpu_many_rows_from(dispatch.CPP_DTYPES[dtype])
    if isa == "avx2":
        kinds = [(12, (1, 2, 3, 4, 7, 11)), (150, (13, 16, 33, 64, 65, 129))]
    else:
        assert many > 16
        kinds = [(4, (1, 2, 3)), (8, (5, 6, 7)), (10, (9,)), (16, (11, 13))]
        kinds.append((150, (many, 33, 64, 65, 129) if many <= 150 else (17, 64, 65, 129)))
    for most, fewer in kinds:
        whole, bridged = low_rank_linear(x[:most], v, u), low_rank_bridge(x[:most], v, h)
        for rows in fewer:
            first = most - rows
            assert torch.equal(low_rank_linear(x[first : first + rows], v, u), whole[first : first + rows])
            assert torch.equal(low_rank_bridge(x[first : first + rows], v, h), bridged[first : first + rows])


def test_calls_from_many_python_threads(isa):
    x, v, u = random((3, 600), torch.bfloat16), random((256, 600), torch.bfloat16), random((600, 256), torch.bfloat16)
    sizes = [1, 2, 3] * 8
    expected = {rows: low_rank_bridge(x[:rows], v, u) for rows in set(sizes)}

    def work(rows: int) -> bool:
        return all(torch.equal(low_rank_bridge(x[:rows], v, u), expected[rows]) for _ in range(20))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, sizes))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_value_survives(isa, dtype):
    # rank 0: the residual goes through widening and rounding alone
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.cat([values, values[:3]])  # not a multiple of four
    y = low_rank_linear(torch.zeros(1, 1, dtype=dtype), torch.zeros(0, 1, dtype=dtype),
                        torch.zeros(len(values), 0, dtype=dtype), None, values[None])[0]  # fmt: skip
    nan = values.isnan()
    assert bool(y[nan].isnan().all())
    # adding a zero product turns -0 into +0, which is the same number
    assert torch.equal(y[~nan], values[~nan] + 0.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounds_to_nearest_even(isa, dtype):
    # y = u * t with t = 1: sums of two values reach every kind of tie, overflow and subnormal number
    count = 20000
    bits = torch.randint(0, 2**16, (2, count), dtype=torch.int32).to(torch.int16)
    a, b = bits.view(dtype)
    b[: count // 2] = a[: count // 2] * torch.finfo(dtype).eps  # near-ties
    keep = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[keep], b[keep]
    one = torch.ones(1, 1, dtype=dtype)
    y = low_rank_linear(one, one, a[:, None].contiguous(), b)[0]
    expected = (a.float() + b.float()).to(dtype)
    # dot-product instructions treat fp32 subnormal numbers as zero: bf16 values below 2^-126 may vanish
    normal = (a.float().abs() >= 2.0**-126) & (b.float().abs() >= 2.0**-126) & (expected.float().abs() >= 2.0**-126)
    assert int(normal.sum()) > count // 2
    assert torch.equal(y[normal], expected[normal])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_writes_only_what_it_is_given(isa, dtype):
    """Every operand lies inside a larger buffer of nans: a read beyond a row poisons the result."""

    def framed(rows, columns):
        buffer = torch.full((rows + 2, columns + 10), float("nan"), dtype=dtype)
        buffer[1 : rows + 1, 5 : columns + 5] = random((rows, columns), dtype)
        return buffer[1 : rows + 1, 5 : columns + 5]

    for in_features in (1, 7, 15, 16, 17, 31, 33, 47, 63, 65):
        for rank, out_features in ((3, 5), (17, 2), (30, 33)):
            x, v, u = framed(3, in_features), framed(rank, in_features), framed(out_features, rank)
            bias, residual = framed(1, out_features)[0], framed(3, out_features)
            y = low_rank_linear(x, v, u, bias, residual)
            copies = [t.clone() for t in (x, v, u, bias, residual)]
            assert torch.equal(y, low_rank_linear(*copies))
            assert bool(torch.isfinite(y).all())


def test_rows_far_apart_use_64_bit_offsets(isa):
    # strides are counted in elements; an expanded dimension makes them 0 without using memory
    x = random((1, 64), torch.float32).expand(130, 64)
    v, u = random((8, 64), torch.float32), random((64, 8), torch.float32)
    y = low_rank_bridge(x, v, u)
    assert torch.equal(y, y[:1].expand(130, 64))


def test_dtype_code_is_checked():
    with pytest.raises(ValueError, match="dtype code"):
        native.module.cpu_low_rank_linear(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 1)


def test_auto_uses_the_best():
    native.module.set_cpu_isa("auto")
    assert native.module.cpu_isa() == ISAS[0]
    assert taco_kernels.get_backend() is None
