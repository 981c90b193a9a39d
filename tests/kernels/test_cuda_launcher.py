"""What csrc/cuda/low_rank_decode.cu launches, and how, on devices that have not everything; on none of them, in fact.

The launcher itself, compiled for the CPU with a stand-in for the CUDA runtime (``csrc/cuda/emulation``) that answers as
the device would, runs the kernels in the emulation, and prints every launch. The program checks the results.
"""

from __future__ import annotations

import subprocess

import pytest
from emulation_programs import CSRC, built


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs two equal calls on the device that the words describe; gives the launches of one, or an error."""
    # where <cuda_runtime.h> is the stand-in
    runtime = f"-I{CSRC / 'cuda' / 'emulation'}"
    target = built("launcher", tmp_path_factory.mktemp("launcher") / "launcher", runtime)

    def run(*words: str) -> list[str]:
        done = subprocess.run([str(target), *words], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"wrong result, or an error left behind: {done.stdout}{done.stderr[-2000:]}"
        lines = done.stdout.splitlines()
        if not lines[-1].startswith(("error: ", "unusable: ")):
            refused = lines[:1] if lines[0] == "cooperative refused" else []  # the first call only
            half = (len(lines) - len(refused)) // 2
            assert lines[len(refused) : -half] == lines[-half:], "the second call was launched in another way"
            lines = refused + lines[-half:]
        return lines

    return run


@pytest.mark.parametrize(
    ("code", "second"),
    [
        (100, "dependent"),
        (90, "dependent"),
        # Built for 80 only, or a later device that runs PTX for 80: no kernel there waits for the one before.
        (80, "plain"),
    ],
)
def test_the_second_kernel_starts_early_where_its_code_waits(launched, code, second):
    assert [line.split()[0] for line in launched("dependent", f"code={code}")] == ["plain", second]


def test_the_first_kernel_leaves_shared_memory_for_the_second(launched):
    assert launched("dependent") == ["plain carveout", "dependent"]
    assert launched("dependent", "code=80") == ["plain", "plain"], "L1 given up for nothing"


def test_no_early_start_before_graphs_know_it(launched):
    assert launched("dependent", "driver=12030") == ["plain carveout", "dependent"]
    assert launched("dependent", "driver=12020") == ["plain", "plain"]


def test_one_kernel_with_a_barrier(launched):
    assert launched() == ["cooperative"]
    assert launched("code=80") == ["cooperative"]


def test_two_kernels_where_one_is_refused(launched):
    both = ["plain carveout", "dependent"]
    assert launched("most_blocks=2") == ["cooperative refused", *both]
    assert launched("most_blocks=2", "code=80") == ["cooperative refused", "plain", "plain"]
    assert launched("cooperative=0") == both, "asked for what the device said it has not"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("code=80", ""),
        ("cooperative=0", ""),
        ("driver_error=35", "CUDA driver version is insufficient for CUDA runtime version"),
        # A build for 9.0a only, on another GPU.
        ("code_error=209", "no kernel image is available for execution on the device"),
    ],
)
def test_why_a_device_is_unusable(launched, word, reason):
    assert launched("unusable", word) == [f"unusable: {reason}"]
    if reason:
        assert launched(word)[-1] == f"error: {reason}"
