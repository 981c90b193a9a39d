"""Programs that run the CUDA sources on a CPU (csrc/cuda/emulation), built with sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def built(name: str, target: Path, *flags: str) -> Path:
    """Compiles csrc/cuda/emulation/<name>.cpp to `target`; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++) was found to build the emulation with")
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [f"-I{CSRC}", *flags, str(CSRC / "cuda" / "emulation" / f"{name}.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return target
