"""The Triton kernels on the CPU, through Triton's interpreter, against float64.

Triton reads ``TRITON_INTERPRET`` when it is imported, so an ordinary run of this file starts one child pytest with
the variable set, which runs the cases below and those of `OTHERS`; ``TRITON_INTERPRET=1 pytest``
runs them directly.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OTHERS = ("triton_interpreted_group.py", "triton_interpreted_int8.py", "triton_interpreted_pivot.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _why_not() -> str:
    """Why the interpreter cannot be used here; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    versions = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    old, new = (tuple(map(int, versions[name].split(".")[:2])) for name in ("triton", "numpy"))
    if old < (3, 7) and new >= (2, 4):
        # Its loops call int() on arrays of one element, which numpy no longer allows.
        return f"the interpreter of triton {versions['triton']} does not work with numpy {versions['numpy']}"
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "usable")

if not INTERPRETED:

    def test_triton_kernels_under_the_interpreter() -> None:
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).resolve()),
            *(str(Path(__file__).resolve().with_name(name)) for name in OTHERS),
        ]
        done = subprocess.run(
            command,
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

elif not _why_not():
    from hypothesis import example, given, settings
    from hypothesis import strategies as st

    from taco_kernels.triton_kernels.config import Config, default_config
    from taco_kernels.triton_kernels.low_rank_bridge import low_rank_bridge
    from taco_kernels.triton_kernels.low_rank_linear import low_rank_linear

    DTYPES = (torch.float32, torch.float16, torch.bfloat16)
    # Every path, tiles larger and smaller than the tensors, loops of one step and of several, splits that leave
    # slices short. fp32 work in the interpreter is numpy, so tiles are kept small.
    CONFIGS = {
        "row": Config("row", 1, 16, 32, 3, 4, 2, 16, 16, 4, 2),
        "row-unsplit": Config("row", 1, 4, 64, 1, 4, 2, 8, 64, 4, 1),
        "split": Config("split", 16, 16, 32, 5, 4, 2, 32, 16, 4, 2),
        "gemm": Config("gemm", 32, 32, 32, 1, 4, 2, 32, 32, 4, 2),
        "gemm-split": Config("gemm", 16, 16, 16, 4, 4, 2, 16, 16, 4, 2),
        "fused": Config("fused", 16, 64, 32, 1, 4, 2, 16, 16, 4, 2, 3),
    }

    @pytest.fixture(autouse=True)
    def _poisoned_memory():
        """Whatever ``torch.empty`` returns is full of NaN, so that an unwritten or over-read element shows."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.use_deterministic_algorithms(before)

    def _case(rows, in_size, out_size, rank, dtype, seed, pad=0, bridge=False):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        x = draw(rows, in_size + pad).to(dtype)[:, :in_size]
        v = (draw(rank, in_size + pad) * in_size**-0.5).to(dtype)[:, :in_size]
        u = (draw(out_size, rank + pad) * rank**-0.5).to(dtype)[:, :rank]
        bias = draw(out_size).to(dtype)
        residual = x if bridge else draw(rows, out_size + pad).to(dtype)[:, :out_size]
        return x, v, u, bias, residual

    def _check(y, x, v, u, bias, residual, eps=None):
        """y against float64, elementwise, within the bound that roundoff alone can explain.

        Sums of n float32 terms err by at most n eps times the sum of absolute values; the intermediate and the
        result are each rounded once to the dtype (below float16's normal range, by half its smallest step).
        """
        info = torch.finfo(y.dtype)
        single = torch.finfo(torch.float32).eps
        half_step = info.eps / 2
        tiny = info.smallest_normal * info.eps / 2
        wide = [None if t is None else t.double() for t in (x, v, u, bias, residual)]
        x, v, u, bias, residual = wide
        scale = 1.0 if eps is None else torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)
        middle = scale * (x @ v.T)
        exact = middle @ u.T
        largest = (scale * (x.abs() @ v.abs().T)) @ u.abs().T
        terms = x.shape[1] * (1 if eps is None else 2) + u.shape[1] + 16
        error = terms * single * largest + half_step * (middle.abs() @ u.abs().T) + tiny * u.abs().sum(1)
        for extra in (bias, residual):
            if extra is not None:
                exact = exact + extra
                error = error + 2 * single * extra.abs()
        error = error + half_step * (exact.abs() + error) + 2 * single * exact.abs() + tiny
        assert y.is_contiguous() and torch.isfinite(y).all()
        worst = ((y.double() - exact).abs() / error).max().item() if y.numel() else 0.0
        assert worst <= 1.0, f"error is {worst:.2f} times what roundoff explains"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize(
        "rows, in_size, out_size, rank",
        [(1, 96, 64, 32), (1, 83, 37, 19), (1, 1, 1, 1)],
    )
    def test_one_row(name, dtype, rows, in_size, out_size, rank):
        x, v, u, bias, residual = _case(rows, in_size, out_size, rank, dtype, 1, pad=3)
        _check(
            low_rank_linear(x, v, u, bias, residual, config=CONFIGS[name]),
            x,
            v,
            u,
            bias,
            residual,
        )
        y = low_rank_linear(x, v, u, config=CONFIGS[name])
        _check(y, x, v, u, None, None)
        assert torch.equal(y, low_rank_linear(x, v, u, config=CONFIGS[name])), "same input, other bits"
        v2, u2 = (
            v,
            u.new_tensor(u.new_zeros(in_size, rank).normal_(generator=torch.Generator().manual_seed(7))),
        )
        bias2 = x.new_ones(in_size)
        _check(
            low_rank_bridge(x, v2, u2, bias2, 1e-5, config=CONFIGS[name]),
            x,
            v2,
            u2,
            bias2,
            x,
            1e-5,
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("row")])
    @pytest.mark.parametrize(
        "rows, in_size, out_size, rank",
        [(16, 64, 32, 32), (37, 70, 45, 33), (2, 200, 3, 64)],
    )
    def test_many_rows(name, dtype, rows, in_size, out_size, rank):
        x, v, u, bias, residual = _case(rows, in_size, out_size, rank, dtype, 2, pad=5)
        _check(
            low_rank_linear(x, v, u, bias, residual, config=CONFIGS[name]),
            x,
            v,
            u,
            bias,
            residual,
        )
        y = low_rank_linear(x, v, u, None, residual, config=CONFIGS[name])
        _check(y, x, v, u, None, residual)
        assert torch.equal(y, low_rank_linear(x, v, u, None, residual, config=CONFIGS[name])), "same input, other bits"
        h, v, u, bias, _ = _case(rows, in_size, in_size, rank, dtype, 3, pad=1, bridge=True)
        _check(
            low_rank_bridge(h, v, u, bias, 1e-6, config=CONFIGS[name]),
            h,
            v,
            u,
            bias,
            h,
            1e-6,
        )
        _check(
            low_rank_bridge(h, v, u, None, 1e-2, config=CONFIGS[name]),
            h,
            v,
            u,
            None,
            h,
            1e-2,
        )

    sizes = st.integers(1, 70) | st.sampled_from([16, 32, 64, 96, 128])
    _grid = given(
        rows=st.integers(1, 20) | st.integers(21, 70), in_size=sizes, out_size=sizes, rank=sizes,
        dtype=st.sampled_from(DTYPES), pad=st.integers(0, 2), seed=st.integers(0, 2**31),
        with_bias=st.booleans(), with_residual=st.booleans(),
    )  # fmt: skip

    @settings(max_examples=60, deadline=None)
    @_grid
    @example(17, 1, 1, 1, torch.bfloat16, 0, 0, True, True)
    @example(1, 700, 5, 40, torch.float16, 0, 0, False, True)
    @example(16, 513, 33, 17, torch.bfloat16, 1, 0, True, False)
    def test_linear_with_default_configurations(
        rows, in_size, out_size, rank, dtype, pad, seed, with_bias, with_residual
    ):
        x, v, u, bias, residual = _case(rows, in_size, out_size, rank, dtype, seed, pad)
        bias, residual = (
            (bias if with_bias else None),
            (residual if with_residual else None),
        )
        _check(low_rank_linear(x, v, u, bias, residual), x, v, u, bias, residual)

    @settings(max_examples=40, deadline=None)
    @_grid
    @example(1, 700, 5, 40, torch.float16, 0, 0, False, True)
    def test_bridge_with_default_configurations(
        rows, in_size, out_size, rank, dtype, pad, seed, with_bias, with_residual
    ):
        h, v, u, bias, _ = _case(rows, in_size, in_size, rank, dtype, seed, pad, bridge=True)
        bias = bias if with_bias else None
        _check(low_rank_bridge(h, v, u, bias, 1e-6), h, v, u, bias, h, 1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_default_fused_configuration(dtype):
        # On one multiprocessor 64 rows already count as many, so this is the fused path for the half types.
        config = default_config(130, 96, 80, 24, dtype.itemsize, 1)
        assert (config.path == "fused") == (dtype != torch.float32)
        x, v, u, bias, residual = _case(130, 96, 80, 24, dtype, 4)
        _check(
            low_rank_linear(x, v, u, bias, residual, config=config),
            x,
            v,
            u,
            bias,
            residual,
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_hidden_states_do_not_overflow(dtype):
        # Massive activations: the unscaled product leaves float16's range, the scaled one does not.
        h, v, u, bias, _ = _case(5, 512, 512, 32, dtype, 5, bridge=True)
        h = h * 3000
        _check(low_rank_bridge(h, v, u, bias, 1e-6), h, v, u, bias, h, 1e-6)
        one = h[:1]
        _check(low_rank_bridge(one, v, u, bias, 1e-6), one, v, u, bias, one, 1e-6)

    def test_no_rows_and_transposed_factors():
        x, v, u, bias, residual = _case(3, 40, 24, 8, torch.float32, 6)
        assert low_rank_linear(x[:0], v, u, bias, residual[:0]).shape == (0, 24)
        assert low_rank_bridge(x[:0], v, x.new_zeros(40, 8)).shape == (0, 40)
        # A rank of 0, or an empty input, is a sum over nothing.
        assert torch.equal(low_rank_linear(x, v[:0], u[:, :0], bias, residual), bias + residual)
        assert torch.equal(low_rank_linear(x[:, :0], v[:, :0], u), torch.zeros(3, 24))
        # The interpreter's products are numpy's, whose order of additions may depend on how a matrix lies in memory.
        columns = [t.T.contiguous().T for t in (x, v, u, residual)]
        _check(low_rank_linear(*columns[:3], bias, columns[3]), x, v, u, bias, residual)

    def test_what_cannot_work_is_refused():
        x, v, u, _, _ = _case(3, 40, 24, 65, torch.float32, 7)
        with pytest.raises(TypeError, match="float64"):
            low_rank_linear(x.double(), v.double(), u.double())
        with pytest.raises(ValueError, match="rank"):
            low_rank_linear(x, v, u, config=CONFIGS["fused"])
        with pytest.raises(ValueError, match="rows"):
            low_rank_linear(x, v, u, config=CONFIGS["row"])

    def test_intermediate_beyond_float16():
        # A result within float16's range of an intermediate that is not: a number of the dtype and a remainder hold it.
        x, v, u, bias, residual = _case(5, 328, 136, 40, torch.float16, 6)
        x, v, u = x * 4000, v * 8, u / 8
        largest = (x.double() @ v.double().T).abs().max()
        assert 65504 < largest < 2 * 65504
        _check(low_rank_linear(x, v, u, bias, residual, config=CONFIGS["split"]), x, v, u, bias, residual)
        # Further out it is infinite, as in two products of float16, and not the difference of two infinities.
        y = low_rank_linear(x.abs(), v.abs(), u.abs(), config=CONFIGS["split"])
        assert bool((y == torch.inf).all())
