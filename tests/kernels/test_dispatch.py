"""Which backend serves a call, how one is forced, and what is said where it is not there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch

import taco_kernels
from taco_kernels import dispatch, native


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TACO_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=False
    )


CALL = "import torch, taco_kernels as t; print(t.low_rank_linear(torch.ones(1, 4), torch.ones(2, 4), torch.ones(3, 2)))"


def test_every_backend_is_listed_with_a_reason():
    states = taco_kernels.backends()
    assert tuple(states) == taco_kernels.BACKENDS
    assert states["reference"] == states["library"] == "usable"
    assert all(states.values())
    if not torch.cuda.is_available():
        assert taco_kernels.backends("cuda")["cuda"] != "usable"
        assert "no GPU is visible to torch" in taco_kernels.backends("cuda")["triton"]


def test_choice():
    few, many = 1, 10**6
    native_backend = "cpp" if native.module is not None else "library"
    assert dispatch.choose("cpu", torch.float32, few) == native_backend
    assert dispatch.choose("cpu", torch.bfloat16, few) == native_backend
    assert dispatch.choose("cpu", torch.float32, many) == "library"
    assert dispatch.choose("cpu", torch.float32, few, turned=True) == "library"
    assert dispatch.choose("cpu", torch.float64, few) == "reference"
    assert dispatch.choose("cuda", torch.float16, many) == "library"


@pytest.mark.parametrize("name", ["reference", "library"])
def test_use_backend_restores(name):
    assert taco_kernels.get_backend() is None
    with taco_kernels.use_backend(name):
        assert taco_kernels.get_backend() == name
        assert dispatch.choose("cpu", torch.float32, 1) == name
        with taco_kernels.use_backend(None):
            assert taco_kernels.get_backend() is None
        assert taco_kernels.get_backend() == name
    assert taco_kernels.get_backend() is None
    with pytest.raises(KeyError), taco_kernels.use_backend(name):
        raise KeyError
    assert taco_kernels.get_backend() is None


def test_transposed_factors_are_recognised(monkeypatch):
    op_file = sys.modules["taco_kernels.low_rank_linear"]
    seen = []
    monkeypatch.setattr(op_file.dispatch, "choose", lambda *a: seen.append(a[3]) or "reference")
    x, v, u = torch.ones(1, 4), torch.ones(2, 4), torch.ones(3, 2)
    for v_, u_ in ((v, u), (v.T.contiguous().T, u), (v, u.T.contiguous().T), (torch.ones(2, 9)[:, ::2][:, :4], u)):
        taco_kernels.low_rank_linear(x, v_, u_)
    assert seen == [False, True, True, False]


def test_forcing_what_is_not_there_says_why():
    with pytest.raises(RuntimeError, match="blas: there is no such backend; choose one of reference, library, cpp"):
        taco_kernels.set_backend("blas")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^cuda: "):
            taco_kernels.set_backend("cuda")
    assert taco_kernels.get_backend() is None


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were a GPU: its capability and what the extension says of it can be set; answers are forgotten."""
    stand_in = types.SimpleNamespace(HAS_CUDA=True, BUILD_INFO='{"cuda_archs": ["sm_90a"]}', cuda_unusable=lambda: "")
    monkeypatch.setattr(dispatch, "_reasons", {})
    monkeypatch.setattr(native, "module", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def set_to(capability=(8, 0), unusable=""):
        dispatch._reasons.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        stand_in.cuda_unusable = lambda: unusable

    return set_to


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_ranks_that_the_cuda_kernels_read_slowly_go_elsewhere(a_gpu, monkeypatch):
    """Half types whose rank is no multiple of 8 come in two bytes at a time there; forcing the kernels still works."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that nobody has measured")
    a_gpu()
    dispatch.tuned_choice.cache_clear()

    def choice(rank, rows=1, dtype=torch.bfloat16):
        return dispatch.choose("cuda", dtype, rows, False, ("low_rank_linear", 4096, 4096, rank), rank)

    for dtype in (torch.bfloat16, torch.float16):
        assert choice(408, dtype=dtype) == choice(8, dtype=dtype) == "cuda"
        assert choice(409, dtype=dtype) == choice(412, 16, dtype) == "triton"
        assert choice(409, 17, dtype) == "library"
    assert choice(409, dtype=torch.float32) == "cuda"
    monkeypatch.setitem(dispatch._reasons, ("triton", "cuda"), "triton is not installed")
    dispatch.tuned_choice.cache_clear()
    assert choice(409) == "library"
    monkeypatch.setattr(dispatch, "_forced", "cuda")
    assert choice(409) == "cuda"
    dispatch.tuned_choice.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_gpu_that_cannot_run_our_kernels_gets_another_backend(a_gpu):
    def choice():
        return dispatch.choose("cuda", torch.float16, 1)

    a_gpu((8, 0))
    assert choice() == "cuda" and taco_kernels.backends("cuda")["triton"] == "usable"
    a_gpu((7, 5))
    assert choice() == "library"
    for name in ("cuda", "triton"):
        assert taco_kernels.backends("cuda")[name] == "needs a GPU of capability 8.0 or more, and this one has 7.5"
    a_gpu((12, 0), "no kernel image is available for execution on the device")
    assert choice() == "triton"
    assert taco_kernels.backends("cuda")["cuda"] == (
        "the extension's kernels, built for sm_90a, cannot run on this GPU: "
        "no kernel image is available for execution on the device"
    )
    with pytest.raises(RuntimeError, match="cuda: .*cannot run on this GPU"):
        dispatch.set_backend("cuda")


def test_a_process_that_cannot_use_its_gpu_says_so(a_gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.\nTo use CUDA ...")

    a_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert taco_kernels.backends("cuda")["cuda"] == "Cannot re-initialize CUDA in forked subprocess."


def test_forcing_a_cpu_backend_asks_no_gpu(a_gpu, monkeypatch):
    a_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: pytest.fail("CUDA was initialised"))
    monkeypatch.setattr(dispatch, "allow_direct", lambda: None)
    with taco_kernels.use_backend("library"):
        pass
    assert dispatch.why_not("cuda", "cpu") == "computes CUDA tensors only, not cpu tensors"


@pytest.mark.skipif(
    native.module is None or not native.module.HAS_CUDA or torch.cuda.is_available(),
    reason="needs an extension with CUDA on a machine without",
)
def test_the_extension_says_why_it_cannot_run():
    assert native.module.cuda_unusable() != ""


def test_forced_backend_refuses_what_it_cannot_serve(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", "cpp")
    with pytest.raises(RuntimeError, match=r"cpp: computes CPU tensors only, not cuda tensors"):
        dispatch.choose("cuda", torch.float32, 1)


@pytest.mark.parametrize("name", ["reference", "library"])
def test_environment_variable(name):
    done = run("import taco_kernels as t; print(t.get_backend())", TACO_BACKEND=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "nonsense: there is no such backend"),
        pytest.param(
            "cuda",
            "cuda: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="asks for cuda where there is no GPU"),
        ),
        pytest.param(
            "triton",
            "triton: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="asks for triton where there is no GPU"),
        ),
    ],
)
def test_environment_variable_errors_on_call_not_on_import(name, message):
    assert run("import taco_kernels", TACO_BACKEND=name).returncode == 0
    done = run(CALL, TACO_BACKEND=name)
    assert done.returncode != 0
    assert f"RuntimeError: {message}" in done.stderr


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import taco_kernels; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(new & {'triton', 'transformers'}))"
    )
    done = run(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_backend_under_the_interpreter():
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})"
        + """
import torch, taco_kernels
from kernel_cases import DTYPES, assert_within, bound, bridge_exact, linear_exact, random
assert taco_kernels.backends("cpu")["triton"] == "usable"
torch.manual_seed(0)
for dtype in DTYPES:
    # Triton's matrix units take the rank-sized intermediate in the inputs' dtype: as many roundings as two calls
    rounding = "reference" if dtype == torch.float32 else "library"
    for lead in ((1,), (2, 3), (0, 2), ()):
        x, v, u = (random(s, dtype) for s in ((*lead, 40), (17, 40), (33, 17)))
        b, r, s = (random(s, dtype) for s in ((33,), (*lead, 33), (40, 17)))
        exact, size = linear_exact(x, v, u, b, r)
        assert_within(taco_kernels.low_rank_linear(x, v, u, b, r), exact, bound(exact, size, 57, dtype, rounding))
        exact, size = bridge_exact(x, v, s, None, 1e-6)
        assert_within(taco_kernels.low_rank_bridge(x, v, s), exact, bound(exact, size, 97, dtype, rounding))
print("done")
"""
    )
    done = run(code, TRITON_INTERPRET="1", TACO_BACKEND="triton")
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("isa, dtype", [("avx512bf16", torch.bfloat16), ("avx2", torch.bfloat16), ("", torch.float32)])
def test_a_pivots_maps_have_limits_of_their_own(isa, dtype, monkeypatch):
    """Where the kernels for many rows serve at all; never fewer rows than of other maps."""
    monkeypatch.setattr(dispatch, "isa", isa)
    monkeypatch.setattr(dispatch, "_many_rows", frozenset([torch.bfloat16] if isa else []))
    wide, plain = dispatch.pivoted_rows(dtype), dispatch.cpu_rows(dtype)
    assert (wide == plain) == (isa != "avx512bf16")
    for rank in (1, 64, 128, 192, 768, 2000):
        for rows in (1, 16, 17, 64, 128, 129, 256, 257, 5000):
            assert dispatch.within(wide, rank, rows) >= dispatch.within(plain, rank, rows), (rank, rows)


def test_a_pivots_call_asks_its_own_limits(monkeypatch):
    if native.module is None:
        pytest.skip("the extension is not built")
    op = importlib.import_module("taco_kernels.pivoted_low_rank_linear")
    chosen = []
    monkeypatch.setattr(
        op, "BACKENDS", {name: lambda x, v, u, *_, name=name: chosen.append(name) for name in op.BACKENDS}
    )
    monkeypatch.setitem(dispatch.PIVOTED_ROWS, dispatch.isa, ((0, 5, dispatch.ANY),))
    monkeypatch.setattr(dispatch, "_many_rows", frozenset(dispatch.CPP_DTYPES))
    x, v, u, pivot = torch.randn(6, 8), torch.randn(3, 5), torch.randn(4, 3), torch.arange(8)
    for rows in (5, 6):
        op._compute(x[:rows], v, u, pivot)
    assert chosen == ["cpp", "library"]


@pytest.mark.skipif(native.module is None, reason=f"cpp backend: {native.reason}")
def test_transposed_factors_are_not_copied_at_every_call(monkeypatch):
    """As an SVD gives them, columns in one piece: every op leaves them to the library, which reads them as they are."""
    import taco_kernels
    from taco_kernels import low_rank_bridge, low_rank_linear_group, low_rank_mlp, pivoted_low_rank_linear

    asked = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a, **k: asked.append(choose(*a, **k)) or asked[-1])
    x = torch.randn(2, 64)
    left, _, right = torch.linalg.svd(torch.randn(64, 64))
    v, u = right[:8], left[:, :8]
    assert u.stride(0) == 1 and v.stride(0) == 1
    calls = {
        low_rank_bridge: (x, v, u),
        low_rank_linear_group: (x, [v.contiguous(), v], [u.contiguous()] * 2),
        low_rank_mlp: (x, *[(v.contiguous(), u.contiguous(), None)] * 2, (v, u.contiguous(), None)),
        pivoted_low_rank_linear: (x, v[:, 8:], u.contiguous(), torch.randperm(64)),
        taco_kernels.low_rank_linear: (x, v, u),
    }
    for op, arguments in calls.items():
        asked.clear()
        op(*arguments)
        assert set(asked) == {"library"}, op
