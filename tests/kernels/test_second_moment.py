"""Streaming second moments against float64, over block borders, in several calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import using

from taco_kernels import second_moment_, second_moment_dense, second_moment_zeros
from taco_kernels._library import exact_products

module = sys.modules["taco_kernels.second_moment"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one column, one block, its neighbours, several blocks with a short last one
COLUMNS = [1, 7, 64, 65, 255, 256, 257, 600]


def check(n: int, dtype: torch.dtype, rows: tuple[int, ...] = (5, 0, 70)) -> None:
    """Within what roundoff explains: T float32 products added up, in any order, and stored once per call."""
    moment = second_moment_zeros(n)
    parts = [torch.randn(2, count, n, dtype=torch.float64).to(dtype) for count in rows]
    for part in parts:
        assert second_moment_(moment, part) is moment
    wide = torch.cat([part.double().flatten(0, 1) for part in parts])
    exact, size = module.second_moment_reference(wide), wide.abs().T @ wide.abs()
    found = second_moment_dense(moment)
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    limit = (len(wide) + len(parts) + 2) * torch.finfo(torch.float32).eps / 2 * size
    worst = float(((found.double() - exact).abs() / limit).max())
    assert worst <= 1, f"{worst:.2f} times the bound"


if not INTERPRETED:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", COLUMNS)
    def test_against_float64(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        check(n, dtype)
        monkeypatch.setattr(module, "_CHUNK", 3 * n + 1)  # several chunks of one call, the last one short
        check(n, dtype)

    def test_only_about_half_is_stored() -> None:
        assert second_moment_zeros(5632).numel() <= 0.57 * 5632**2
        for n in range(1, 700):
            assert module._columns(second_moment_zeros(n)) == n

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_float64_moments_do_not_lose_small_batches(dtype: torch.dtype) -> None:
        """A large first batch and a thousand small ones: float32 storage would drop their digits."""
        moment = second_moment_zeros(3, torch.float64)
        second_moment_(moment, torch.full((1, 3), 4096.0, dtype=dtype))
        for _ in range(1000):
            second_moment_(moment, torch.full((1, 3), 0.5, dtype=dtype))
        assert torch.equal(second_moment_dense(moment), torch.full((3, 3), 4096.0**2 + 250, dtype=torch.float64))

    @pytest.mark.parametrize("storage", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_autocast_rounds_nothing(storage: torch.dtype, dtype: torch.dtype) -> None:
        x = torch.randn(30, 40).to(dtype)
        expected = second_moment_(second_moment_zeros(40, storage), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = second_moment_(second_moment_zeros(40, storage), x)
        assert torch.equal(found, expected)

    def test_autocast_beside_a_device_that_knows_none() -> None:
        moment = second_moment_zeros(40, device="meta")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert second_moment_(moment, torch.zeros(3, 40, device="meta")) is moment

    def test_strided_and_tracked_rows() -> None:
        x = torch.randn(9, 40, 2, requires_grad=True)[..., 0]
        moment = second_moment_(second_moment_zeros(40), x)
        assert not moment.requires_grad
        torch.testing.assert_close(second_moment_dense(moment), (x.T @ x).detach())

    def test_errors() -> None:
        moment = second_moment_zeros(4)
        with pytest.raises(ValueError, match="second_moment_zeros"):
            second_moment_(moment, torch.ones(3, 5))
        with pytest.raises(TypeError, match=r"float64 cannot be added to moments of torch.float32"):
            second_moment_(moment, torch.ones(3, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match="meta"):
            second_moment_(moment, torch.ones(3, 4, device="meta"))
        with pytest.raises(TypeError, match="float32 or float64"):
            second_moment_zeros(4, torch.bfloat16)
        with pytest.raises(ValueError, match="0 columns"):
            second_moment_zeros(0)
        with pytest.raises(ValueError, match="no packed moment"):
            second_moment_dense(torch.zeros(7))

    def test_triton_under_the_interpreter() -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

    @pytest.mark.parametrize("arch", [80, 90])
    def test_triton_compiled_ahead(arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        from taco_kernels.triton_kernels import aot
        from taco_kernels.triton_kernels.config import PORTABLE_SHARED_BYTES
        from taco_kernels.triton_kernels.second_moment import launch

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        x = torch.empty((4096, 5632), dtype=torch.bfloat16, device="meta")
        made = aot.compile_launch(launch(torch.empty((704, 4928), device="meta"), x, 704), arch)
        assert made.shared <= PORTABLE_SHARED_BYTES and made.stack <= 32
        assert re.search(r"LDGSTS\S*\.128", made.sass) and "LDG.E.U16" not in made.sass, "no 16-byte loads"
        assert "HMMA" in made.sass or "HGMMA" in made.sass, "the products do not go through the matrix units"

else:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 65, 300])
    def test_interpreted(n: int, dtype: torch.dtype) -> None:
        with using("triton"):
            check(n, dtype)


@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason=f"torch {torch.__version__} has no precision of its own for each backend",
)
def test_precision_that_the_user_allows_is_for_other_products():
    """Sums of products in float32 also where float32 products may be bfloat16's; the setting stays what it was."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 96, generator=generator)
    settings = torch.backends, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        settings[1].fp32_precision = "none"  # goes by the common one
        for setting in settings:
            setting.fp32_precision = "bf16"
            moment = second_moment_zeros(96)
            second_moment_(moment, x)
            exact = x.double().T @ x.double()
            off = (second_moment_dense(moment).double() - exact).norm() / exact.norm()
            assert float(off) < 1e-6
            assert settings[1].fp32_precision == "bf16"
            setting.fp32_precision = "ieee"
            assert settings[1].fp32_precision == "ieee"
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def test_moments_that_would_stop_growing_are_refused():
    with pytest.raises(TypeError, match="would stop growing"):
        second_moment_(torch.zeros(6, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16))


def test_products_stay_exact_until_the_last_thread_is_done():
    """The setting is the process's: the thread that came first must not set it back under one that is at work."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        first, second = (exact_products(torch.device("cpu")) for _ in range(2))
        asked = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
        changed = precision(asked)
        first.__enter__()
        exact = precision(asked)
        second.__enter__()
        first.__exit__(None, None, None)
        assert precision(asked) == exact != changed
        second.__exit__(None, None, None)
        assert precision(asked) == changed
    finally:
        torch.set_float32_matmul_precision(before)


def precision(setting):
    return torch.get_float32_matmul_precision() if setting is None else setting.fp32_precision
