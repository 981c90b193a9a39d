"""The Triton sketch: same bits as the reference (in Triton's interpreter), and compiled for sm_80 and sm_90.

Triton reads ``TRITON_INTERPRET`` when it is imported: an ordinary run of this file starts a child pytest with it set.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SEED = 0xFEDCBA9876543210

if not INTERPRETED:

    def test_under_the_interpreter() -> None:
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

    # A compilation takes seconds: every dtype, precision, architecture and the scale once, not all combinations.
    @pytest.mark.parametrize(
        "arch, dtype, low, scaled",
        [(90, torch.float32, True, False), (90, torch.bfloat16, True, True), (80, torch.float16, True, False),
         (80, torch.float32, False, True), (90, torch.bfloat16, False, False)],
    )  # fmt: skip
    def test_compiles_ahead(arch, dtype, low, scaled, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # not what another compiler left in a cache
        from taco_kernels.triton_kernels import aot
        from taco_kernels.triton_kernels.config import PORTABLE_SHARED_BYTES
        from taco_kernels.triton_kernels.sketch import sketch_launch

        a = torch.empty(4096, 11008, dtype=dtype, device="meta")
        y = torch.empty(442, 4096, device="meta")
        scale = torch.empty(11008, device="meta") if scaled else None
        kernel = aot.compile_launch(sketch_launch(a, scale, y, 3, SEED, low), arch)
        assert kernel.shared <= PORTABLE_SHARED_BYTES
        assert kernel.stack <= 32, f"spills {kernel.stack} bytes"
        assert ("HGMMA" if arch == 90 else "HMMA") in kernel.sass if low else "tf32" not in kernel.ptx

else:
    from taco_kernels import randomized_svd, use_backend
    from taco_kernels.svd.sketch import fill_reference
    from taco_kernels.triton_kernels.sketch import sketch_product

    @pytest.mark.parametrize(
        "vectors, size, seed",
        [((0, 5), 700, SEED), ((3, 70), 512, SEED), ((0, 1), 33, 0), ((0, 1), 33, 2**64 - 1), ((130, 131), 1, SEED)],
    )
    def test_bits(vectors, size, seed):
        """Times rows of the identity, the product is the sketch itself."""
        expected = fill_reference(vectors, (0, size), seed, torch.float32, "cpu")
        for part in (slice(0, 40), slice(-60, None)):
            for dtype in (torch.bfloat16, torch.float32):
                found = sketch_product(torch.eye(size)[part], None, vectors, seed, dtype)
                assert torch.equal(found, expected[:, part])

    @pytest.mark.parametrize(
        "rows, size, count, dtype",
        [(1, 40, 3, torch.float32), (70, 700, 20, torch.bfloat16), (130, 515, 65, torch.float16)],
    )
    def test_product(rows, size, count, dtype):
        a = torch.randn(rows, size + 3).to(dtype)[:, :size]
        scale = torch.rand(size)
        omega = fill_reference((2, 2 + count), (0, size), SEED, torch.float64, "cpu")
        for weights in (None, scale):
            matrix = a.double() if weights is None else a.double() * weights.double()
            exact, magnitude = omega @ matrix.T, omega.abs() @ matrix.abs().T
            full = sketch_product(a, weights, (2, 2 + count), SEED, torch.float32)
            assert bool(((full - exact).abs() <= (size + 4) * 2.0**-24 * magnitude).all())
            low = sketch_product(a, weights, (2, 2 + count), SEED, torch.bfloat16)
            assert bool(((low - exact).abs() <= (2.0**-9 + (size + 4) * 2.0**-24) * magnitude).all())

    def test_whole_decomposition_agrees_with_the_other_backends():
        a = torch.randn(60, 520) * (torch.arange(520) + 1.0) ** -0.5
        for right in (torch.rand(520), torch.randn(520, 70)):
            with use_backend("triton"):
                ours = randomized_svd(a, 8, 8, right=right, generator=torch.Generator().manual_seed(2))
            other = randomized_svd(a, 8, 8, right=right, generator=torch.Generator().manual_seed(2))
            torch.testing.assert_close(ours.S, other.S, rtol=1e-4, atol=0)
            torch.testing.assert_close(ours.U.abs(), other.U.abs(), rtol=1e-2, atol=1e-3)

    def test_refusals():
        with pytest.raises(TypeError, match="float64"):
            sketch_product(torch.eye(3).double(), None, (0, 1), 0, torch.float32)
