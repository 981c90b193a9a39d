"""A copy of the source tree to build from, and a PATH with only what a build needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "README.md", "constraints.txt")
FOLDERS = ("csrc", "taco_kernels", "python")


def copy_tree(target: Path) -> Path:
    """Copies what a build reads, nothing that a build left behind, so that tests never write into the tree."""
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def tools(folder: Path, names: Iterable[str]) -> str:
    """A PATH that holds only ``names`` (those that exist here), whatever else the machine has."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(os.path.realpath(found))
    return str(folder)


SHELL_TOOLS = ("sh", "bash", "env", "ls", "cat", "rm", "mkdir", "uname", "dirname", "git")
COMPILER_TOOLS = ("g++", "gcc", "cc", "c++", "as", "ld", "ar")


def clean_environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without what would leak into a build, with ``changes`` (None removes)."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "TACO_CUDA", "TACO_CPP")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    for name, value in changes.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


def run(command: list[str], cwd: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True, check=False
    )


def setup_py(tree: Path, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", *arguments], tree, **environment)
