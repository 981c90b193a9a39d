"""Triton kernels compiled for sm_80 and sm_90 without a GPU: do they fit or spill, are the instructions those meant?"""

import dataclasses
import os
import re

import pytest
import torch

from taco_kernels.triton_kernels.config import PORTABLE_SHARED_BYTES, default_config

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="under TRITON_INTERPRET=1 there is nothing to compile",
)

PROCESSORS = {80: 108, 90: 132}
# Decode, a batch, prefill with small and with large rank: together these reach every kernel of the defaults.
CALLS = [
    (1, 4096, 512),
    (16, 4096, 512),
    (16, 4096, 64),
    (512, 4096, 512),
    (8192, 4096, 128),
    (8192, 4096, 1024),
]
# ptxas gives up a few words to fit one more block on a multiprocessor. A tile that does not fit costs hundreds.
FEW_WORDS = 32


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Compiled anew, not taken from a cache that another version of the compiler has filled."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def _compiled(arch, dtype, rows, size, rank, bridge):
    from taco_kernels.triton_kernels import aot

    config = default_config(rows, size, size, rank, dtype.itemsize, PROCESSORS[arch])
    calls = aot.call_launches(rows, size, size, rank, dtype, config, bridge=bridge)
    return config, [aot.compile_launch(launch, arch) for launch in calls]


@pytest.mark.parametrize("bridge", [False, True], ids=["linear", "bridge"])
@pytest.mark.parametrize("rows, size, rank", CALLS)
@pytest.mark.parametrize("arch", [80, 90])
def test_bfloat16(arch, rows, size, rank, bridge):
    config, kernels = _compiled(arch, torch.bfloat16, rows, size, rank, bridge)
    for kernel in kernels:
        _judge(kernel, config, arch)


def _judge(kernel, config, arch):
    assert kernel.shared <= PORTABLE_SHARED_BYTES, f"{kernel.kernel} needs {kernel.shared} bytes"
    assert kernel.stack <= FEW_WORDS, f"{kernel.kernel} spills {kernel.stack} bytes"
    # The factors and activations come in 16 bytes per thread, straight to shared memory or through registers.
    assert re.search(r"LDGSTS\S*\.128|LDG\.E\S*\.128", kernel.sass), f"{kernel.kernel} has no 16-byte loads"
    if kernel.kernel in ("shrink", "pivot_shrink", "expand", "expand_gated", "fused"):
        warpgroup = arch == 90 and config.block_m >= 64
        assert ("HGMMA" if warpgroup else "HMMA") in kernel.sass, f"{kernel.kernel} misses the matrix unit"


# q/k/v of one size, gate/up of an MLP, and the gradient towards the input, at decode and at prefill
FORMS = {"group": {"members": 3}, "gated": {"members": 2, "act": "silu"}, "gradient": {"transposed": True}}


# what is left of a 4096 x 4096 map at half its size, one row and several
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("rank", [512, 1200])
@pytest.mark.parametrize("arch", [80, 90])
def test_pivoted_in_bfloat16(arch, rows, rank):
    from taco_kernels.triton_kernels import aot

    config = default_config(rows, 4096 - rank, 4096, rank, 2, PROCESSORS[arch])
    calls = aot.call_launches(rows, 4096, 4096, rank, torch.bfloat16, config, pivoted=True)
    assert calls[0].kernel.__name__ in ("pivot_row_shrink", "pivot_shrink")
    for kernel in (aot.compile_launch(launch, arch) for launch in calls):
        _judge(kernel, config, arch)


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("rank", [256, 1024])
@pytest.mark.parametrize("arch", [80, 90])
def test_8_bit_factors_in_bfloat16(arch, rank, rows, pivoted):
    from taco_kernels.triton_kernels import aot

    calls = aot.int8_call_launches(rows, 4096, 4096, rank, torch.bfloat16, PROCESSORS[arch], pivoted)
    for kernel in (aot.compile_launch(launch, arch) for launch in calls):
        assert kernel.shared <= PORTABLE_SHARED_BYTES, f"{kernel.kernel} needs {kernel.shared} bytes"
        assert kernel.stack <= FEW_WORDS, f"{kernel.kernel} spills {kernel.stack} bytes"
        assert re.search(r"LDGSTS\S*\.128|LDG\.E\S*\.128", kernel.sass), f"{kernel.kernel} has no 16-byte loads"
        assert "HMMA" in kernel.sass, f"{kernel.kernel} misses the matrix unit"


def test_persistent_launches_behind_a_pivot_fill_the_gpu():
    from taco_kernels.triton_kernels import aot

    config = default_config(2048, 4096 - 512, 4096, 512, 2, PROCESSORS[90])
    config = dataclasses.replace(config, persistent=2)
    *_, expand = aot.call_launches(2048, 4096, 4096, 512, torch.bfloat16, config, pivoted=True)
    assert expand.kernel.__name__ == "expand" and expand.grid == (2 * PROCESSORS[90],)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "arch, rows, rank, persistent",
    [(80, 16, 512, 0), (80, 512, 512, 0), (90, 1, 512, 0), (90, 16, 512, 0), (90, 512, 512, 2), (90, 8192, 1024, 0)],
)
def test_forms_in_bfloat16(arch, rows, rank, persistent, form):
    from taco_kernels.triton_kernels import aot

    how = FORMS[form]
    members, processors = how.get("members", 1), PROCESSORS[arch]
    config = default_config(rows, 4096, members * 4096, members * rank, 2, processors, "act" in how)
    config = dataclasses.replace(config, persistent=persistent)
    calls = aot.call_launches(rows, 4096, 4096, rank, torch.bfloat16, config, **how)
    for kernel in (aot.compile_launch(launch, arch) for launch in calls):
        _judge(kernel, config, arch)


@pytest.mark.parametrize("rows, size, rank", [(1, 4096, 512), (16, 4096, 512), (512, 4096, 512)])
@pytest.mark.parametrize("arch", [80, 90])
def test_float32_stays_float32(arch, rows, size, rank):
    _, kernels = _compiled(arch, torch.float32, rows, size, rank, True)
    for kernel in kernels:
        assert kernel.shared <= PORTABLE_SHARED_BYTES
        assert kernel.stack <= FEW_WORDS, f"{kernel.kernel} spills {kernel.stack} bytes"
        assert ("tf32" not in kernel.ptx and "FFMA" in kernel.sass) or kernel.kernel == "combine"


@pytest.mark.parametrize(
    "rows, in_size, out_size, rank",
    [(1, 1, 1, 1), (5, 1, 1, 1), (33, 70, 1, 3), (40, 1, 17, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_odd_sizes_compile(dtype, rows, in_size, out_size, rank):
    """Triton turns sizes of 1 into constants, which other code paths of the compiler then see."""
    from taco_kernels.triton_kernels import aot

    config = default_config(rows, in_size, out_size, rank, dtype.itemsize, 132)
    for launch in aot.call_launches(rows, in_size, out_size, rank, dtype, config):
        assert aot.compile_launch(launch, 90).registers > 0


def test_odd_fused_sizes_compile():
    from taco_kernels.triton_kernels import aot

    config = default_config(130, 33, 1, 1, 2, 1)
    assert config.path == "fused"
    for rows, in_size, out_size in [(130, 33, 1), (130, 1, 40)]:
        for launch in aot.call_launches(rows, in_size, out_size, 1, torch.bfloat16, config):
            assert aot.compile_launch(launch, 90).registers > 0
